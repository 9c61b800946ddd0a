"""One look at a run tells its state and the log behind a cursor; many looks tell all, once."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends import (
    ConfigError,
    LogRecord,
    ProtocolError,
    RemoteFilters,
    RunNotFound,
    TrainingRun,
    TrainingStatus,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.protocols.mistral.status import JOB_STATUSES
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio
MakeJournal = Callable[..., MemoryJournal]


@pytest.fixture
async def run(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> TrainingRun:
    """Launch a run that then moves only when it is told to."""
    provider.auto = "validate"
    journal = make_journal()
    await backend.launch(journal.run, journal)
    provider.auto = "none"
    return journal.run


async def test_one_request_tells_state_and_log(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A look is one request; the next one behind its cursor tells only what is new."""
    provider.set_status(str(run.remote_id), "RUNNING")
    before = len(provider.requests)
    seen = await backend.observe(run)
    assert len(provider.requests) == before + 1
    assert seen.state.status is TrainingStatus.RUNNING
    assert seen.state.changed_at is not None
    assert seen.state.changed_at.timestamp() == provider.jobs[str(run.remote_id)].modified_at
    assert [record.message for record in seen.records][-2:] == ["VALIDATED", "RUNNING"]
    nothing = await backend.observe(run, after=seen.cursor)
    assert (nothing.records, nothing.cursor) == ((), seen.cursor)
    provider.add_checkpoint(str(run.remote_id), 10, train_loss=1.5)
    more = await backend.observe(run, after=seen.cursor)
    assert [record.step for record in more.records] == [10]


async def test_cursor_moves_over_what_is_not_told(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """An event that repeats the job's own word is no record, but lies behind the cursor."""
    job_id = str(run.remote_id)
    provider.set_status(job_id, "RUNNING", event=False)
    first = await backend.observe(run)
    provider.set_status(job_id, "RUNNING")
    second = await backend.observe(run, after=first.cursor)
    assert second.records == ()
    third = await backend.observe(run, after=second.cursor)
    assert (third.records, third.cursor) == ((), second.cursor)


async def test_trouble_of_a_look_is_told(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A missing job, a foreign cursor and an answer that cannot be read are errors of the run."""
    gone = run.model_copy(update={"remote_id": "0" * 36})
    with pytest.raises(RunNotFound):
        await backend.observe(gone)
    with pytest.raises(ConfigError, match="cursor"):
        await backend.observe(run, after="elsewhere")
    provider.fail(OtherAnswer(status=200, body={"id": "j"}))
    with pytest.raises(ProtocolError) as caught:
        await backend.observe(run)
    assert caught.value.run_id == run.id


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("status"), st.sampled_from(JOB_STATUSES)),
        st.tuples(st.just("silent"), st.sampled_from(["QUEUED", "RUNNING", "ON_HOLD"])),
        st.tuples(st.just("checkpoint"), st.just("")),
        st.tuples(st.just("later"), st.just("")),
        st.tuples(st.just("look"), st.just("")),
    ),
    max_size=25,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, newest_first=st.booleans())
async def test_many_looks_tell_what_one_tells(
    *,
    moves: list[tuple[str, str]],
    newest_first: bool,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
) -> None:
    """However often it is looked in between, no event or checkpoint is lost or told twice."""
    provider.newest_first = newest_first
    now = 1_700_000_000
    provider.clock = lambda: now
    job_id = provider.add_job(provider.jobs[str(run.remote_id)].asked)
    run = run.model_copy(update={"remote_id": job_id})
    cursor: str | None = None
    told: list[LogRecord] = []
    for number, (kind, word) in enumerate([*moves, ("look", "")]):
        if kind == "status":
            provider.set_status(job_id, word, n=number)
        elif kind == "silent":
            provider.set_status(job_id, word, event=False)
        elif kind == "checkpoint":
            provider.add_checkpoint(job_id, number + 1, train_loss=1.0)
        elif kind == "later":
            now += 1
        else:
            seen = await backend.observe(run, after=cursor)
            told += seen.records
            cursor = seen.cursor
    once = (await backend.observe(run)).records
    assert _numbered(told) == _numbered(once)
    assert max(_numbered(told).values(), default=1) == 1
    times = [record.at for record in once if record.at]
    assert len(times) == len(once)
    assert times == sorted(times)


def _numbered(records: list[LogRecord] | tuple[LogRecord, ...]) -> Counter[object]:
    return Counter(
        record.step if record.source == "checkpoint" else f"event {record.fields['n']}"
        for record in records
        if record.source == "checkpoint" or "n" in record.fields
    )


async def test_what_a_list_says_can_rebuild_a_store(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """The provider's list tells when each run was made and with what, as far as it knows."""
    provider.clock = lambda: 1_700_000_000
    asked = provider.jobs[str(run.remote_id)].asked
    strange = provider.add_job({**asked, "suffix": "much too long for a suffix of ours"}, "ODD")
    listed = {entry.remote_id: entry for entry in await backend.list_remote(RemoteFilters())}
    ours = listed[str(run.remote_id)]
    (file_id,) = provider.files
    assert ours.config is not None
    assert [source.remote_id for source in ours.config.data.train] == [file_id]
    assert ours.config.hyperparameters.training_steps == 10
    assert ours.created_at is not None
    assert ours.state.changed_at is not None
    found = listed[strange]
    assert found.created_at is not None
    assert found.created_at.timestamp() == 1_700_000_000
    assert found.config is not None
    assert found.config.suffix == "much too long for a suffix of ours"
    assert found.state.status is TrainingStatus.UNKNOWN


async def test_job_that_cannot_be_read_hides_no_other(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A job without the protocol's shape is passed over in the provider's list."""
    asked = provider.jobs[str(run.remote_id)].asked
    broken = provider.add_job(asked)
    provider.jobs[broken].status = 7  # type: ignore[assignment]
    listed = await backend.list_remote(RemoteFilters())
    assert [entry.remote_id for entry in listed] == [run.remote_id]
