"""Where many runs stand: lists by status, never a wrong word, few requests."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends import TrainingConfig, TrainingRun
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.core.run import utc_now
from training_backends.protocols.mistral.status import JOB_STATUSES, to_status
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
MakeRuns = Callable[..., list[TrainingRun]]
LIVE = ["QUEUED", "VALIDATING", "VALIDATED", "STARTED", "RUNNING", "CANCELLATION_REQUESTED"]


def asked(**fields: Any) -> dict[str, Any]:
    """Return what a job was created with."""
    return {"model": "open-mistral-7b", "training_files": ["f"], "hyperparameters": {}, **fields}


@pytest.fixture
def make_runs(provider: ScriptedProvider, config: TrainingConfig) -> MakeRuns:
    """Make jobs in the given states, and the records that say the same."""
    provider.auto = "none"

    def make(*words: str) -> list[TrainingRun]:
        return [
            TrainingRun(
                id=f"r{number}",
                backend="mistral",
                config=config,
                remote_id=provider.add_job(asked(), word),
                status=to_status(word),
                raw_status=word,
            )
            for number, word in enumerate(words)
        ]

    return make


def lists(provider: ScriptedProvider) -> list[str | None]:
    """Return the words of all lists that were asked for."""
    return [dict(request.query).get("status") for request in provider.asked("GET", "/jobs")]


async def test_a_hundred_runs_need_one_request(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """Runs are told of from lists of the word they were seen in, each page a hundred."""
    runs = make_runs(*["RUNNING"] * 950, *["QUEUED"] * 50)
    for _ in range(300):
        provider.add_job(asked(), "SUCCESS")
    states = await backend.statuses(runs)
    assert {run.id: run.status for run in runs} == {
        run_id: state.status for run_id, state in states.items()
    }
    assert lists(provider) == ["QUEUED", *["RUNNING"] * 10]
    assert len(provider.requests) == 11


async def test_list_tells_when_a_job_changed(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """The time of the last change is the same in a list as it is for a job alone."""
    runs = make_runs(*["RUNNING"] * 5)
    states = await backend.statuses(runs)
    for run in runs:
        alone = await backend.status(run)
        assert alone.changed_at is not None
        assert states[run.id].changed_at == alone.changed_at


async def test_few_runs_are_asked_for_one_by_one(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """Up to three runs are not worth a list."""
    runs = make_runs("RUNNING", "QUEUED", "VALIDATED")
    assert len(await backend.statuses(runs)) == 3
    assert lists(provider) == []


async def test_runs_that_ended_are_left_out(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """How a run ended no list tells: it is left out, to be asked for by itself."""
    runs = make_runs(*["RUNNING"] * 20)
    provider.set_status(str(runs[7].remote_id), "FAILED", error="the node went away")
    provider.set_status(str(runs[8].remote_id), "SUCCESS")
    states = await backend.statuses(runs)
    assert {run.id for run in runs} - states.keys() == {"r7", "r8"}
    assert lists(provider) == ["RUNNING"]


async def test_many_that_moved_on_are_found_in_other_lists(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """Runs that are no longer where they were are looked for under the other live words."""
    runs = make_runs(*["QUEUED"] * 120)
    for run in runs[:60]:
        provider.set_status(str(run.remote_id), "RUNNING")
    states = await backend.statuses(runs)
    assert [states[run.id].raw_status for run in runs] == ["RUNNING"] * 60 + ["QUEUED"] * 60
    assert len(provider.requests) <= 8


async def test_words_of_nobodys_are_looked_for_among_all(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """Runs in a status that cannot be filtered by are found in a list of everything."""
    runs = make_runs(*["ON_HOLD"] * 8)
    states = await backend.statuses(runs)
    assert {state.raw_status for state in states.values()} == {"ON_HOLD"}
    assert len(states) == 8
    assert lists(provider) == [None]


async def test_jobs_of_others_do_not_cost_more_than_asking_for_each(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """Among thousands of other people's jobs, a list is given up when it no longer pays."""
    runs = make_runs(*["RUNNING"] * 5)
    for _ in range(1500):
        provider.add_job(asked(), "RUNNING")
    assert await backend.statuses(runs) == {}
    assert len(provider.requests) <= 10


async def test_only_the_time_of_the_runs_is_listed(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """A list begins a day before the oldest run and ends a day after the last change."""
    runs = make_runs(*["RUNNING"] * 5)
    runs[0] = runs[0].model_copy(update={"changed_at": utc_now() + timedelta(days=3)})
    await backend.statuses(runs)
    query = dict(provider.requests[-1].query)
    oldest = min(run.created_at for run in runs)
    assert query["created_after"] == (oldest - timedelta(days=1)).isoformat()
    assert query["created_before"] > (oldest + timedelta(days=3)).isoformat()


async def test_strange_entries_hide_nothing(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """An entry without the protocol's shape is passed over; the others are told of."""
    runs = make_runs(*["RUNNING"] * 6)
    provider.jobs[str(runs[2].remote_id)].modified_at = "yesterday"  # type: ignore[assignment]
    states = await backend.statuses(runs)
    assert {run.id for run in runs} - states.keys() == {"r2"}


async def test_server_that_does_not_filter_tells_no_lies(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_runs: MakeRuns
) -> None:
    """What counts is the word that a job has, not the one it was asked for under."""
    runs = make_runs("QUEUED", "RUNNING", "RUNNING", "VALIDATED", "STARTED")
    answer = provider.answer

    def unfiltered(request: Received) -> StubReply:
        request.query = [entry for entry in request.query if entry[0] != "status"]
        return answer(request)

    provider.answer = unfiltered  # type: ignore[method-assign]
    states = await backend.statuses(runs)
    assert {run.id: run.raw_status for run in runs} == {
        run_id: state.raw_status for run_id, state in states.items()
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.sampled_from(LIVE), min_size=4, max_size=12),
    moves=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(JOB_STATUSES)), max_size=8),
)
async def test_moving_jobs_are_never_told_of_wrongly(
    *,
    words: list[str],
    moves: list[tuple[int, str]],
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_runs: MakeRuns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever moves between two pages: what is told of a run, it was while the sweep went on."""
    monkeypatch.setattr("training_backends.backends.mistral.api.PAGE_SIZE", 2)
    provider.jobs.clear()
    runs = make_runs(*words)
    was = {run.id: {run.raw_status} for run in runs}
    todo = list(moves)

    def then_move(request: Received) -> StubReply:
        reply = ScriptedProvider.answer(provider, request)
        if todo:
            number, word = todo.pop()
            run = runs[number % len(runs)]
            provider.set_status(str(run.remote_id), word)
            was[run.id].add(word)
        return reply

    provider.answer = then_move  # type: ignore[method-assign]
    states = await backend.statuses(runs)
    assert all(state.raw_status in was[run_id] for run_id, state in states.items())
    for run in runs:
        told = states.get(run.id)
        assert told is not None or moves
        assert told is None or told.status is run.status or not told.status.is_terminal
