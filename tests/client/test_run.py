"""`run`: the one call that an orchestrator's task needs."""

import pickle
import re
from unittest.mock import Mock

import anyio
import pytest

from tests.client.conftest import MakeConfig, both_stores
from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    BackendUnavailable,
    Failure,
    LogRecord,
    RunFailed,
    RunNotFound,
    TrainingClient,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
    run_id_from,
)
from training_backends.client.notebook import NotebookProgress
from training_backends.core.capabilities import Capabilities
from training_backends.core.run import RUN_ID_PATTERN
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio

_PREEMPTED = Failure(kind="preempted", message="the machine was taken away", retryable=True)


async def _job(backend: ScriptedBackend, number: int) -> str:
    """Return the id of the n-th job, once there is one."""
    await until(lambda: len(backend.created) >= number)
    return backend.created[number - 1]


async def _fail(backend: ScriptedBackend, number: int, failure: Failure = _PREEMPTED) -> None:
    backend.say(await _job(backend, number), TrainingStatus.FAILED, failure=failure)


async def test_it_returns_the_completed_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Launch, follow and return are one call."""
    found: list[TrainingRun] = []

    async def run() -> None:
        found.append(await client.run(make_config(), backend="scripted", run_id="mine"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        backend.finish(await _job(backend, 1), "tuned")
    assert (found[0].id, found[0].status, found[0].result_model) == ("mine", "completed", "tuned")


async def test_every_record_is_reported_in_order(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What a tracker needs, without a second loop."""
    said: list[str] = []

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            lambda: client.run(
                make_config(),
                backend="scripted",
                on_record=lambda record: said.append(record.message),
            )
        )
        job = await _job(backend, 1)
        backend.log(job, "first")
        backend.log(job, "second")
        backend.finish(job)
    assert [text for text in said if text in {"first", "second"}] == ["first", "second"]


async def test_a_temporary_failure_is_resumed(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The next run continues the failed one, under an id that says so."""
    found: list[TrainingRun] = []

    async def run() -> None:
        found.append(await client.run(make_config(), backend="scripted", run_id="mine"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await _fail(backend, 1)
        backend.finish(await _job(backend, 2))
    assert (found[0].id, found[0].resumed_from) == ("mine-r1", "mine")


async def test_no_more_runs_than_attempts(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The last failure is the caller's."""
    raised: list[RunFailed] = []

    async def run() -> None:
        with pytest.raises(RunFailed) as error:
            await client.run(make_config(), backend="scripted", run_id="mine", attempts=2)
        raised.append(error.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await _fail(backend, 1)
        await _fail(backend, 2)
    assert (raised[0].run_id, raised[0].retryable, len(backend.created)) == ("mine-r1", True, 2)


@pytest.mark.parametrize("again", [1, 3])
async def test_a_final_failure_is_raised_by_every_call(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig, again: int
) -> None:
    """Bad data fails again however often an orchestrator retries."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await _fail(backend, 1, Failure(kind="validation", message="line 3 has no answer"))
    for _ in range(again):
        with pytest.raises(RunFailed, match="line 3 has no answer"):
            await client.run(make_config(), backend="scripted", run_id="mine")
    assert len(backend.created) == 1


async def test_the_error_carries_run_and_failure_and_can_be_pickled(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Orchestrators send errors between processes."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await _fail(backend, 1)
    with pytest.raises(RunFailed) as error:
        await client.run(make_config(), backend="scripted", run_id="mine", attempts=1)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.run.id, copy.failure, copy.retryable) == ("mine", _PREEMPTED, True)


@both_stores
async def test_a_repeated_call_continues_with_the_newest_attempt(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """A task moved to another worker starts nothing twice."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await _fail(backend, 1)
    await client.status("mine")
    await client.resume("mine", new_id="mine-r1")
    backend.finish(await _job(backend, 2))
    run = await other.run(make_config(), backend="scripted", run_id="mine")
    assert (run.id, len(backend.created)) == ("mine-r1", 2)


async def test_a_resumption_cut_off_in_the_middle_is_continued(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """The worker died after recording the next attempt and before its job existed."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await _fail(backend, 1)
    await client.status("mine")
    backend.before_create = backend.refusing(UnsupportedOperation("cut off"))
    with pytest.raises(UnsupportedOperation):
        await client.resume("mine", new_id="mine-r1")
    backend.before_create = lambda: None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: other.run(make_config(), backend="scripted", run_id="mine"))
        backend.finish(await _job(backend, 2))
    assert (await other.get("mine-r1")).status is TrainingStatus.COMPLETED


async def _cancelled_call(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    *,
    stop_on_cancel: bool = True,
) -> TrainingRun:
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await client.run(
                make_config(), backend="scripted", run_id="mine", stop_on_cancel=stop_on_cancel
            )

        tasks.start_soon(run)
        await _job(backend, 1)
        await until(lambda: bool(backend.looks))
        tasks.cancel_scope.cancel()
    return await client.get("mine")


async def test_a_cancelled_call_stops_its_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Nothing trains on for a task that was cancelled."""
    run = await _cancelled_call(client, backend, make_config)
    assert run.status is TrainingStatus.STOPPING


async def test_a_cancelled_call_may_leave_its_run_running(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """For tasks that are moved rather than given up."""
    run = await _cancelled_call(client, backend, make_config, stop_on_cancel=False)
    assert run.status is TrainingStatus.RUNNING


async def test_a_run_stopped_with_its_caller_is_resumed_by_the_next(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A worker that was shut down is no reason to give up."""
    await _cancelled_call(client, backend, make_config)
    backend.say(backend.created[0], TrainingStatus.CANCELLED)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: client.run(make_config(), backend="scripted", run_id="mine"))
        backend.finish(await _job(backend, 2))
    assert (await client.get("mine-r1")).resumed_from == "mine"


async def test_a_run_that_somebody_stopped_stays_stopped(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """An orchestrator's retry does not undo `stop`."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await client.stop("mine")
    backend.say(backend.created[0], TrainingStatus.CANCELLED)
    with pytest.raises(RunFailed, match="was cancelled"):
        await client.run(make_config(), backend="scripted", run_id="mine")
    assert len(backend.created) == 1


async def test_without_following_it_returns_the_newest_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Who waits elsewhere repeats the call: it resumes a finished run, returns it or raises."""

    async def step() -> TrainingRun:
        return await client.run(make_config(), backend="scripted", run_id="mine", follow=False)

    assert (await step()).id == "mine"
    await _fail(backend, 1)
    await client.wait("mine")
    assert [(await step()).id, (await step()).id] == ["mine-r1", "mine-r1"]
    backend.finish(backend.created[1])
    await client.wait("mine-r1")
    assert (await step()).status is TrainingStatus.COMPLETED
    assert len(backend.created) == 2


async def test_a_stop_may_leave_the_run_to_be_resumed(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """For orchestrators that tell of a killed task by a call, not by cancelling one."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await client.stop("mine", resumable=True)
    backend.say(backend.created[0], TrainingStatus.CANCELLED)
    await client.wait("mine")
    run = await client.run(make_config(), backend="scripted", run_id="mine", follow=False)
    assert (run.id, run.resumed_from) == ("mine-r1", "mine")


async def test_a_backend_that_cannot_resume_ends_with_the_first_failure(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The failure is raised, and why it was not resumed is its cause."""
    backend = ScriptedBackend(
        capabilities=Capabilities(hyperparameters=None, resumes="no", tunings=frozenset({"lora"}))
    )
    home = tmp_path_factory.mktemp("home")
    async with AsyncTrainingClient(home=home, backends={"scripted": backend}) as client:
        await client.launch(make_config(), backend="scripted", run_id="mine")
        await _fail(backend, 1)
        with pytest.raises(RunFailed) as error:
            await client.run(make_config(), backend="scripted", run_id="mine")
    assert isinstance(error.value.__cause__, UnsupportedOperation)


async def test_an_outage_while_resuming_is_not_a_failure_of_the_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The next call continues with the same attempt."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    await _fail(backend, 1)
    backend.before_create = backend.refusing(BackendUnavailable("away", sent=False))
    with pytest.raises(BackendUnavailable):
        await client.run(make_config(), backend="scripted", run_id="mine")
    backend.before_create = lambda: None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: client.run(make_config(), backend="scripted", run_id="mine"))
        backend.finish(await _job(backend, 2))
    assert (await client.get("mine-r1")).status is TrainingStatus.COMPLETED


async def test_what_a_callback_raises_leaves_the_run_running(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A tracker's bug is the caller's, not the run's."""

    def broken(record: object) -> None:
        raise LookupError(str(record))

    with pytest.raises(LookupError):
        await client.run(make_config(), backend="scripted", run_id="mine", on_record=broken)
    assert (await client.get("mine")).status is TrainingStatus.RUNNING


async def test_without_an_attempt_nothing_is_launched(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A wrong argument is found first."""
    with pytest.raises(ValueError, match="attempts"):
        await client.run(make_config(), backend="scripted", run_id="mine", attempts=0)
    with pytest.raises(RunNotFound):
        await client.get("mine")


def test_the_synchronous_client_has_it_too(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same call, without `await`; a run finished before returns at once."""
    backend = ScriptedBackend()
    home = tmp_path_factory.mktemp("home")
    with TrainingClient(home=home, backends={"scripted": backend}) as client:
        client.launch(make_config(), backend="scripted", run_id="mine")
        backend.finish(backend.created[0])
        run = client.run(make_config(), backend="scripted", run_id="mine")
    assert run.status is TrainingStatus.COMPLETED


def test_the_progress_of_a_long_run_stays_small() -> None:
    """One display, however many steps; what a notebook stores does not grow with them."""
    display = Mock()
    progress = NotebookProgress(display)
    run = TrainingRun(id="a", backend="scripted", config=TrainingConfig(model="m"))
    for step in range(50_000):
        fields = {"train_loss": 1 / (step + 1)}
        progress.is_due(
            LogRecord(message="", source="metrics", step=step, fields=fields, cursor=f"{step}")
        )
    progress.show(run)
    progress.show(run)
    display.assert_called_once()
    (shown,) = display.return_value.update.call_args.args
    assert 100 < shown._repr_html_().count(",") < 500


@pytest.mark.parametrize(
    "text",
    ["manual__2026-11-30T12:00:00+00:00", "flow/task 1", "-x", "é", "", "a" * 300, "日本"],
)
def test_any_text_becomes_a_valid_run_id(text: str) -> None:
    """Orchestrators name their runs with characters that ours do not have."""
    assert re.fullmatch(RUN_ID_PATTERN, run_id_from(text))


def test_different_texts_keep_different_ids() -> None:
    """Replaced characters do not make two tasks share a run."""
    assert len({run_id_from(text) for text in ("a:b", "a/b", "a b", "a-b", "a+b")}) == 5


def test_a_valid_run_id_is_kept() -> None:
    """Nobody's own names are changed."""
    assert run_id_from("exp-1.v2_final") == "exp-1.v2_final"
