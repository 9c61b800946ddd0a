"""The kit lets a backend that conforms pass, and notices those that do not."""

from collections.abc import Callable
from dataclasses import replace
from uuid import uuid4

import anyio
import pytest

from tests.pages import code_blocks
from training_backends import (
    Capabilities,
    Estimate,
    Journal,
    Money,
    Observation,
    RunState,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.core.dataset import Dataset
from training_backends.testing.backend import ScriptedBackend
from training_backends.testing.conformance import BackendConformance, Subject
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio
pytest_plugins = ["training_backends.testing.pytest", "pytester"]
MakeConfig = Callable[..., TrainingConfig]


class Forgetful(ScriptedBackend):
    """Makes a job each time that it is asked, whatever the journal says."""

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Make a job."""
        state = await super().launch(run, MemoryJournal(run))
        await journal.record(state)
        return state


class Blind(ScriptedBackend):
    """Never sees an end."""

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Say that all is well."""
        seen = await super().observe(run, after=after)
        state = seen.state.model_copy(update={"status": TrainingStatus.RUNNING})
        return replace(seen, state=state)


class Stammering(ScriptedBackend):
    """Repeats the record of the cursor."""

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Begin one too early."""
        earlier = str(int(after) - 1) if after and after != "0" else None
        return await super().observe(run, after=earlier)


class Late(ScriptedBackend):
    """Reports the end of a run before the last record of its log."""

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Hold the newest of several records back."""
        seen = await super().observe(run, after=after)
        if len(seen.records) < 2:
            return seen
        return replace(seen, records=seen.records[:-1], cursor=seen.records[-2].cursor)


class Moody(ScriptedBackend):
    """Has a status of its own, which contradicts its observations."""

    async def status(self, run: TrainingRun) -> RunState:
        """Return something else."""
        state = await super().status(run)
        return state.model_copy(update={"status": TrainingStatus.PENDING})


class Eager(ScriptedBackend):
    """Can do more than it declares."""

    async def list_remote(self, filters: object) -> list[object]:  # type: ignore[override]
        """List nothing, instead of refusing."""
        del filters
        return []


class Talkative(ScriptedBackend):
    """Answers, and does not declare it."""

    @property
    def capabilities(self) -> Capabilities:
        """Leave the answers out."""
        return super().capabilities.model_copy(update={"samples": False})


class Priced(ScriptedBackend):
    """Has a price without a source."""

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Return the bare price."""
        del config, dataset
        return Estimate(cost=Money.model_validate("1 USD"), notes=("No tokens are counted.",))


class ScriptedSubject(Subject):
    """A scripted backend; it is its own provider."""

    def __init__(self, backend: ScriptedBackend, config: TrainingConfig) -> None:
        self.backend = self.scripted = backend
        self.config, self.dataset = config, Dataset(files=())

    def reopen(self) -> ScriptedBackend:
        """Return the same: it holds the jobs."""
        return self.scripted

    def job_ids(self) -> list[str]:
        """Return all jobs."""
        return list(self.scripted.created)

    async def finish(self, remote_id: str) -> None:
        """Let a job succeed."""
        self.scripted.log(remote_id, "one")
        self.scripted.log(remote_id, "two")
        self.scripted.finish(remote_id)

    async def fail(self, remote_id: str) -> None:
        """Let a job fail."""
        self.scripted.fail(remote_id)

    def progress(self, remote_id: str, records: int) -> None:
        """Add records."""
        for _ in range(records):
            self.scripted.log(remote_id, f"message {uuid4()}")

    async def confirm_stop(self, remote_id: str) -> None:
        """End what is stopping."""
        self.scripted.say(remote_id, TrainingStatus.CANCELLED)


@pytest.fixture
def conformance_subject(make_config: MakeConfig) -> Subject:
    return ScriptedSubject(ScriptedBackend(), make_config())


def test_conforming_backend_passes(conformance: Callable[[], None]) -> None:
    """A backend that keeps the contract passes every check for which its subject has hooks."""
    conformance()


async def test_report_names_what_failed_and_what_was_skipped(make_config: MakeConfig) -> None:
    """A report counts the checks, with a reason for each that did not pass."""
    config = make_config()

    def subject() -> Subject:
        subject = ScriptedSubject(Blind(), config)
        subject.patience = 0.3
        return subject

    report = await BackendConformance(subject).run_all()
    assert not report.ok
    assert "completed" in report.failed["check_ends_are_reported"]
    assert report.skipped["check_errors_hide_secrets"] == "the subject has no hook `disturb`"
    done = {*report.passed, *report.failed, *report.skipped}
    assert done == {*BackendConformance.checks()}
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{len(report.passed)} passed, {len(report.failed)} failed")
    assert any(line.startswith("FAILED  ends are reported: expected completed") for line in lines)


async def test_hanging_check_fails_in_time(make_config: MakeConfig) -> None:
    """A check that does not finish within the subject's patience fails."""
    config = make_config()

    class Slow(ScriptedBackend):
        async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
            await anyio.sleep_forever()
            return await super().observe(run, after=after)

    def subject() -> Subject:
        subject = ScriptedSubject(Slow(), config)
        subject.patience = 0.05
        return subject

    with pytest.raises(AssertionError, match=r"finish within 0\.05 s"):
        await BackendConformance(subject).run("check_ends_are_reported")


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (Forgetful, "killed_anywhere_makes_one_job", "one job when killed"),
        (Blind, "ends_are_reported", "completed"),
        (Blind, "another_process_continues", "completed"),
        (Stammering, "logs_have_no_gap_and_no_repeat", "records after number 0"),
        (Late, "observation_has_state_and_log", "no records after the last cursor"),
        (Moody, "observation_has_state_and_log", "the observed state"),
        (Eager, "lacking_verbs_are_unsupported", "UnsupportedOperation"),
        (Talkative, "lacking_verbs_are_unsupported", "UnsupportedOperation"),
        (Priced, "estimate_gives_reasons", "source of the cost"),
    ],
)
async def test_fault_is_noticed(
    kind: type[ScriptedBackend], check: str, message: str, make_config: MakeConfig
) -> None:
    """Each way to break the contract is found by its check."""
    config = make_config()
    kit = BackendConformance(lambda: ScriptedSubject(kind(), config))
    with pytest.raises(AssertionError, match=message):
        await kit.run(f"check_{check}")


def test_documented_subject_runs_with_the_plugin(pytester: pytest.Pytester) -> None:
    """The code of the page on testing makes a test of each check, and skips those without hooks."""
    pytester.makepyfile("\n".join(block.text for block in code_blocks("testing.md", "python")))
    result = pytester.runpytest_inprocess("-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist")
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] + outcomes["skipped"] == len(BackendConformance.checks())
    assert outcomes["passed"] > 20
    result.stdout.fnmatch_lines(["*subject has no hook `disturb`*"])
