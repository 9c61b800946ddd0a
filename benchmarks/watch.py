"""Compare watching many live runs from one process with one GET per run.

    python benchmarks/watch.py [RUNS] [SWEEPS] [SECONDS]

A server of the Mistral protocol in its own process (`_watch_stub.py`) has RUNS live jobs and twice
as many finished ones. Every 100 s about a tenth of the live jobs change: most reach a checkpoint,
some a new status. Another process writes RUNS runs to a store and observes each one once. Then
this process watches: it sweeps every SECONDS (10) and receives events. Afterwards, with the same
server idle, the official SDK and bare httpx request single jobs, each in a fresh process; their
figures are extrapolated from SAMPLE jobs.

CPU is that of the client process with all its threads, including the store. Memory is the resident
memory above that with everything imported and the store open. A delay is the time from the change
on the server until the event callback is called.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio import to_thread
from pydantic import SecretStr

from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.client.client import AsyncTrainingClient
from training_backends.core.backend import CredentialSource
from training_backends.core.concurrency import run_all
from training_backends.core.config import TrainingConfig
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.store import RunStore

HANDFUL = 10
"""Extra requests allowed per sweep, for partially filled pages of each status."""
CHANGED_A_SECOND = 1 / 1000
"""Fraction of the runs."""
SAMPLE = 500
CONFIG = {"model": "open-mistral-7b", "data": {"train": "/data/train.jsonl"}}


class NoSecret(CredentialSource):
    """Returns the same key for every provider."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the key."""
        del provider, profile
        return SecretStr("no-key")


class AlwaysDue(MistralAPIBackend):
    """The backend with every run due in every sweep."""

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Zero."""
        return timedelta(0), timedelta(0)


def backend(url: str) -> AlwaysDue:
    """Create the backend under test."""
    return AlwaysDue(credentials=NoSecret(), settings=MistralSettings(base_url=url))


@contextmanager
def provider(runs: int) -> Iterator[str]:
    """Run the server; yield its URL."""
    command = [sys.executable, str(Path(__file__).with_name("_watch_stub.py")), str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def control(url: str, what: str) -> Any:
    """Call a control endpoint of the server, which is not part of the protocol."""
    return httpx.get(f"{url}/control/{what}", timeout=60).json()


# -- run in their own processes -----------------------------------------------------------


def seed(url: str, home: str) -> None:
    """Store every live job as a run that was launched here and observed once."""
    store = RunStore(f"sqlite:///{home}/runs.db")
    observer = backend(url)
    config = TrainingConfig.model_validate(CONFIG)

    async def record(job_id: str, created: int) -> None:
        run = TrainingRun(
            id=f"run-{job_id[:8]}",
            backend="mistral",
            config=config,
            remote_id=job_id,
            created_at=datetime.fromtimestamp(created, UTC),
        )
        seen = await observer.observe(run)
        await to_thread.run_sync(store.insert, run)
        await to_thread.run_sync(
            lambda: store.observed(
                run.id, lambda it: it.updated(seen.state), after=None, cursor=seen.cursor
            )
        )

    async def all_of_them() -> None:
        jobs = control(url, "jobs")
        await run_all((partial(record, job[0], job[2]) for job in jobs), at_once=4)
        await observer.aclose()

    anyio.run(all_of_them)
    store.close()


def one_by_one(get: Callable[[str], object], ids: list[str]) -> None:
    """Request each job separately and print the time per job as JSON."""
    for job_id in ids[:20]:
        get(job_id)
    cpu, wall = time.process_time(), time.perf_counter()
    for job_id in ids:
        get(job_id)
    took = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps({name: value / len(ids) for name, value in took.items()}))


def ask_by_sdk(url: str) -> None:
    """Request jobs with the official SDK, as its documentation does."""
    from mistralai.client import Mistral  # noqa: PLC0415  # heavy, and only this mode needs it

    client = Mistral(api_key="no-key", server_url=url)
    ids = [job[0] for job in control(url, "jobs")[:SAMPLE]]
    one_by_one(lambda job_id: client.fine_tuning.jobs.get(job_id=job_id), ids)


def ask_by_httpx(url: str) -> None:
    """Request jobs with httpx alone and only parse the response."""
    ids = [job[0] for job in control(url, "jobs")[:SAMPLE]]
    with httpx.Client(base_url=f"{url}/v1/fine_tuning/jobs/") as client:
        one_by_one(lambda job_id: client.get(job_id).json(), ids)


MODES: dict[str, Callable[..., None]] = {
    "--seed": seed,
    "--sdk": ask_by_sdk,
    "--httpx": ask_by_httpx,
}


def child(*arguments: str) -> str:
    """Run this program in another mode and return its output."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


# -- watching -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SweepCost:
    """The cost of one sweep."""

    lists: int
    details: int
    cpu: float
    wall: float
    memory: float
    """Megabytes above idle, right after the sweep."""
    ended: float


@dataclass(slots=True)
class Watched:
    """The results of watching."""

    sweeps: list[SweepCost] = field(default_factory=list)
    events: list[tuple[str, str, float]] = field(default_factory=list)
    """Job, step or status, and time of delivery, for each event."""


async def watch(url: str, home: str, runs: int, sweeps: int, seconds: float) -> Watched:
    """Watch for some sweeps while jobs change, then until all events are delivered."""
    found = Watched()

    async def on_event(run: TrainingRun, record: LogRecord) -> None:
        what = record.fields.get("raw_status") if record.source == "status" else record.step
        found.events.append((str(run.remote_id), str(what), time.monotonic()))

    watched = backend(url)
    async with AsyncTrainingClient(
        home=Path(home), credentials=NoSecret(), backends={"mistral": watched}
    ) as client:
        await client.list(backend="none")  # opens the store
        watcher = client.watcher(on_event=on_event)
        idle = resident()
        next_at = time.monotonic()
        for number in range(sweeps + 3):
            if number == 1:  # the first sweep reads all records from the store
                control(url, f"rate?value={max(runs * CHANGED_A_SECOND, 1)}")
            if number == sweeps + 1:
                control(url, "rate?value=0")
            await anyio.sleep(max(next_at - time.monotonic(), 0))
            next_at = time.monotonic() + seconds
            before = control(url, "counts")
            cpu, began = time.process_time(), time.monotonic()
            await watcher.sweep()
            ended = time.monotonic()
            cpu = time.process_time() - cpu
            after = control(url, "counts")
            lists, details = (after[name] - before[name] for name in ("lists", "details"))
            above = (resident() - idle) / 1e6
            found.sweeps.append(SweepCost(lists, details, cpu, ended - began, above, ended))
        await watched.aclose()
    return found


def resident() -> int:
    """Return the resident memory of this process in bytes; 0 on other systems than Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    held = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(held[1]) * 1024 if held else 0


# -- output -------------------------------------------------------------------------------


def report(
    found: Watched, changes: list[tuple[str, str, float]], runs: int, seconds: float
) -> None:
    """Print the cost of watching and whether the targets are met."""
    measured = found.sweeps[1:-2]
    ends = [sweep.ended for sweep in found.sweeps[:-2]]
    changed = sum(
        len({job for job, _, at in changes if begin < at <= end}) for begin, end in pairwise(ends)
    )
    count = len(measured)
    requests = sum(sweep.lists + sweep.details for sweep in measured)
    lists, details = (
        statistics.mean(values)
        for values in zip(*((sweep.lists, sweep.details) for sweep in measured), strict=True)
    )
    allowed = count * (runs / 100 + HANDFUL) + changed
    print(f"{runs:,} live runs, {count} sweeps, one every {seconds:g} s; mean per sweep\n")
    row("changed runs", f"{changed / count:.1f}")
    row("requests", f"{requests / count:.1f}", f"{lists:.1f} lists, {details:.1f} details")
    cpu = sorted(sweep.cpu for sweep in measured)
    row("CPU seconds", f"{statistics.mean(cpu):.2f}", f"{cpu[0]:.2f} to {cpu[-1]:.2f}")
    wall = sorted(sweep.wall for sweep in measured)
    row("wall seconds", f"{statistics.mean(wall):.2f}", f"max {wall[-1]:.2f}")
    first, last = found.sweeps[0], measured[-1]
    row("first sweep: CPU seconds", f"{first.cpu:.2f}", "reads all records from the store")
    row("memory after that, MB", f"{first.memory:.0f}", "above idle")
    half = measured[count // 2].memory
    row(
        "memory at the end, MB",
        f"{last.memory:.0f}",
        f"{last.memory - half:+.1f} in the second half",
    )
    times = Counter((job, what) for job, what, _ in found.events)
    moments = {(job, what): at for job, what, at in reversed(found.events)}
    delays = sorted(moments[job, what] - at for job, what, at in changes if (job, what) in moments)
    missing, twice = len(changes) - len(delays), sum(n > 1 for n in times.values())
    p50, p95 = (delays[int(len(delays) * share)] for share in (0.5, 0.95))
    row("detection delay, s", f"{p50:.1f}", f"p95 {p95:.1f}, max {delays[-1]:.1f}")
    row("events delivered", f"{len(found.events)}", f"{missing} missing, {twice} duplicated")
    print()
    goal(
        requests <= allowed,
        f"requests: at most 1 per 100 runs, 1 per changed run and {HANDFUL} more",
    )
    goal(not missing and not twice, "each event delivered once")
    goal(delays[-1] <= 2 * (seconds + wall[-1]), "every change reported within two sweeps")


def compare(url: str, runs: int, watched: float) -> None:
    """Print the cost of requesting each run separately."""
    print(f"\nOne GET per run, extrapolated from {min(SAMPLE, runs)} jobs\n")
    print(f"  {'':<28}{'requests':>10}{'CPU s':>8}{'× ours':>8}{'wall s':>8}")
    for name, mode in (("official SDK, sync", "--sdk"), ("httpx, sync", "--httpx")):
        took = json.loads(child(mode, url))
        cpu, wall = took["cpu"] * runs, took["wall"] * runs
        print(f"  {name:<28}{runs:>10,}{cpu:>8.2f}{cpu / watched:>8.1f}{wall:>8.1f}")


def row(name: str, value: str, note: str = "") -> None:
    """Print one figure."""
    print(f"  {name:<28}{value:>10}   {note}".rstrip())


def goal(met: bool, what: str) -> None:  # noqa: FBT001  # reads like assert
    """Print whether a target is met."""
    print(f"  {'yes' if met else 'NO ':<4} {what}")


def arguments(
    runs: str = "10000", sweeps: str = "10", seconds: str = "10"
) -> tuple[int, int, float]:
    """Parse the command line."""
    return int(runs), int(sweeps), float(seconds)


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] and sys.argv[1] in MODES:
        MODES[sys.argv[1]](*sys.argv[2:])
        return
    runs, sweeps, seconds = arguments(*sys.argv[1:])
    with tempfile.TemporaryDirectory() as home, provider(runs) as url:
        began = time.perf_counter()
        child("--seed", url, home)
        print(
            f"{runs:,} runs stored and observed once in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        found = anyio.run(watch, url, home, runs, sweeps, seconds)
        report(found, control(url, "changes"), runs, seconds)
        compare(url, runs, statistics.mean(sweep.cpu for sweep in found.sweeps[1:-2]))


if __name__ == "__main__":
    main()
