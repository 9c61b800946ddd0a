"""Checks that every backend must pass, for any test runner.

A backend's tests provide a `Subject`. Its back door changes the provider without going through
the backend, so that the code under test never proves itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio

from training_backends.core.backend import RemoteFilters, TrainingBackend
from training_backends.core.config import TrainingConfig
from training_backends.core.data_rules import RowFormat
from training_backends.core.dataset import Dataset
from training_backends.core.errors import RunNotFound, UnsupportedOperation
from training_backends.core.run import LogRecord, TrainingRun, new_run_id
from training_backends.core.status import TrainingStatus
from training_backends.datasets.inspect import inspect
from training_backends.testing.journal import Killed, MemoryJournal

__all__ = ["BackendConformance", "Subject"]

_PATIENCE = 30.0
"""Seconds within which a check must finish."""

_FORMATS: Mapping[str, frozenset[RowFormat]] = MappingProxyType(
    {
        "sft": frozenset({"messages", "text", "completion"}),
        "dpo": frozenset({"preference", "chosen"}),
        "classifier": frozenset({"labels"}),
    }
)
"""Row formats of each method."""


class Subject(ABC):
    """A backend under test, and the back door to its provider.

    Attributes:
        backend: Ready to launch `config`.
        dataset: The dataset that `config.data` refers to.
    """

    backend: TrainingBackend
    config: TrainingConfig
    dataset: Dataset

    @abstractmethod
    def reopen(self) -> TrainingBackend:
        """Create another backend object for the same provider, as another process would."""

    @abstractmethod
    def job_ids(self) -> Sequence[str]:
        """Return the ids of all jobs ever created at the provider."""

    @abstractmethod
    async def finish(self, remote_id: str) -> None:
        """Let a started job complete."""

    @abstractmethod
    async def fail(self, remote_id: str) -> None:
        """Let a started job fail."""

    async def confirm_stop(self, remote_id: str) -> None:  # noqa: B027  # most need none
        """Let a requested stop take effect; override if it does not do so by itself."""

    def run(self, config: TrainingConfig | None = None) -> TrainingRun:
        """Create a run record as the client would."""
        chosen = config or self.config
        return TrainingRun(id=new_run_id(), backend=self.backend.name, config=chosen)

    async def launched(self) -> TrainingRun:
        """Launch, and return the record as the client would store it."""
        run = self.run()
        return run.updated(await self.backend.launch(run, MemoryJournal(run)))


class BackendConformance:
    """The checks; each raises AssertionError with what was expected."""

    def __init__(self, make_subject: Callable[[], Subject]) -> None:
        self._make = make_subject

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks."""
        return [name for name in dir(cls) if name.startswith("check_")]

    async def run(self, name: str) -> None:
        """Run one check on a new subject, then close the subject's backend."""
        subject = self._make()
        check: Any = getattr(self, name)
        try:
            with anyio.fail_after(_PATIENCE):
                await check(subject)
        finally:
            await subject.backend.aclose()

    async def check_validate_changes_nothing(self, subject: Subject) -> None:
        """A valid configuration has no errors, and validation creates no job."""
        report = await subject.backend.validate(subject.config, subject.dataset)
        _expect(report.ok, f"no errors, not {report.errors}")
        _expect(not subject.job_ids(), "no job created by validate")

    async def check_provider_format_fits_the_methods(self, subject: Subject) -> None:
        """The provider format covers each method, and accepts the test data."""
        capabilities = subject.backend.capabilities
        formats = {*capabilities.provider_format.formats}
        for method in capabilities.methods:
            _expect(bool(_FORMATS[method] & formats), f"a row format for {method}")
        found = inspect(subject.config, provider_format=capabilities.provider_format)
        _expect(not found.errors, f"data that is valid for the backend, not {found.errors}")

    async def check_tolerated_rows_are_what_the_options_say(self, subject: Subject) -> None:
        """The fraction of invalid rows set in the options is the one that is tolerated."""
        backend = subject.backend
        options = backend.options_tolerating(0.25)
        wanted = 0.25 if options else 0.0
        merged = {**subject.config.options, **options}
        config = subject.config.model_copy(update={"options": merged})
        found = backend.tolerated_bad_rows(config)
        _expect(found == wanted, f"{wanted} of the rows tolerated, not {found}")
        backend.options_model.model_validate(merged)

    async def check_estimate_gives_reasons(self, subject: Subject) -> None:
        """An estimate explains what it does not know."""
        estimate = await subject.backend.estimate(subject.config, subject.dataset)
        unknown = None in {estimate.train_tokens, estimate.steps, estimate.cost}
        _expect(not unknown or bool(estimate.notes), "a note about what is unknown")
        _expect(estimate.cost is None or estimate.price_source is not None, "a source of the cost")

    async def check_launch_makes_one_job(self, subject: Subject) -> None:
        """A launch creates one job, starts it, and records its id early."""
        run = subject.run()
        journal = MemoryJournal(run)
        state = await subject.backend.launch(run, journal)
        _expect(list(subject.job_ids()) == [state.remote_id], "one job, with the returned id")
        _expect(journal.run.remote_id == state.remote_id, "the id recorded in the journal")
        _expect(state.status not in {TrainingStatus.READY, TrainingStatus.FAILED}, "a started job")

    async def check_killed_anywhere_makes_one_job(self, subject: Subject) -> None:
        """A launch killed at any point and repeated creates one job."""
        for point in range(1000):
            before = set(subject.job_ids())
            journal = MemoryJournal(subject.run(), kill_at=point)
            survived = await self._launch_or_die(subject.backend, journal)
            if not survived:
                journal.kill_at = None
                again = subject.reopen()
                try:
                    await self._launch_or_die(again, journal)
                finally:
                    await again.aclose()
            made = set(subject.job_ids()) - before
            _expect(len(made) == 1, f"one job when killed at point {point}, not {len(made)}")
            _expect(journal.run.remote_id in made, f"its id recorded, killed at point {point}")
            await subject.finish(next(iter(made)))
            if survived:
                return

    async def _launch_or_die(self, backend: TrainingBackend, journal: MemoryJournal) -> bool:
        try:
            await journal.record(await backend.launch(journal.run, journal))
        except Killed:
            return False
        return True

    async def check_another_process_goes_on(self, subject: Subject) -> None:
        """A backend object that has never seen a run works from its record alone."""
        run = await subject.launched()
        other = subject.reopen()
        try:
            seen = await other.status(run)
            _expect(seen.remote_id in {None, run.remote_id}, "the state of the same job")
            await subject.finish(str(run.remote_id))
            end = await other.status(run)
        finally:
            await other.aclose()
        _expect(end.status is TrainingStatus.COMPLETED, f"completed, not {end.status}")

    async def check_ends_are_told(self, subject: Subject) -> None:
        """Completion and failure are reported, with a result or a reason."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        good = await subject.backend.status(run)
        _expect(good.status is TrainingStatus.COMPLETED, f"completed, not {good.status}")
        _expect(good.result_model is not None, "the name of the result")
        run = await subject.launched()
        await subject.fail(str(run.remote_id))
        bad = await subject.backend.status(run)
        _expect(bad.status is TrainingStatus.FAILED, f"failed, not {bad.status}")
        _expect(bad.failure is not None and bool(bad.failure.message), "why it failed")

    async def check_statuses_agree(self, subject: Subject) -> None:
        """`statuses` returns every run whose status is unchanged, and nothing outdated."""
        runs = [await subject.launched() for _ in range(5)]
        runs = [run.updated(await subject.backend.status(run)) for run in runs]
        gone = runs[0].model_copy(update={"id": "gone", "remote_id": _unknown(runs[0])})
        together = await subject.backend.statuses([*runs, gone])
        _expect("gone" not in together, "no state of a run that is unknown to the provider")
        for run in runs:
            alone = await subject.backend.status(run)
            found = together.get(run.id)
            _expect(
                found is not None or alone.status is not run.status,
                f"the unchanged state of {run.id}",
            )
        for run in runs:
            await subject.finish(str(run.remote_id))
        reported = await subject.backend.statuses(runs)
        wrong = [name for name, state in reported.items() if not state.status.is_terminal]
        _expect(not wrong, "no outdated state of a finished run")

    async def check_observation_has_state_and_log(self, subject: Subject) -> None:
        """An observation includes the whole log so far; the next one only what is new."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        seen = await subject.backend.observe(run)
        _expect(seen.state.status.is_terminal, f"the end of the run, not {seen.state.status}")
        _expect(await subject.backend.status(run) == seen.state, "the observed state as status")
        again = await subject.backend.observe(run, after=seen.cursor)
        _expect(again.records == (), "no records after the last cursor of a finished run")
        _expect(again.cursor == seen.cursor, "the same cursor while nothing is new")

    async def check_stop_is_repeatable(self, subject: Subject) -> None:
        """A stop ends the run; stopping a stopping or finished run has no effect."""
        run = await subject.launched()
        for _ in range(2):
            await subject.backend.stop(run)
        await subject.confirm_stop(str(run.remote_id))
        state = await subject.backend.status(run)
        while not state.status.is_terminal:  # there is no notification
            await anyio.sleep(0.02)
            state = await subject.backend.status(run)
        _expect(state.status is TrainingStatus.CANCELLED, f"cancelled, not {state.status}")
        await subject.backend.stop(run)

    async def check_logs_have_no_gap_and_no_repeat(self, subject: Subject) -> None:
        """Following ends with the run, and every cursor yields exactly the rest."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        records = await _collect(subject.backend, run, follow=True)
        _expect(bool(records), "at least one record")
        _expect(len({r.cursor for r in records}) == len(records), "a unique cursor per record")
        times = [record.at for record in records if record.at is not None]
        _expect(times == sorted(times), "records in order of time")
        for index, record in enumerate(records):
            rest = await _collect(subject.backend, run, after=record.cursor)
            _expect(rest == records[index + 1 :], f"the records after number {index}")

    async def check_unknown_run_is_not_found(self, subject: Subject) -> None:
        """Every request for an unknown run raises RunNotFound."""
        run = subject.run()
        run = run.model_copy(update={"remote_id": _unknown(await subject.launched())})
        for ask in (subject.backend.status, subject.backend.stop):
            try:
                await ask(run)
            except RunNotFound:
                continue
            raise AssertionError(f"expected {ask.__name__} of an unknown run to raise RunNotFound")

    async def check_lacking_verbs_are_unsupported(self, subject: Subject) -> None:
        """An undeclared method raises UnsupportedOperation."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        run = run.updated(await subject.backend.status(run))
        can, backend = subject.backend.capabilities, subject.backend
        new = subject.run()
        verbs: list[tuple[bool, Callable[[], Awaitable[object]]]] = [
            (can.lists_remote, lambda: backend.list_remote(RemoteFilters())),
            (can.downloads, lambda: backend.download(run, Path("never-written"))),
            (can.samples, lambda: backend.sample(run, "hello")),
            (can.deletes, lambda: backend.delete(run)),
            (can.pauses, lambda: backend.pause(run)),
            (can.pauses, lambda: backend.unpause(run)),
            (can.resumes != "no", lambda: backend.resume(run, new, MemoryJournal(new))),
        ]
        for declared, verb in verbs:
            if declared:
                continue
            try:
                await verb()
            except UnsupportedOperation:
                continue
            raise AssertionError("expected an undeclared method to raise UnsupportedOperation")

    async def check_listed_runs_include_ours(self, subject: Subject) -> None:
        """A launched run is included in the list of the provider's runs."""
        if not subject.backend.capabilities.lists_remote:
            return
        run = await subject.launched()
        listed = await subject.backend.list_remote(RemoteFilters())
        _expect(run.remote_id in {entry.remote_id for entry in listed}, "the run in the list")


async def _collect(
    backend: TrainingBackend, run: TrainingRun, *, after: str | None = None, follow: bool = False
) -> list[LogRecord]:
    async with aclosing(backend.logs(run, after=after, follow=follow)) as records:
        return [record async for record in records]


def _unknown(run: TrainingRun) -> str:
    """Return an id in the provider's format that it never issued."""
    known = str(run.remote_id)
    return "".join("0" if letter.isalnum() else letter for letter in known)


def _expect(condition: bool, what: str) -> None:  # noqa: FBT001  # reads like assert
    if not condition:
        raise AssertionError(f"expected {what}")
