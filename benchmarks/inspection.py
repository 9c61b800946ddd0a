"""Compare a full inspection of training data with merely decoding it.

    python benchmarks/inspection.py [--size MB] [--rounds N] [--big GB] [--junk MB]

The baseline is a strict msgspec decode into typed structs, line by line, without any checks. The
inspection is complete (provider rules, duplicate rows, summary) and runs with one process and with
two. The variants alternate, each in a fresh process, on one file in the page cache; all figures
are from this run. Timing starts after the imports of the main process and includes starting the
second one. MB is 10⁶ bytes. The file is reproducible: English, French and code, a tenth with tool
calls.

Memory is the peak of all processes of an inspection together, sampled every few milliseconds,
minus that of an idle Python interpreter (Linux only; shared pages count once per process). `--big`
adds a file of the given GB: the same rows repeated, with a number in each that makes it unique,
and an invalid third line. It measures the inspection and the time until the command line shows the
first issue. `--junk` adds a file of the given MB of random bytes, and one that is a single line.
"""

import argparse
import json
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from benchmarks._chats import write_chats

OF_THE_DECODE = 0.7
TWO_OF_ONE = 1.6
MEMORY_MB = 80
FIRST_ISSUE_S = 1.0

WAYS: Final = ("decode", "one process", "two processes")


# -- run in their own processes ---------------------------------------------------------------


class Call(msgspec.Struct, frozen=True, gc=False):
    """Function name and arguments of a tool call."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A tool call."""

    id: str
    function: Call
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: Literal[0, 1] | None = None


class Function(msgspec.Struct, frozen=True, gc=False):
    """A function declaration."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True, gc=False):
    """A tool declaration."""

    function: Function
    type: Literal["function"] = "function"


class Row(msgspec.Struct, frozen=True, gc=False):
    """A chat."""

    messages: list[Message]
    tools: list[Tool] | None = None


def decode(path: Path) -> int:
    """Decode every line."""
    decoded = msgspec.json.Decoder(Row).decode
    rows = 0
    with path.open("rb", buffering=1 << 20) as file:
        for line in file:
            decoded(line)
            rows += 1
    return rows


def work(way: str, path: Path) -> None:
    """Run one variant and print its duration."""
    from training_backends.datasets.inspect import inspect_file  # noqa: PLC0415

    began = time.perf_counter()
    if way == "decode":
        rows = decode(path)
    else:
        file, _ = inspect_file(path, processes=WAYS.index(way))
        rows = file.rows if file else 0
    print(json.dumps({"seconds": time.perf_counter() - began, "rows": rows}))


# -- memory -----------------------------------------------------------------------------------


def held(pid: int) -> int:
    """Return the resident memory in bytes of a process and its children."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(held, children))


def run(way: str, path: Path, *, watched: bool = False) -> dict[str, Any]:
    """Run one variant in a fresh process; return its duration and peak memory."""
    command = [sys.executable, __file__, "--work", way, str(path)]
    if way == "nothing":
        command = [sys.executable, "-c", "print({}, flush=True); input()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        peak = 0
        while watched and not select.select([process.stdout], [], [], 0.004)[0]:
            peak = max(peak, held(process.pid))
        found: dict[str, Any] = json.loads(process.stdout.readline())
        if way == "nothing":
            peak = held(process.pid)
            process.communicate("\n")
        return found | {"peak": peak}


# -- the comparison ---------------------------------------------------------------------------


def compare(path: Path, rounds: int) -> None:
    """Alternate the variants and print their speed and memory."""
    size = path.stat().st_size / 1e6
    nothing = run("nothing", path)["peak"] / 1e6
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way in WAYS:
            took[way].append(run(way, path)["seconds"])
    # The first round loads the file into the page cache.
    took = {way: seconds[1:] for way, seconds in took.items()}
    print(f"\n{size:,.0f} MB of chats, {rounds} rounds; idle interpreter: {nothing:.0f} MB")
    for way, seconds in took.items():
        memory = run(way, path, watched=True)["peak"] / 1e6 - nothing
        speed = size / statistics.median(seconds)
        print(f"  {way:<14} {speed:6,.0f} MB/s   {memory:4.0f} MB above idle")
    tell("one process / decode", ratios(took["decode"], took["one process"]), OF_THE_DECODE)
    tell("two processes / one", ratios(took["one process"], took["two processes"]), TWO_OF_ONE)


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """Return the ratios of durations in the same round."""
    return [one / other for one, other in zip(slower, faster, strict=True)]


def tell(what: str, found: Sequence[float], target: float) -> None:
    """Print a ratio with its range and target."""
    middle = statistics.median(found)
    print(f"  {what:<22} {middle:.2f} ({min(found):.2f} to {max(found):.2f}), target {target}")


def repeat(path: Path, big: Path, size: int) -> None:
    """Write the rows repeatedly, each one unique, with an invalid third line."""
    lines = path.read_bytes().splitlines(keepends=True)
    mark = b'{"messages":[{"role":"user","content":"'
    rows = [line for line in lines if line.startswith(mark)]
    written = number = 0
    with big.open("wb", buffering=1 << 22) as file:
        while written < size:
            for row in rows:
                number += 1
                start = b'{"messages":[{"role":"robot","content":"' if number == 3 else mark
                written += file.write(b"%s%d %s" % (start, number, row[len(mark) :]))


def inspect_big(path: Path, size: int) -> None:
    """Inspect a file larger than memory."""
    big = path.with_name("big.jsonl")
    if shutil.disk_usage(path.parent).free < size * 1.2:
        print(f"  not enough disk space for {size / 1e9:.0f} GB in {path.parent}")
        return
    repeat(path, big, size)
    nothing = run("nothing", big)["peak"]
    print(f"\n{big.stat().st_size / 1e9:.1f} GB of chats, line 3 invalid")
    print(f"  first issue after {first_issue(big):.2f} s, target {FIRST_ISSUE_S:.0f} s")
    for way in WAYS[1:]:
        found = run(way, big, watched=True)
        speed = big.stat().st_size / 1e6 / found["seconds"]
        memory = (found["peak"] - nothing) / 1e6
        print(
            f"  {way:<14} {speed:6,.0f} MB/s   {memory:4.0f} MB above idle, "
            f"target {MEMORY_MB} MB   {found['rows']:,} rows"
        )


def inspect_junk(folder: Path, size: int) -> None:
    """Inspect files that are not training data."""
    print(f"\n{size / 1e6:,.0f} MB of junk")
    chance = random.Random(0)
    path = folder / "junk.jsonl"
    with path.open("wb") as file:
        for _ in range(size // 10**6):
            file.write(chance.randbytes(10**6))
    tell_of("random bytes", path)
    with path.open("wb") as file:
        file.truncate(size)
    tell_of("one line", path)


def tell_of(what: str, path: Path) -> None:
    """Print speed and memory of inspecting a file with one process."""
    nothing = run("nothing", path)["peak"]
    found = run("one process", path, watched=True)
    speed = path.stat().st_size / 1e6 / found["seconds"]
    memory = (found["peak"] - nothing) / 1e6
    print(f"  {what:<14} {speed:6,.0f} MB/s   {memory:4.0f} MB above idle")


def first_issue(path: Path) -> float:
    """Return the seconds until the command line shows the first issue."""
    command = [sys.executable, "-m", "training_backends", "data", "inspect", str(path)]
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        took = time.perf_counter() - began
        process.kill()
    if ":3:" not in line:
        sys.exit(f"unexpected output instead of the issue in line 3: {line}")
    return took


@contextmanager
def chats(size: int) -> Iterator[Path]:
    """Write the file to a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, size)
        yield path


def main() -> None:
    """Write the file and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=200, metavar="MB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--big", type=float, default=0, metavar="GB")
    parser.add_argument("--junk", type=int, default=0, metavar="MB")
    given = parser.parse_args()
    with chats(given.size * 10**6) as path:
        compare(path, given.rounds)
        if given.big:
            inspect_big(path, int(given.big * 1e9))
        if given.junk:
            inspect_junk(path.parent, given.junk * 10**6)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
