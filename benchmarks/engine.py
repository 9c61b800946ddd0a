"""Compare speed and memory of the trainer with TRL's trainers and transformers' Trainer.

    python benchmarks/engine.py [--rounds N] [--peer-python PATH]
    python benchmarks/engine.py --device cuda

All train the same Mistral-architecture model with random weights on the same rows, in the same
order, batch size and precision. Each runs in its own process; they alternate round by round.
Measured are the time from the end of the third step to the end of the last one, and peak memory.

TRL is not a dependency. Without it only the others are compared. Install it with `pip install
trl`, here or in another environment with the same torch and transformers, and pass that
environment's Python as `--peer-python`.

With `--device cuda` the model has 1.27 billion parameters, all of them trained, computed in
bfloat16. The benchmark then also prints the fraction of the GPU's matrix throughput that training
reaches (MFU) and a profile of the rest. This part was written without a GPU and has never been
run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

PARTS: Final = Path(__file__).with_name("_engine_parts.py")
TASKS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "cpu": {
        "chat answers": {"chats": True},
        "texts, every token": {"chats": False},
        "preference pairs (DPO)": {"chats": True, "method": "dpo"},
    },
    "cuda": {
        "texts, every token": {"chats": False},
        "texts, gradient checkpointing": {"chats": False, "checkpointing": True},
    },
}
SIZES: Final[dict[str, dict[str, Any]]] = {
    "cpu": {"hidden": 128, "head": 32, "layers": 4, "seq_len": 256, "batch": 8, "micro": 8},
    "cuda": {"hidden": 2048, "head": 128, "layers": 18, "seq_len": 4096, "batch": 8, "micro": 2},
}
THREADS: Final = str(len(os.sched_getaffinity(0)))
SETTINGS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
STEPS: Final = {"cpu": 23, "cuda": 13}
LEAST_SPEED: Final = 0.95
MOST_MEMORY: Final = 1.0
LEAST_MFU: Final = 0.45


def run_part(python: str, part: str, directory: Path) -> dict[str, Any]:
    """Run a part of `_engine_parts.py` in its own process."""
    done = subprocess.run(
        [python, str(PARTS), part, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": THREADS, **os.environ, **SETTINGS},
    )
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def has_trl(python: str) -> bool:
    """Tell whether a Python interpreter can import TRL."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def who_trains(method: str, pythons: dict[str, str]) -> dict[str, str]:
    """Return the trainers that support a method."""
    return {name: p for name, p in pythons.items() if method == "sft" or name != "transformers"}


def compare(directory: Path, pythons: dict[str, str], rounds: int) -> dict[str, list[Any]]:
    """Train with each trainer in turn, round by round."""
    found: dict[str, list[Any]] = {name: [] for name in pythons}
    for number in range(rounds):
        for name, python in pythons.items():
            found[name].append(run_part(python, name, directory))
            result = found[name][-1]
            print(
                f"  round {number + 1}  {result['version']:<22} "
                f"{result['tokens_per_second']:>9,.0f} tokens/s "
                f"{result['memory'] / 1e6:>9,.0f} MB   mean loss {result['loss']:.5f}",
                flush=True,
            )
    return found


def print_ratios(found: dict[str, list[Any]]) -> bool:
    """Print ours relative to the best alternative; return whether the targets are met."""
    peers = [name for name in found if name != "ours"]
    rounds = range(len(found["ours"]))

    def values(name: str, number: int, of: list[str]) -> list[float]:
        return [found[peer][number][name] for peer in of]

    speed = statistics.median(
        found["ours"][n]["tokens_per_second"] / max(values("tokens_per_second", n, peers))
        for n in rounds
    )
    memory = statistics.median(
        found["ours"][n]["memory"] / min(values("memory", n, peers)) for n in rounds
    )
    print(
        f"  tokens/s, ours / fastest alternative   {speed:.2f}   (target: at least {LEAST_SPEED})"
    )
    print(
        f"  memory,   ours / lowest alternative    {memory:.2f}   (target: at most {MOST_MEMORY})"
    )
    return bool(speed >= LEAST_SPEED and memory <= MOST_MEMORY)


def print_mfu(task: dict[str, Any], facts: dict[str, Any], tokens: float, flops: float) -> bool:
    """Print the fraction of matrix throughput reached; return whether the target is met."""
    # Per token: 6 operations per multiplied weight, plus causal attention, which covers half.
    weights = 6 * facts["multiplied"]
    attention = 6 * task["layers"] * task["hidden"] * facts["width"]
    mfu: float = tokens * (weights + attention) / flops
    print(f"  matrix throughput, measured            {flops / 1e12:.2f} TFLOP/s")
    print(f"  fraction reached in training (MFU)     {mfu:.2f}   (target: at least {LEAST_MFU})")
    return mfu >= LEAST_MFU


def main() -> int:
    """Compare on each task; return 0 if all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=[*SIZES], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-python", default=sys.executable, help="Python interpreter with TRL installed"
    )
    parser.add_argument("--profile", action="store_true", help="profile our trainer")
    given = parser.parse_args()
    pythons = {"ours": sys.executable, "transformers": given.peer_python}
    if has_trl(given.peer_python):
        pythons["trl"] = given.peer_python
    else:
        print("TRL is not installed (pip install trl); skipping it.")
    good = True
    for title, changes in TASKS[given.device].items():
        with tempfile.TemporaryDirectory(prefix="engine-") as temporary:
            directory = Path(temporary)
            task = {
                "device": given.device,
                "steps": STEPS[given.device],
                "checkpointing": False,
                **SIZES[given.device],
                **changes,
            }
            able = who_trains(task.get("method", "sft"), pythons)
            if len(able) == 1:
                continue
            (directory / "task.json").write_text(json.dumps(task))
            facts = run_part(sys.executable, "prepare", directory)
            print(
                f"{title}: {facts['parameters']:,} parameters, {task['batch']} rows of "
                f"{facts['width']:.0f} tokens per step, {facts['in_loss']:.0%} of them in the loss"
            )
            found = compare(directory, able, given.rounds)
            good = print_ratios(found) and good
            if given.device == "cuda":
                tokens = statistics.median(each["tokens_per_second"] for each in found["ours"])
                flops = run_part(sys.executable, "matmul", directory)["flops"]
                enough = print_mfu(task, facts, tokens, flops)
                good = good and (enough or task["checkpointing"])  # recomputing costs a third more
            if given.device == "cuda" or given.profile:
                for kind, share in run_part(sys.executable, "profile", directory).items():
                    print(f"  share of time in {kind:<20} {share:.2f}")
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
