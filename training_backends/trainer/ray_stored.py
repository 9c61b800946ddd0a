"""Train a run of an object store, on nodes that share no storage.

The driver and each worker have a run directory of their own, on a disk of their node. Training
processes use theirs as they would a shared one; the worker that has started one exchanges its
content:

- The log, stop requests and how the run ended pass through the driver, by an actor of its node,
  see `DriverLink`. The driver copies its run directory to the store, see `rundir.stored`.
- Each worker uploads its share of a checkpoint, and the first one the result.
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeVar

from training_backends.core.backoff import Backoff
from training_backends.core.errors import BackendUnavailable, RunNotFound
from training_backends.core.files import hold_lock, make_private_directory, read_lines, write_atomic
from training_backends.rundir.checkpoints import best_step, step_of
from training_backends.rundir.directory import (
    CheckpointState,
    Event,
    ExitRecord,
    RunDir,
    TrainerExitCode,
)
from training_backends.rundir.stored import LogUpload, StoredRun
from training_backends.trainer.launch import Outcome
from training_backends.trainer.process import Launch, train

__all__ = ["Driver", "DriverLink", "Worker"]

T = TypeVar("T")

_PERIOD: Final = 2.0
"""Seconds between two uploads of the log; some stores take one write per second of an object."""
_EXCHANGE: Final = 1.0
"""Seconds between two exchanges of a worker with the driver."""
_START_PATIENCE: Final = 600.0
"""Seconds for which a run cannot begin without its store."""
_END_PATIENCE: Final = 6 * 3600.0
"""Seconds for which the end of a run waits for its store."""
_LOCK_PATIENCE: Final = 24 * 3600.0
"""Seconds to wait for another worker of the node, which downloads the same files."""
_POLL: Final = 0.1
"""Seconds."""
_TRACKING_PATIENCE: Final = 900.0
"""Seconds for trackers to report the end of the run; more than they try."""


def _scratch(url: str, given: str | None) -> Path:
    """Return this node's directory of a run."""
    root = given or Path(tempfile.gettempdir(), f"training-backends-{os.getuid()}")
    return Path(root, sha256(url.encode()).hexdigest()[:16])


def _run_in(node: Path, part: str, url: str) -> RunDir:
    return RunDir(node / part / url.rpartition("/")[2])


def _patiently(do: Callable[[], T], patience: float) -> T:
    """Repeat while the store is unavailable."""
    pauses, deadline = Backoff(1.0, 30.0), time.monotonic() + patience
    while True:
        try:
            return do()
        except BackendUnavailable as error:
            if time.monotonic() > deadline:
                raise
            _print(error)
        time.sleep(pauses.next())


def _print(error: Exception) -> None:
    print(error, file=sys.stderr, flush=True)  # noqa: T201  # the log of the job


@contextmanager
def _repeating(do: Callable[[], None], period: float) -> Iterator[None]:
    """Repeat in a thread during the block; errors are printed once until it succeeds again."""
    ended = threading.Event()

    def repeat() -> None:
        failing = False
        while not ended.wait(period):
            try:
                do()
                failing = False
            except Exception as error:  # the store, the driver or the disk; it is repeated
                if not failing:
                    _print(error)
                failing = True

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# -- the driver ------------------------------------------------------------------------


class Driver:
    """The program that Ray started for a run.

    Args:
        scratch: Directory of this node for runs in progress.
    """

    def __init__(self, url: str, scratch: str | None) -> None:
        self.url = url
        self._stored = StoredRun.at(url)
        self._run = _run_in(_scratch(url, scratch), "driver", url)
        self._logs = [
            LogUpload(self._stored.store, log) for log in (self._run.events, self._run.metrics)
        ]
        self._has_lock = False
        self._failed_at: float | None = None

    def drive(self, launch: Launch) -> TrainerExitCode:
        """Train, and copy what happens to the store."""
        run = self._run
        shutil.rmtree(run.path, ignore_errors=True)
        _patiently(self._prepare, _START_PATIENCE)
        try:
            with _repeating(self._exchange, _PERIOD):
                return train(run.path, launch)
        finally:
            _patiently(self._finish, _END_PATIENCE)
            self._clean()

    def _clean(self) -> None:
        patience = _TRACKING_PATIENCE if self._run.read_spec().integrations else 0
        with suppress(BlockingIOError), hold_lock(self._run.path / ".tracking.lock", patience):
            shutil.rmtree(self._run.path.parent, ignore_errors=True)

    def _prepare(self) -> None:
        self._stored.update(self._run)
        if not self._run.spec.is_file():
            raise RunNotFound(f"There is no run at {self.url}.")
        self._stored.fetch_tokens(self._run)
        self._stored.fetch_data(self._run)  # last: a repetition needs the spec as it was

    def store_tokens(self) -> None:
        """Upload the encoded rows, which all workers read."""
        _patiently(lambda: self._stored.store_tokens(self._run), _START_PATIENCE)

    def _exchange(self) -> None:
        try:
            self._push()
            if (request := self._stored.read_stop()) is not None and not self._run.stop.exists():
                write_atomic(self._run.stop, request)
        except BackendUnavailable:
            self._failed_at = self._failed_at or time.monotonic()
            raise
        if self._failed_at is not None:
            took = time.monotonic() - self._failed_at
            self._failed_at = None
            message = f"The object store was unavailable for {took:.0f} s; the run continued"
            self._run.add_event(Event(name="message", level="warning", message=message))

    def _push(self) -> None:
        for log in self._logs:
            log.push()
        if not self._has_lock and self._run.lock.stat().st_size:
            self._stored.write_lock(self._run)
            self._has_lock = True

    def _finish(self) -> None:
        self._push()
        if (record := self._run.read_exit()) is None:
            return
        if record.status == "completed":
            self._stored.reduce()
        elif not record.step:
            step = max(self._stored.checkpoints(), default=0)
            record = record.model_copy(update={"step": step})
        self._stored.finish(record)


class DriverLink:
    """The driver's run directory, for workers; an actor on its node."""

    def __init__(self, path: str) -> None:
        self._run = RunDir(Path(path))
        self._outcome = Outcome(self._run)

    def add(self, events: bytes, metrics: bytes) -> bytes | None:
        """Append lines to the logs; return the request to stop, if there is one."""
        for path, lines in ((self._run.events, events), (self._run.metrics, metrics)):
            if lines:
                with path.open("ab", buffering=0) as file:
                    file.write(lines)
        try:
            return self._run.stop.read_bytes()
        except FileNotFoundError:
            return None

    def report(self, record: ExitRecord) -> None:
        """Report how the run ended; the first report counts."""
        self._outcome.report(record)

    def outcome(self) -> ExitRecord | None:
        """Return how the run ended, if a worker has reported it."""
        return self._outcome.read()

    def limit_rows(self, rows: int) -> None:
        """Set the number of rows per forward pass of the processes that start next."""
        self._outcome.limit_rows(rows)

    def max_rows(self) -> int | None:
        """Return the number of rows per forward pass, if it was limited."""
        return self._outcome.max_rows()


# -- a worker --------------------------------------------------------------------------


class Worker:
    """A worker of Ray Train.

    Args:
        ask: Calls a method of the driver's `DriverLink`.
        patience: Seconds in which another worker reports why this one's process lost contact
            with it.
    """

    def __init__(
        self,
        url: str,
        scratch: str | None,
        *,
        rank: int,
        processes: int,
        ask: Callable[..., Any],
        patience: float = 10.0,
    ) -> None:
        self._node = _scratch(url, scratch)
        self._stored = StoredRun.at(url)
        self._rank = rank
        self._processes = processes
        self._ask = ask
        self._patience = patience
        self._fetched = _run_in(self._node, "fetched", url)
        """What the workers of this node share, and do not change."""
        self._run = _run_in(self._node, f"worker-{rank}", url)
        self._read = {self._run.events: 0, self._run.metrics: 0}
        """Bytes of the logs that the driver has."""
        self._uploaded: set[str] = set()
        self._valid: set[str] = set()
        """Names of checkpoints."""

    def work(self, run_process: Callable[[RunDir], int], broadcast: Callable[[Any], Any]) -> bool:
        """Train; return whether it is known how the run ended.

        Args:
            run_process: Runs a training process; returns its exit code.
            broadcast: Returns the first worker's value in every worker.
        """
        if not self._prepare(broadcast):
            return True  # a process before this one has reported it
        outcome = Outcome(self._run)
        outcome.directory.mkdir()
        if (rows := self._ask("max_rows")) is not None:
            outcome.limit_rows(rows)
        with _repeating(self._exchange, _EXCHANGE), _repeating(self._upload, _EXCHANGE):
            code = run_process(self._run)
        record = outcome.read()
        has_failed = record.status == "failed" if record else code != TrainerExitCode.DONE
        if record is not None and has_failed:
            self._ask("report", record)  # before the others give up waiting for it
        if has_failed:
            self._save_what_is_left()
        else:
            _patiently(lambda: self._finish(record), _END_PATIENCE)
        if (limit := outcome.max_rows()) not in {None, rows}:
            self._ask("limit_rows", limit)
        if record is not None and not has_failed:
            self._ask("report", record)
        if has_failed and not self._was_reported():
            return False
        self._clean()
        return True

    def _was_reported(self) -> bool:
        """Return whether another worker has reported how the run ended."""
        deadline = time.monotonic() + self._patience
        while self._ask("outcome") is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    # -- before ------------------------------------------------------------------------

    def _prepare(self, broadcast: Callable[[Any], Any]) -> bool:
        """Make this process's run directory, with the checkpoint to continue from.

        Returns:
            Whether the run has not ended yet.
        """
        shutil.rmtree(self._run.path, ignore_errors=True)
        chosen = None
        if self._rank == 0 and self._ask("outcome") is None:
            chosen = _patiently(self._choose, _START_PATIENCE)
        steps: Sequence[int] | None = broadcast(chosen)
        if steps is None:
            return False
        _patiently(self._fetch, _START_PATIENCE)
        with self._alone():
            for path in self._fetched.checkpoints.glob("step-*"):
                if step_of(path) not in steps:
                    shutil.rmtree(path)
            for step in steps:
                _patiently(partial(self._fetch_checkpoint, step), _START_PATIENCE)
            self._link(steps)
        return True

    def _alone(self) -> AbstractContextManager[None]:
        make_private_directory(self._node)
        return hold_lock(self._node / "lock", _LOCK_PATIENCE)

    def _fetch(self) -> None:
        with self._alone():
            self._stored.update(self._fetched)
            self._stored.fetch_tokens(self._fetched)

    def _choose(self) -> list[int]:
        """Return the step of the newest checkpoint, and of the best one if that is needed."""
        self._fetch()
        found = self._stored.checkpoints()
        # What a process has left half written must not be mixed with what the next one writes.
        self._stored.remove_checkpoints(set(self._stored.steps()) - set(found))
        return sorted({*[*found][-1:], *self._best(found)})

    def _best(self, found: Mapping[int, CheckpointState]) -> list[int]:
        keeps = self._fetched.read_spec().result_checkpoint == "best"
        best = best_step(found.values()) if keeps else None
        return [] if best is None else [best]

    def _fetch_checkpoint(self, step: int) -> None:
        state = self._stored.checkpoints()[step]
        fetch = partial(self._stored.fetch_checkpoint, step, state, self._fetched)
        if reason := fetch() and fetch():  # the first time, it may have been the copy
            self._stored.remove_checkpoints([step])
            message = f"Checkpoint step-{step} is damaged: {reason}. Removed it."
            event = Event(name="message", level="warning", message=message)
            self._ask("add", f"{event.model_dump_json()}\n".encode(), b"")
            raise RuntimeError(message)

    def _link(self, steps: Sequence[int]) -> None:
        run, fetched = self._run, self._fetched
        make_private_directory(run.path)
        shutil.copyfile(fetched.spec, run.spec)
        for log in self._read:
            with suppress(FileNotFoundError):
                shutil.copyfile(fetched.path / log.name, log)
                self._read[log] = log.stat().st_size
        run.tokens.symlink_to(fetched.tokens)
        for step in steps:
            name = f"step-{step}"
            shutil.copytree(
                fetched.checkpoints / name, run.checkpoints / name, copy_function=os.link
            )
            self._uploaded.add(name)
            self._valid.add(name)

    # -- meanwhile ---------------------------------------------------------------------

    def _exchange(self) -> None:
        """Pass the log to the driver, and a request to stop to the training process."""
        # The others' directories have no log.
        lines = {log: _lines(log, offset) for log, offset in self._read.items()}
        request = self._ask("add", *lines.values())
        for log, added in lines.items():
            self._read[log] += len(added)
        if request is not None and not self._run.stop.exists():
            write_atomic(self._run.stop, request)

    def _upload(self) -> None:
        """Upload this process's share of new checkpoints; the first worker makes them valid."""
        for path, _ in self._run.read_checkpoints():
            if path.name in self._uploaded:
                continue
            try:
                self._stored.store_share(path, self._rank)
            except (FileNotFoundError, RunNotFound):
                if path.exists():
                    raise
                continue  # newer ones have replaced it
            self._uploaded.add(path.name)
        if self._rank:
            return
        for name in sorted(self._uploaded - self._valid, key=lambda name: step_of(Path(name))):
            if self._stored.complete_checkpoint(self._run.checkpoints / name, self._processes):
                self._valid.add(name)
                self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that are not kept, and incomplete ones before those."""
        found = self._stored.checkpoints()
        newest = [*found][-self._fetched.read_spec().keep_checkpoints :]
        kept = {*newest, *self._best(found)}
        # As long as there are fewer, the shares of an incomplete one may be on their way.
        if len(newest) == self._fetched.read_spec().keep_checkpoints:
            self._stored.remove_checkpoints(
                step for step in self._stored.steps() if step < newest[0] and step not in kept
            )

    # -- afterwards --------------------------------------------------------------------

    def _finish(self, record: ExitRecord | None) -> None:
        """Upload everything that the training process has left; repeat after an error."""
        self._exchange()
        self._upload()
        newest = [path.name for path, _ in self._run.read_checkpoints()][-1:]
        while self._rank == 0 and not self._valid.issuperset(newest):
            if self._ask("outcome") is not None:
                break  # another process has failed, perhaps without its share
            time.sleep(_POLL)
            self._upload()
        self._upload()  # shares of earlier checkpoints may have come before the last one
        if record is not None and record.status == "completed":
            self._stored.store_result(self._run)

    def _save_what_is_left(self) -> None:
        """Upload what a process has left that died, without waiting for anything."""
        try:
            self._exchange()
            self._upload()
        except Exception as error:
            _print(error)

    def _clean(self) -> None:
        """Remove what the run has left on this node."""
        shutil.rmtree(self._run.path.parent, ignore_errors=True)
        with self._alone():
            if not any(self._node.glob("worker-*")):
                shutil.rmtree(self._fetched.path.parent, ignore_errors=True)


def _lines(path: Path, offset: int) -> bytes:
    """Return the complete lines after an offset."""
    return b"".join(line for line, _ in read_lines(path, offset))
