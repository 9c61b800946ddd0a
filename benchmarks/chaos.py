"""Launch runs under fault injection and count what goes wrong.

    python benchmarks/chaos.py [--backend mistral|openai|azure|together]
        [--seed N] [--only KIND]... [--trial TEXT] [--python PATH] [--jobs 2] [--few]

A trial is one run: `training-backends launch CONFIG --id ID --yes`, in its own home and through a
proxy in front of a server, is repeated until it succeeds; then `wait` must report the run as
completed. Meanwhile requests are broken in various ways, or the process is killed. In every case
there must be exactly one job, started once, with each file uploaded once, and nothing else: no
second job, no job that was never started, no partial file.

Client and server are real processes. For mistral, the server is the installed program's gateway
with a backend that finishes in a fraction of a second, except for the kind `engine`, which trains
a real model. For the others it is a scripted provider, which does what its protocol says: it
tolerates no repeated request.

Exits with 0 if nothing was duplicated, lost, left behind or hung. The directories of failed trials
are kept: the output of each command and the requests that the proxy recorded.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import anyio

from benchmarks._chaos_plan import KINDS, Clean, Trial, few, planned
from benchmarks._chaos_proxy import Proxy, Seen
from benchmarks._chaos_site import (
    SITES,
    Server,
    Site,
    environment,
    install_quick_backend,
)

_MOST_COMMANDS: Final = 15
_COMMAND_LIMIT: Final = 90.0
"""Seconds; far more than the sum of the client's timeouts. A longer command counts as a hang."""
_REPORT_EVERY: Final = 15.0
"""Seconds."""
_TIMEOUTS: Final = {
    "CONNECT_TIMEOUT": "1.5",
    "READ_TIMEOUT": "1.5",
    "WRITE_TIMEOUT": "1.5",
    "UPLOAD_TIMEOUT": "1.5",
    "CALL_TIMEOUT": "6",
    "ATTEMPTS": "3",
    "POLL_MIN": "0.05",
    "POLL_MAX": "0.2",
    "SETTLE_TIMEOUT": "4",
}
"""Short timeouts, so that they expire in seconds instead of minutes. Only the wait for a lost
create is longer than the proxy may delay it."""
_REPEATABLE: Final = {0, 8, -signal.SIGKILL}
"""Exit codes after which a user would repeat the command: success, unavailable, killed."""

Verdict = Literal["duplicate", "lost", "orphan", "hang", "exit code"]
_VERDICTS: Final[Sequence[Verdict]] = ("duplicate", "lost", "orphan", "hang", "exit code")


@dataclass(slots=True)
class Result:
    """The outcome of a trial.

    Attributes:
        cancelled: Number of second jobs, which were cancelled.
        seen: Every request.
        launched: Number of them when the launch had succeeded.
    """

    trial: Trial
    faults: int = 0
    cancelled: int = 0
    codes: list[int] = field(default_factory=list)
    problems: list[tuple[Verdict, str]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    launched: int = 0


# -- one trial -------------------------------------------------------------------------------


class Run:
    """The client's side of one trial: its home, its data, its commands."""

    def __init__(self, work: Path, folder: Path, site: Server, proxy: Proxy) -> None:
        folder.mkdir()
        self.folder = folder
        self.id = f"run-{folder.name}"
        self._site = site
        self._proxy = proxy
        self._work = work
        self._commands = 0
        # Content unique to this trial, large enough to be interrupted halfway through the upload.
        rows = {"train": 1200, "validation": 40}
        self.digests = [self._write_data(name, count) for name, count in rows.items()]
        (folder / "run.yaml").write_text(
            f"backend: {site.backend}\n{site.config}"
            "data:\n  train: train.jsonl\n  validation: validation.jsonl\n"
        )

    def _write_data(self, name: str, rows: int) -> str:
        lines = []
        for number in range(rows):
            question = f"{self.folder.name}: what is {number} plus {number}?"
            answer = f"It is {number + number}."
            turns = (("user", question), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.append(json.dumps({"messages": messages}) + "\n")
        content = "".join(lines).encode()
        (self.folder / f"{name}.jsonl").write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    async def launch(self, write: str | None = None, *, killable: bool = True) -> int | None:
        """Run `launch` once; return its exit code, or None if it hung."""
        arguments = ["launch", "run.yaml", "--id", self.id, "--yes", "--json"]
        code, _ = await self._command(arguments, write, killable=killable)
        return code

    async def wait(self, write: str | None = None) -> tuple[int | None, dict[str, Any]]:
        """Run `wait`; return its exit code and the run that it printed."""
        code, output = await self._command(["wait", self.id, "--timeout", "60", "--json"], write)
        found = json.loads(output)[0] if code == 0 else {}
        return code, found

    async def log(self) -> list[dict[str, Any]]:
        """Return the run's log as the command line prints it."""
        _, output = await self._command(["logs", self.id, "--json"])
        return [json.loads(line) for line in output.splitlines()]

    async def _command(
        self, arguments: Sequence[str], write: str | None = None, *, killable: bool = True
    ) -> tuple[int | None, str]:
        section = f"TRAINING_BACKENDS_{self._site.backend.upper()}"
        settings = {f"{section}__{name}": value for name, value in _TIMEOUTS.items()}
        settings |= self._site.settings(self._proxy.url)
        settings["TRAINING_BACKENDS_LOG_LEVEL"] = "info"
        program = [self._site.python, "-m", "training_backends"]
        if write is not None:
            program[-1] = "benchmarks._chaos_power"
            settings["CHAOS_WRITE"] = write
        self._commands += 1
        out = self.folder / f"{self._commands}.out"
        with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
            process = await anyio.open_process(
                [*program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.folder,
                env=environment(self._work, self.folder / "home", **settings),
            )
            if killable:
                self._proxy.kill_client = process.kill
            code = None
            with anyio.move_on_after(_COMMAND_LIMIT):
                code = await process.wait()
            if code is None:
                process.kill()
                await process.wait()
        return code, out.read_text()


async def run_trial(trial: Trial, work: Path, folder: Path, site: Server) -> Result:
    """Run one trial and audit the result."""
    result = Result(trial)
    proxy = Proxy(lambda: site.port, stop_server=site.kill, seed=trial.name)
    proxy.plan.extend(trial.injections)
    proxy.lag = trial.lag
    async with proxy.serving():
        run = Run(work, folder, site, proxy)
        await _launch(trial, run, result)
        result.launched = len(proxy.seen)
        proxy.plan.clear()
        await proxy.nothing_held()
        await site.ready()
        result.faults += proxy.injected
        result.seen = proxy.seen
        if trial.wait_write is not None:
            code, _ = await run.wait(trial.wait_write)
            result.faults += code == -signal.SIGKILL
        code, document = await run.wait()
        if code != 0 or document.get("status") != "completed":
            result.problems.append(("lost", f"wait: {code}, {document.get('status')}"))
        await _audit_run(site, run, document.get("remote_id"), result)
        if trial.kind == "wait":
            result.problems += _audit_log(await run.log())
    if trial.kind not in {"late", "doubt"}:
        result.problems += _audit_requests(result.seen, run.digests, site.create)
    (folder / "seen.txt").write_text("".join(f"{one}\n" for one in result.seen))
    return result


async def _launch(trial: Trial, run: Run, result: Result) -> None:
    """Repeat the command until it succeeds."""
    writes = iter(trial.writes)
    for turn in range(_MOST_COMMANDS):
        if trial.twins and turn == 0:
            codes = await _launch_twice(run)
        else:
            codes = [await run.launch(next(writes, None))]
        result.faults += bool(trial.writes) and codes == [-signal.SIGKILL]
        for code in codes:
            if code is None:
                result.problems.append(("hang", f"launch took more than {_COMMAND_LIMIT:g} s"))
                return
            if code not in {*_REPEATABLE, *result.codes}:
                result.problems.append(("exit code", f"launch exited with {code}"))
            result.codes.append(code)
        if 0 in codes:
            return
        if len(result.problems) and result.codes.count(result.codes[-1]) > 2:
            break  # the same exit code three times: not transient
    result.problems.append(("lost", f"none of {len(result.codes)} launches succeeded"))


async def _launch_twice(run: Run) -> list[int | None]:
    """Launch twice concurrently; only the first launch can be killed."""
    codes: list[int | None] = []

    async def first() -> None:
        codes.append(await run.launch())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await anyio.sleep(0.1)
        second = await run.launch(killable=False)
    return [*codes, second]


async def _audit_run(site: Server, run: Run, job_id: str | None, result: Result) -> None:
    """Check what the server itself has for a run."""
    problems = result.problems
    mine: set[str | None] = set()
    books = await site.books()
    for digest in run.digests:
        found = [file.id for file in books.files if digest.startswith(file.sha256)]
        mine |= {*found}
        if not found:
            problems.append(("lost", "a file is missing"))
        if len(found) > 1:
            problems.append(("duplicate", f"a file exists {len(found)} times"))
    jobs = [job for job in books.jobs if mine & set(job.files)]
    if not jobs:
        problems.append(("lost", "there is no job"))
    for job in jobs:
        if job.id == job_id:
            if not job.trained:
                problems.append(("lost", f"the run's job is {job.status}"))
        elif result.trial.doubles and job.cancelled:
            result.cancelled += 1
        else:
            problems.append(("orphan", f"a job ({job.status}) that the run does not know"))
    if len(jobs) - result.cancelled > 1:
        statuses = ", ".join(job.status for job in jobs)
        problems.append(("duplicate", f"there are {len(jobs)} jobs: {statuses}"))
    problems += [("orphan", f"{each} is left on the server") for each in books.leftovers]


def _audit_requests(
    seen: Iterable[Seen], digests: Sequence[str], create: str
) -> list[tuple[Verdict, str]]:
    """Look for repeated requests, which a gateway tolerates and therefore hides."""
    done = [one for one in seen if one.method == "POST" and one.status is not None]
    problems: list[tuple[Verdict, str]] = []
    for digest in digests:
        uploads = [one for one in done if one.content == digest]
        if len(uploads) > 1:
            problems.append(("duplicate", f"a file was uploaded {len(uploads)} times"))
    creates = [one for one in done if one.name == create]
    starts = [one for one in done if one.path.endswith("/start")]
    for what, asked in (("create", creates), ("start", starts)):
        if len(asked) > 1:
            statuses = ", ".join(str(one.status) for one in asked)
            problems.append(("duplicate", f"{what} reached the server more than once: {statuses}"))
    return problems


def _audit_log(records: Sequence[Mapping[str, Any]]) -> list[tuple[Verdict, str]]:
    """Look for duplicate and missing log records."""
    problems: list[tuple[Verdict, str]] = []
    counts = Counter((one["at"], one["source"], one["message"], one["step"]) for one in records)
    problems += [("duplicate", f"duplicate log record: {key}") for key in counts if counts[key] > 1]
    if len({one["cursor"] for one in records}) < len(records):
        problems.append(("duplicate", "two log records have the same cursor"))
    if not any(one["fields"].get("status") == "completed" for one in records):
        problems.append(("lost", "the log has no record of the end"))
    return problems


async def _audit_site(site: Server, results: Sequence[Result]) -> list[tuple[Verdict, str]]:
    """Check the totals of a server: one job, one training and two files per run."""
    books, runs = await site.books(), len(results)
    found = {
        "jobs": len(books.jobs) - sum(one.cancelled for one in results),
        "successful jobs": sum(job.trained for job in books.jobs),
        "pairs of files": len(books.files) / 2,
    }
    wrong: list[tuple[Verdict, str]] = [
        ("orphan" if number > runs else "lost", f"{number:g} {what} for {runs} runs")
        for what, number in found.items()
        if number != runs
    ]
    faults = sum(one.faults for one in results)
    if books.unfinished > faults:
        wrong.append(("orphan", f"{books.unfinished} unfinished uploads after {faults} faults"))
    return wrong


# -- all trials ------------------------------------------------------------------------------


class Bench:
    """Runs trials concurrently and reports progress."""

    def __init__(self, work: Path, wire: str, *, jobs: int, python: str) -> None:
        self._work = work
        self._python = python
        self._wire = wire
        self._jobs = jobs
        self._began = time.monotonic()
        self._reported_at = self._began
        self._number = 0
        self.results: list[Result] = []
        self.unfinished = 0

    async def measure(self) -> Clean:
        """Launch and wait without faults, to count requests and writes.

        Raises:
            RuntimeError: The launch failed.
        """
        site = SITES[self._wire](self._work, "clean", python=self._python)
        launches, waits = self._work / "launch-writes", self._work / "wait-writes"
        async with site.serving():
            trial = Trial(
                "clean", "no fault", writes=(f"count:{launches}",), wait_write=f"count:{waits}"
            )
            result = await run_trial(trial, self._work, self._work / "trial-clean", site)
        if result.problems or result.codes != [0]:
            raise RuntimeError(f"a launch without faults failed: {result.codes} {result.problems}")
        requests = result.seen[: result.launched]
        writes, wait_writes = int(launches.read_text()), int(waits.read_text())
        return Clean(requests, writes, wait_writes, site.create)

    async def run(self, trials: Sequence[Trial], group: str) -> None:
        """Run trials; each worker has its own server."""
        waiting = iter(trials)
        async with anyio.create_task_group() as tasks:
            for worker in range(min(self._jobs, len(trials))):
                name = f"{group}-{worker}"
                site = SITES[self._wire](self._work, name, python=self._python)
                if group == "engine":
                    site = Site(self._work, name, python=self._python, backend="local")
                tasks.start_soon(self._work_through, waiting, site)

    async def _work_through(self, waiting: Iterator[Trial], site: Server) -> None:
        done: list[Result] = []
        async with site.serving():
            for trial in waiting:
                self._number += 1
                folder = self._work / f"trial-{self._number:04}"
                result = await run_trial(trial, self._work, folder, site)
                self._finished(result, folder)
                done.append(result)
            self.unfinished += (await site.books()).unfinished
            if site.home.name.startswith("late") or any(result.problems for result in done):
                return
            for verdict, text in await _audit_site(site, done):
                print(f"  {verdict}: {site.home.name}: {text}")
                done[-1].problems.append((verdict, text))

    def _finished(self, result: Result, folder: Path) -> None:
        self.results.append(result)
        if result.problems:
            print(f"  {result.trial.kind}: {result.trial.name}: exit codes {result.codes}")
            for verdict, text in result.problems:
                print(f"    {verdict}: {text}")
            print(f"    kept in {folder}")
        else:
            shutil.rmtree(folder)
        now = time.monotonic()
        if now - self._reported_at > _REPORT_EVERY:
            self._reported_at = now
            faults = sum(one.faults for one in self.results)
            wrong = sum(bool(one.problems) for one in self.results)
            print(
                f"{now - self._began:5.0f} s  {len(self.results)} trials done, {faults} faults, "
                f"{wrong} trials failed"
            )

    def report(self) -> bool:
        """Print the summary; return whether all trials passed."""
        head = ("kind", "trials", "faults", "not hit", "commands", "max")
        print(f"\n{head[0]:<12}" + "".join(f"{word:>10}" for word in (*head[1:], *_VERDICTS)))
        kinds = dict.fromkeys(result.trial.kind for result in self.results)
        for kind in kinds:
            print(_row(kind, [one for one in self.results if one.trial.kind == kind]))
        print(_row("all", self.results))
        cancelled = sum(one.cancelled for one in self.results)
        if cancelled or self.unfinished:
            print(f"{cancelled} second jobs cancelled, {self.unfinished} uploads left to expire")
        passed = not any(result.problems for result in self.results)
        minutes = (time.monotonic() - self._began) / 60
        print(f"\n{'PASS' if passed else 'FAIL'} after {minutes:.1f} minutes")
        return passed


def _row(name: str, results: Sequence[Result]) -> str:
    verdicts = Counter(verdict for one in results for verdict, _ in one.problems)
    commands = [len(one.codes) for one in results]
    cells = (
        f"{len(results)}",
        f"{sum(one.faults for one in results)}",
        f"{sum(not one.faults for one in results)}",
        f"{sum(commands) / len(results):.1f}",
        f"{max(commands)}",
        *(f"{verdicts[verdict]}" for verdict in _VERDICTS),
    )
    return f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells)


async def _bench(options: argparse.Namespace, work: Path) -> bool:
    install_quick_backend(work)
    bench = Bench(work, options.backend, jobs=options.jobs, python=options.python)
    clean = await bench.measure()
    print(
        f"A launch makes {len(clean.requests)} requests and writes to its store {clean.writes} "
        f"times; `wait` then writes {clean.wait_writes} times."
    )
    for number, request in enumerate(clean.requests):
        print(f"  {number:2} {request.name}")
    hosted = options.backend != "mistral"
    trials = list(few(clean, hosted=hosted))
    if not options.few:
        trials = planned(options.seed, clean, hosted=hosted)
    wanted = [
        trial
        for trial in trials
        if (not options.only or trial.kind in options.only) and options.trial in trial.name
    ]
    print(f"{len(wanted)} trials, {options.jobs} at a time")
    groups = {
        "quick": [one for one in wanted if not one.engine and one.kind not in {"late", "doubt"}],
        "late": [one for one in wanted if one.kind in {"late", "doubt"}],
        "engine": [one for one in wanted if one.engine],
    }
    for group, chosen in groups.items():
        await bench.run(chosen, group)
    return bool(bench.results) and bench.report()


def main() -> None:
    """Run the trials selected on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--backend", choices=list(SITES), default="mistral", help="the protocol to launch over"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random trials")
    parser.add_argument(
        "--only", action="append", choices=KINDS, help="run only this kind of fault (repeatable)"
    )
    parser.add_argument("--trial", default="", help="run only trials whose name contains this text")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that starts clients and servers"
    )
    parser.add_argument("--jobs", type=int, default=2, help="concurrent trials")
    parser.add_argument(
        "--few", action="store_true", help="run only a few trials, at the most critical points"
    )
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    passed = False
    try:
        passed = anyio.run(_bench, options, work)
    finally:
        if passed:
            shutil.rmtree(work)
        else:
            print(f"Files kept in {work}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
