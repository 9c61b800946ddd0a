"""Creating a job exactly once: lost answers, late creates, jobs of others that look the same."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from training_backends import (
    AmbiguousLaunch,
    BackendUnavailable,
    BudgetExceeded,
    DuplicateRun,
    RunState,
    TrainingConfig,
    TrainingStatus,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.core.backend import JSONValue
from training_backends.core.estimate import Estimate
from training_backends.testing.faults import CutAnswer, DropRequest, Fault, LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
MakeJournal = Callable[..., MemoryJournal]
Restart = Callable[[], MistralAPIBackend]
MakeConfig = Callable[..., TrainingConfig]
CREATE: dict[str, Any] = {"method": "POST", "path": "/jobs"}


@pytest.fixture
async def hasty(
    make_backend: Callable[..., MistralAPIBackend],
) -> AsyncGenerator[MistralAPIBackend, None]:
    """Make a backend that sends each request once."""
    made = make_backend(attempts=1)
    yield made
    await made.aclose()


def created(provider: ScriptedProvider) -> list[dict[str, object]]:
    """Return the bodies of all create requests."""
    return [json.loads(request.body) for request in provider.asked("POST", "/jobs")]


def after(
    provider: ScriptedProvider, path: str, then: Callable[[], None], *, times: int = 1
) -> None:
    """Do something when a POST to `path` was carried out, for the first time or so often."""
    answer = provider.answer
    left = [then] * times

    def and_then(request: Received) -> StubReply:
        reply = answer(request)
        if left and request.method == "POST" and request.path.endswith(path):
            left.pop()()
        return reply

    provider.answer = and_then  # type: ignore[method-assign]


def be_away(provider: ScriptedProvider) -> None:
    """Fail all that is asked."""
    provider.fail(OtherAnswer(status=503), times=10_000)


async def launch_again(backend: MistralAPIBackend, journal: MemoryJournal) -> RunState:
    """Launch once more, from another process."""
    try:
        return await backend.launch(journal.run, journal)
    finally:
        await backend.aclose()


async def body_of(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> dict[str, Any]:
    """Return what a create says, from a run that has ended."""
    journal = make_journal()
    await backend.launch(journal.run, journal)
    provider.set_status(str(journal.run.remote_id), "SUCCESS")
    return provider.jobs[str(journal.run.remote_id)].asked


@pytest.mark.parametrize("fault", [LoseAnswer(), CutAnswer(), OtherAnswer(done=True)])
@pytest.mark.parametrize("path", ["/jobs", "/start", "/files"])
async def test_lost_answer_does_nothing_twice(
    path: str,
    fault: Fault,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """An upload, create or start that was carried out unheard is found, not repeated."""
    provider.fail(fault, method="POST", path=path)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert len(provider.asked("POST", path)) == 1
    assert len(provider.jobs) == len(provider.files) == 1
    assert next(iter(provider.jobs.values())).starts == 1


async def test_half_an_answer_is_not_taken_for_none(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A create that was answered with half a JSON document is looked for before another."""
    provider.fail(OtherAnswer(status=200, body=b'{"id": "12', done=True), **CREATE)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert len(provider.jobs) == len(created(provider)) == 1


async def test_lost_job_is_found_in_a_list_that_lags(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A job that lists do not show at once is found by looking again."""
    provider.fail(LoseAnswer(), **CREATE)
    journal = make_journal()
    provider.lists_lag = 3
    await backend.launch(journal.run, journal)
    assert len(provider.jobs) == 1


async def test_failed_create_is_tried_again(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A create that failed without effect is repeated once nothing was found."""
    provider.fail(OtherAnswer(status=500), **CREATE)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert (len(created(provider)), len(provider.jobs)) == (2, 1)


async def test_create_that_keeps_failing_is_reported(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A provider that fails every create is reported, with the run's id."""
    provider.fail(OtherAnswer(status=500, body={"detail": "sorry"}), **CREATE, times=99)
    journal = make_journal()
    with pytest.raises(BackendUnavailable, match="sorry") as caught:
        await backend.launch(journal.run, journal)
    assert (caught.value.run_id, caught.value.backend) == (journal.run.id, "mistral")
    assert len(created(provider)) == 3


async def test_similar_job_of_others_is_named(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A 409 for a job that was there before is a DuplicateRun that names it."""
    provider.auto = "validate"
    first = make_journal()
    await backend.launch(first.run, first)
    second = make_journal()
    with pytest.raises(DuplicateRun) as caught:
        await backend.launch(second.run, second)
    assert caught.value.other == first.run.remote_id
    assert len(provider.jobs) == 1


async def test_conflict_with_our_own_lost_job_is_adopted(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A 409 that is caused by our own create, not shown in any list before, ends with its job."""
    provider.fail(LoseAnswer(), **CREATE)
    provider.lists_lag = 10_000

    def show() -> None:
        if len(created(provider)) == 2:
            provider.lists_lag = 0

    after(provider, "/jobs", show, times=2)
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    assert [state.remote_id] == list(provider.jobs)
    assert len(created(provider)) == 2


async def test_other_runs_with_the_same_data_are_not_taken_for_ours(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A lost create finds its own job, not the finished one of an equal run before."""
    first = make_journal()
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "SUCCESS")
    provider.fail(LoseAnswer(), **CREATE)
    second = make_journal()
    await backend.launch(second.run, second)
    assert second.run.remote_id != first.run.remote_id
    assert len(provider.jobs) == 2


async def test_late_create_is_waited_for(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A create that a proxy gave up on and the server carries out later is found, not repeated."""
    provider.late_creates = [3]
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert len(created(provider)) == len(provider.jobs) == 1
    assert next(iter(provider.jobs.values())).starts == 1


async def test_late_twin_is_named_before_anything_starts(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A create carried out after all waiting is over is seen before the start, and named."""
    provider.refuses_similar = False
    provider.late_creates = [10_000]
    journal = make_journal()
    quote = journal.quote

    async def think(estimate: Estimate) -> None:
        await quote(estimate)
        provider.catch_up()

    journal.quote = think  # type: ignore[method-assign]
    with pytest.raises(AmbiguousLaunch) as caught:
        await backend.launch(journal.run, journal)
    ours, twin = provider.jobs
    assert journal.run.remote_id == ours
    assert ours in caught.value.message
    assert twin in caught.value.message
    assert [job.starts for job in provider.jobs.values()] == [0, 0]
    assert provider.asked("POST", "/cancel") == []
    provider.set_status(twin, "CANCELLED")
    await backend.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [1, 0]


async def test_late_twin_is_known_by_the_files_of_its_time(
    hasty: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    restart: Restart,
) -> None:
    """A late job is recognised though its files were lost and uploaded again since."""
    provider.refuses_similar = False
    provider.late_creates = [10_000]
    after(provider, "/jobs", lambda: be_away(provider))
    journal = make_journal()
    with pytest.raises(BackendUnavailable):
        await hasty.launch(journal.run, journal)
    provider.heal()
    provider.files.clear()
    quote = journal.quote

    async def think(estimate: Estimate) -> None:
        await quote(estimate)
        provider.catch_up()

    journal.quote = think  # type: ignore[method-assign]
    with pytest.raises(AmbiguousLaunch, match="other matching jobs"):
        await launch_again(restart(), journal)
    assert len({str(job.asked["training_files"]) for job in provider.jobs.values()}) == 2
    assert [job.starts for job in provider.jobs.values()] == [0, 0]


async def test_twin_is_named_before_the_price(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: MakeConfig,
    make_journal: MakeJournal,
) -> None:
    """A run over budget does not hide that there may be two jobs of it."""
    provider.refuses_similar = False
    provider.late_creates = [10_000]
    journal = make_journal(make_config(model="open-mistral-7b", budget={"max_cost": "2 USD"}))
    record = journal.record

    async def catch_up(state: Any) -> None:
        await record(state)
        provider.catch_up()

    journal.record = catch_up  # type: ignore[method-assign]
    with pytest.raises(AmbiguousLaunch):
        await backend.launch(journal.run, journal)
    provider.set_status(list(provider.jobs)[1], "CANCELLED")
    with pytest.raises(BudgetExceeded):
        await backend.launch(journal.run, journal)
    assert {job.status for job in provider.jobs.values()} == {"CANCELLED"}


async def test_twin_that_somebody_started_is_not_ours(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A job like ours that runs was made by somebody else, as we start nothing before."""
    provider.refuses_similar = False
    asked = await body_of(backend, provider, make_journal)
    provider.fail(LoseAnswer(), **CREATE)
    journal = make_journal()
    record = journal.record

    async def meanwhile(state: Any) -> None:
        await record(state)
        if len(provider.jobs) == 2:
            provider.add_job(asked, "RUNNING")

    journal.record = meanwhile  # type: ignore[method-assign]
    await backend.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [1, 1, 0]


async def test_ambiguity_ends_when_one_job_is_left(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """Once all candidates but one are cancelled, the same launch takes the one that is left."""
    provider.refuses_similar = False
    provider.fail(LoseAnswer(), **CREATE)

    def add_twin() -> None:
        provider.add_job(created(provider)[0], "QUEUED")

    after(provider, "/jobs", add_twin)
    journal = make_journal()
    with pytest.raises(AmbiguousLaunch) as caught:
        await backend.launch(journal.run, journal)
    first, second = provider.jobs
    assert first in caught.value.message
    assert second in caught.value.message
    assert "Cancel" in str(caught.value.hint)
    provider.set_status(first, "CANCELLED")
    state = await backend.launch(journal.run, journal)
    assert state.remote_id == second
    assert [job.starts for job in provider.jobs.values()] == [0, 1]


async def test_job_of_another_run_is_not_adopted(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A job that belongs to another run of this store is not taken for the lost one."""
    provider.refuses_similar = False
    asked = await body_of(backend, provider, make_journal)
    provider.fail(OtherAnswer(status=500), **CREATE)
    journal = make_journal()
    other: list[str] = []

    def take_it() -> None:
        if not other:
            other.append(provider.add_job(asked, "QUEUED"))
            journal.others = frozenset(other)

    step = journal.step

    async def and_another(name: str, *args: Any, **kwargs: Any) -> JSONValue:
        if name == "create":
            take_it()
        return await step(name, *args, **kwargs)

    journal.step = and_another  # type: ignore[method-assign]
    state = await backend.launch(journal.run, journal)
    assert state.remote_id not in other
    assert provider.jobs[other[0]].starts == 0


async def test_job_taken_by_two_runs_is_started_by_none(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """If another run has adopted the same job at the same moment, nothing is started."""
    provider.fail(LoseAnswer(), **CREATE)
    journal = make_journal()
    record = journal.record

    async def taken_meanwhile(state: Any) -> None:
        await record(state)
        journal.others = frozenset(provider.jobs)

    journal.record = taken_meanwhile  # type: ignore[method-assign]
    with pytest.raises(AmbiguousLaunch, match="Another run"):
        await backend.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [0]


async def test_jobs_that_others_made_before_the_create_are_theirs(
    hasty: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """After a crash before the create, what others made meanwhile is not taken for ours."""
    provider.refuses_similar = False
    asked = await body_of(hasty, provider, make_journal)
    journal = make_journal()
    finish = journal._finish

    async def die_before_the_create(name: str, result: JSONValue) -> None:
        await finish(name, result)
        if name == "before create":
            raise Killed

    journal._finish = die_before_the_create  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await hasty.launch(journal.run, journal)
    assert "create" not in journal.rows
    theirs = provider.add_job(asked, "QUEUED")
    journal._finish = finish  # type: ignore[method-assign]
    provider.fail(LoseAnswer(), **CREATE)
    state = await hasty.launch(journal.run, journal)
    assert state.remote_id == list(provider.jobs)[-1] != theirs
    assert provider.jobs[theirs].starts == 0


async def test_create_that_was_sent_twice_on_its_way_makes_one_job(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A 409 that a proxy causes by repeating our create is answered by the job it made."""
    answer = provider.answer

    def twice(request: Received) -> StubReply:
        if request.method == "POST" and request.path.endswith("/jobs"):
            answer(request)
        return answer(request)

    provider.answer = twice  # type: ignore[method-assign]
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    assert [state.remote_id] == list(provider.jobs)


async def test_refused_create_is_sent_again_by_the_next_launch(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """What was clearly refused did nothing: the same launch repeated looks and creates anew."""
    provider.fail(OtherAnswer(status=403, body={"detail": "not yet"}), **CREATE)
    journal = make_journal()
    with pytest.raises(Exception, match="not yet"):
        await backend.launch(journal.run, journal)
    await backend.launch(journal.run, journal)
    assert (len(created(provider)), len(provider.jobs)) == (2, 1)


async def test_busy_server_is_asked_again(
    hasty: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A 429 has changed nothing: after the pause asked for, the create goes on."""
    busy = OtherAnswer(status=429, body={"message": "slow down"}, headers={"Retry-After": "0"})
    provider.fail(busy, **CREATE, times=2)
    journal = make_journal()
    await hasty.launch(journal.run, journal)
    assert (len(created(provider)), len(provider.jobs)) == (3, 1)


@pytest.mark.parametrize(
    "fault",
    [
        DropRequest(),
        OtherAnswer(status=502, body="<html>Bad gateway</html>", content_type="text/html"),
        OtherAnswer(status=200, body="<html>Sign in</html>", content_type="text/html"),
        OtherAnswer(status=200, body=b'{"data": [', done=True),
    ],
)
async def test_run_of_faults_is_borne(
    fault: Fault, hasty: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A launch goes on through several troubles at the same step."""
    for path in ("/jobs", "/start", "/files"):
        provider.fail(LoseAnswer(), method="POST", path=path)
        after(provider, path, lambda: provider.fail(fault, method="GET", times=3))
    journal = make_journal()
    await hasty.launch(journal.run, journal)
    assert [job.starts for job in provider.jobs.values()] == [1]
    assert [len(provider.asked("POST", path)) for path in ("/jobs", "/start", "/files")] == [
        1,
        1,
        1,
    ]


async def test_lost_job_is_found_though_its_files_are_gone(
    hasty: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    restart: Restart,
) -> None:
    """A job is looked for by the files that its create named, whatever is uploaded since."""
    provider.fail(LoseAnswer(), **CREATE)
    after(provider, "/jobs", lambda: be_away(provider))
    journal = make_journal()
    with pytest.raises(BackendUnavailable):
        await hasty.launch(journal.run, journal)
    provider.heal()
    provider.files.clear()
    state = await launch_again(restart(), journal)
    assert [state.remote_id] == list(provider.jobs)
    assert len(provider.files) == 1


async def test_job_that_was_cancelled_meanwhile_ends_the_run(
    hasty: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    restart: Restart,
) -> None:
    """Whoever cancels the lost job at the provider has cancelled the run."""
    provider.fail(LoseAnswer(), **CREATE)
    after(provider, "/jobs", lambda: be_away(provider))
    journal = make_journal()
    with pytest.raises(BackendUnavailable):
        await hasty.launch(journal.run, journal)
    provider.heal()
    provider.set_status(next(iter(provider.jobs)), "CANCELLED")
    state = await launch_again(restart(), journal)
    assert state.status is TrainingStatus.CANCELLED
    assert len(provider.jobs) == 1


async def test_unreadable_new_job_may_be_ours(
    hasty: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """With an answer lost, a new job that cannot be read is named, and no other is made."""
    provider.fail(LoseAnswer(), **CREATE)
    after(provider, "/jobs", lambda: _break(provider))
    journal = make_journal()
    with pytest.raises(AmbiguousLaunch) as caught:
        await hasty.launch(journal.run, journal)
    (job_id,) = provider.jobs
    assert job_id in caught.value.message
    assert len(created(provider)) == 1


def _break(provider: ScriptedProvider) -> None:
    job = next(iter(provider.jobs.values()))
    job.status = None  # type: ignore[assignment]


async def test_unreadable_job_of_others_is_no_hindrance(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A strange job that was there before is passed over."""
    await body_of(backend, provider, make_journal)
    _break(provider)
    provider.refuses_similar = False
    provider.fail(LoseAnswer(), **CREATE)
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    assert [state.remote_id] == list(provider.jobs)[1:]
