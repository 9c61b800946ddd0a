"""Encode conversations for training, against one plain loop over the rows.

    python -m benchmarks.encoding [--rows N] [--turns N] [--rounds N] [--family NAME]

The plain loop renders each row with transformers' `apply_chat_template` and tokenizes it, without a
loss mask. Ours renders each answer's prompt as well, marks what is in the loss, checks that the
template leaves nothing out, and writes the arrays to disk. Rates include the start of processes and
the loading of the tokenizer, but not of transformers. Requires trl 1.16, for its templates.
"""

# ruff: noqa: PLC0415  # each variant imports only what it needs
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

_WORDS: Final = (
    *("the", "model", "answers", "a", "question", "about", "parcels", "invoices", "rivers"),
    *("because", "somebody", "asked", "for", "short", "and", "clear", "summary", "of", "places"),
)


def write_rows(path: Path, rows: int, turns: int) -> None:
    """Write conversations."""
    chance = random.Random(1)
    with path.open("w") as file:
        for _ in range(rows):
            messages = [
                {"role": role, "content": " ".join(chance.choices(_WORDS, k=count))}
                for _ in range(turns)
                for role, count in (("user", 20), ("assistant", 40))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def plain(directory: Path) -> dict[str, float]:
    """Encode the rows in one loop."""
    from transformers import AutoTokenizer

    start, cpu = time.perf_counter(), cpu_seconds()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory / "model")
    tokens = 0
    with (directory / "rows.jsonl").open("rb") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            tokens += len(tokenizer.apply_chat_template(messages, return_dict=False))
    return {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - cpu, "tokens": tokens}


def ours(directory: Path, processes: int) -> dict[str, float]:
    """Encode the rows as the trainer does."""
    from training_backends.rundir.directory import RunDir, RunSpec
    from training_backends.trainer.encode import data_directories, encode_data, read_manifest

    values = {
        "run_id": "r",
        "model": str(directory / "model"),
        "train": [{"path": directory / "rows.jsonl"}],
        "training_steps": 1,
        "seq_len": 65536,
    }
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        run, spec = RunDir(Path(folder)), RunSpec.model_validate(values)
        start, cpu = time.perf_counter(), cpu_seconds()
        encode_data(run, spec, lambda: False, processes=processes)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        found = read_manifest(data_directories(run, spec)[0][0])
    assert found is not None
    return {"seconds": seconds, "cpu": cpu, "tokens": found.sizes["trained"]}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measured(directory: Path, variant: str) -> dict[str, float]:
    """Run a variant in its own process."""
    command = [sys.executable, "-m", "benchmarks.encoding", "--run", variant, str(directory)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    """Print rates and ratios; every round measures each variant once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--family", default="qwen2_5")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        variant, directory = given.run[0], Path(given.run[1])
        found = plain(directory) if variant == "plain" else ours(directory, int(variant))
        print(json.dumps(found))
        return 0
    from benchmarks._template_families import family_directory

    with tempfile.TemporaryDirectory(prefix="encoding-") as folder:
        directory = Path(folder)
        model = family_directory(given.family, directory / "model")
        (model / "config.json").write_text('{"model_type": "llama"}')
        write_rows(directory / "rows.jsonl", given.rows, given.turns)
        variants = ("plain", "1", "2")
        taken = [[measured(directory, each) for each in variants] for _ in range(given.rounds)]
        names = ("one plain loop", "ours, 1 process", "ours, 2 processes")
        print(f"{'':<18} {'rows/s':>8} {'ratio':>8} {'in CPU time':>12} {'tokens per row':>15}")
        for number, name in enumerate(names):
            rate = statistics.median(given.rows / turn[number]["seconds"] for turn in taken)
            ratio, of_cpu = (
                statistics.median(turn[0][unit] / turn[number][unit] for turn in taken)
                for unit in ("seconds", "cpu")
            )
            tokens = taken[0][number]["tokens"] / given.rows
            print(f"{name:<18} {rate:>8,.0f} {ratio:>6.2f} x {of_cpu:>10.2f} x {tokens:>15,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
