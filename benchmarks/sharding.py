"""Measure the memory that each process of a run needs to load its share of a model.

    python -m benchmarks.sharding [--processes N] [--hidden N] [--tuning full|lora]

Trains one step with `zero2` and `zero3` on CPUs. Prints the peak memory of each process until then,
less that of a process that has loaded the libraries only, relative to the size of the model in the
precision in which it is trained.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final, Self

from training_backends.rundir.directory import RunDir, RunSpec, TrainerExitCode
from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer
from training_backends.trainer.process import train

_POLL: Final = 0.05


def prepare(directory: Path, hidden: int) -> int:
    """Write a model and rows; return the model's size in bytes."""
    import torch  # noqa: PLC0415  # slow imports
    from transformers import MistralForCausalLM  # noqa: PLC0415

    from training_backends.trainer.models import make_tiny_model  # noqa: PLC0415

    config = make_tiny_model(0).config
    config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": 8,
            "head_dim": hidden // config.num_attention_heads,
        }
    )
    model = MistralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base")
    save_tiny_tokenizer(directory / "base")
    row = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (directory / "rows.jsonl").write_text(row * 8)
    return sum(4 * weight.numel() for weight in model.parameters())


def imports() -> int:
    """Return the peak memory of a process that imports what training needs."""
    program = (
        "import training_backends.trainer.run, torch, training_backends.trainer.memory as memory; "
        "print(memory.peak_memory(torch.device('cpu')))"
    )
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


class PeakMemory:
    """Watches the processes that train a run, by rank."""

    def __init__(self, run: RunDir) -> None:
        self.peaks: dict[int, int] = {}
        self._run = run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        path = str(self._run.path).encode()
        while not self._ended.wait(_POLL):
            if any(event.data.get("status") == "running" for event, _ in self._run.read_events()):
                return
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command = (process / "cmdline").read_bytes().split(b"\0")
                    if b"work" not in command or path not in command:
                        continue
                    variables = (process / "environ").read_bytes().split(b"\0")
                    status = (process / "status").read_text()
                except OSError:
                    continue
                rank = next(int(v[5:]) for v in variables if v.startswith(b"RANK="))
                peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                self.peaks[rank] = max(self.peaks.get(rank, 0), int(peak.split()[1]) * 1024)


def main() -> int:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tuning", choices=["full", "lora"], default="full")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sharding-") as folder:
        directory = Path(folder)
        size, libraries = prepare(directory, given.hidden), imports()
        print(f"model of {size / 1e6:,.0f} MB, libraries {libraries / 1e6:,.0f} MB, {given.tuning}")
        for sharding in ("zero2", "zero3"):
            run = RunDir(directory / sharding)
            values = {
                "run_id": sharding,
                "model": str(directory / "base"),
                "train": [{"path": directory / "rows.jsonl"}],
                "tuning": given.tuning,
                "training_steps": 1,
                "num_processes": given.processes,
                "sharding": sharding,
                "device": "cpu",
            }
            run.write_spec(RunSpec.model_validate(values))
            with PeakMemory(run) as memory:
                if train(run.path) is not TrainerExitCode.DONE:
                    print(run.read_exit(), file=sys.stderr)
                    return 1
            taken = [(memory.peaks[rank] - libraries) / size for rank in sorted(memory.peaks)]
            print(f"{sharding}: {', '.join(f'{each:.2f} x' for each in taken)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
