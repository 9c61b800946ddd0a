"""The asynchronous client: launches once, remembers, follows, ends."""

import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import pytest
from structlog.testing import capture_logs

from tests.client.conftest import MakeConfig, both_stores, read_log
from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    BackendBroken,
    BackendUnavailable,
    BudgetExceeded,
    Capabilities,
    ChatMessage,
    ChatTemplate,
    ConfigError,
    DatasetError,
    DuplicateRun,
    Estimate,
    Issue,
    Money,
    RunNotFound,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
    ValidationReport,
    WaitTimeout,
)
from training_backends.client import launch
from training_backends.client.journal import StoreJournal
from training_backends.client.run_record import launch_lease
from training_backends.core.backend import Journal
from training_backends.core.run import Observation, RunState
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


@both_stores
async def test_a_launched_run_is_seen_by_another_client(
    client: AsyncTrainingClient, other: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """Runs live in the store, not in a process."""
    run = await client.launch(make_config(), backend="scripted")
    assert (await other.get(run.id)).remote_id == run.remote_id


async def test_another_client_stops_the_run(
    client: AsyncTrainingClient, other: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """Stopping needs only the run's id, and reports stopping until it is over."""
    run = await client.launch(make_config(), backend="scripted")
    assert (await other.stop(run.id)).status is TrainingStatus.STOPPING


async def test_the_same_id_launches_once(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Repeating a launch returns the run that is there."""
    first = await client.launch(make_config(), backend="scripted", run_id="mine")
    second = await client.launch(make_config(), backend="scripted", run_id="mine")
    assert (second.remote_id, len(backend.created)) == (first.remote_id, 1)


@both_stores
async def test_simultaneous_launches_of_one_id_make_one_job(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """Two clients at the same moment agree on one run."""
    config = make_config()
    async with anyio.create_task_group() as tasks:
        for launcher in (client, other) * 5:
            tasks.start_soon(
                lambda c: c.launch(config, backend="scripted", run_id="mine"), launcher
            )
    assert len(backend.created) == 1


async def test_an_id_with_another_config_is_a_conflict(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """An id stands for one configuration; the error names the fields that differ."""
    await client.launch(make_config(), backend="scripted", run_id="mine")
    other = make_config(suffix="new", hyperparameters={"epochs": 2})
    with pytest.raises(DuplicateRun, match=r"values for: hyperparameters\.epochs, suffix\."):
        await client.launch(other, backend="scripted", run_id="mine")


async def test_a_run_records_the_digest_of_its_chat_template(
    client: AsyncTrainingClient, make_config: MakeConfig, tmp_path: Path
) -> None:
    """The same id with another text is a conflict; a template that nobody supports is an error."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    with pytest.raises(ConfigError) as caught:
        await client.launch(make_config(chat_template=str(file)), backend="scripted")
    assert [issue.field for issue in caught.value.issues] == ["chat_template"]
    able = ScriptedBackend(capabilities=Capabilities(chat_template=True))
    async with AsyncTrainingClient(home=tmp_path / "able", backends={"scripted": able}) as other:
        config = make_config(chat_template=str(file))
        await other.launch(config, backend="scripted", run_id="mine")
        recorded = (await other.get("mine")).config.chat_template
        assert recorded == ChatTemplate(path=file).pinned()
        file.write_text("{{ other }}")
        with pytest.raises(DuplicateRun, match=r"chat_template\.sha256"):
            await other.launch(config, backend="scripted", run_id="mine")


async def test_a_launch_cut_off_continues(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """After a lost answer the repeated launch adopts the job that was made."""
    backend.after_create = backend.refusing(BackendUnavailable("reset", sent=True))
    run = await client.launch(make_config(), backend="scripted", run_id="mine")
    assert backend.created == [run.remote_id]


async def test_a_refused_launch_is_remembered_and_can_be_repeated(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The reason stays visible until a later launch succeeds."""
    backend.before_create = backend.refusing(BackendUnavailable("no route", sent=False))
    with pytest.raises(BackendUnavailable):
        await client.launch(make_config(), backend="scripted", run_id="mine")
    failure = (await client.get("mine")).failure
    backend.before_create = lambda: None
    run = await client.launch(make_config(), backend="scripted", run_id="mine")
    assert (failure is not None, run.failure) == (True, None)


async def test_an_estimate_over_budget_leaves_no_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What is refused before anything happened is not recorded."""
    backend.price = Money.model_validate("9 USD")
    with pytest.raises(BudgetExceeded):
        await client.launch(make_config(budget={"max_cost": "5 USD"}), backend="scripted")
    assert await client.list() == []


async def test_a_cost_is_confirmed_first(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A no ends the launch before a job exists."""
    backend.price = Money.model_validate("9 USD")

    async def refuse(_: Estimate) -> bool:
        return False

    with pytest.raises(BudgetExceeded, match="not confirmed"):
        await client.launch(make_config(), backend="scripted", confirm=refuse)
    assert backend.created == []


async def test_an_unknown_price_is_not_launched_on_a_budget_alone(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A limit that cannot be checked is not consent: without `confirm` nothing is started."""
    backend.price = None
    limited = make_config(budget={"max_cost": "5 USD"})
    with pytest.raises(BudgetExceeded, match="unknown") as caught:
        await client.launch(limited, backend="scripted")
    assert (caught.value.found, backend.created, await client.list()) == ("unknown", [], [])
    run = await client.launch(make_config(), backend="scripted")
    assert backend.created == [run.remote_id], "without a limit the caller has decided"


async def test_an_unknown_price_is_confirmed_whatever_the_budget(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """`confirm` decides, and sees that the price is unknown."""
    backend.price = None
    asked: list[Estimate] = []

    async def agree(estimate: Estimate) -> bool:
        asked.append(estimate)
        return True

    limited = make_config(budget={"max_cost": "5 USD"})
    await client.launch(limited, backend="scripted", confirm=agree)
    assert [estimate.totals for estimate in asked] == [()]


@pytest.mark.parametrize("price", [None, "9 USD"])
async def test_a_resumption_is_confirmed_like_a_launch(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    price: str | None,
) -> None:
    """Training again costs again; a no leaves no second run."""
    backend.price = Money.model_validate(price) if price else None
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))

    async def refuse(_: Estimate) -> bool:
        return False

    with pytest.raises(BudgetExceeded, match="not confirmed"):
        await client.resume(run.id, confirm=refuse)
    assert (len(await client.list()), backend.resumed) == (1, [])


async def test_a_config_that_the_backend_refuses_is_not_launched(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The backend's issues reach the caller."""
    backend.report = ValidationReport(issues=(Issue(code="no_model", message="unknown"),))
    with pytest.raises(ConfigError) as caught:
        await client.launch(make_config(), backend="scripted")
    assert caught.value.issues[0].code == "no_model"


async def test_unknown_options_are_refused_by_name(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A backend's options are checked by its own model."""
    report = await client.validate(make_config(options={"gpus": 8}), backend="scripted")
    assert report.errors[0].field == "options.gpus"


async def test_an_estimate_needs_options_that_fit(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A backend never sees options that it does not have."""
    with pytest.raises(ConfigError) as caught:
        await client.estimate(make_config(options={"gpus": 8}), backend="scripted")
    assert caught.value.issues[0].field == "options.gpus"


async def test_bad_data_stops_the_launch(
    client: AsyncTrainingClient, make_config: MakeConfig, train_file: Path
) -> None:
    """Nothing is launched on a file that cannot be read."""
    config = make_config()
    train_file.write_text("not json\n")
    with pytest.raises(DatasetError) as caught:
        await client.launch(config, backend="scripted")
    assert caught.value.issues[0].line == 1


async def test_wait_returns_every_ending(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Completed, failed and cancelled all end a wait."""
    runs = [await client.launch(make_config(), backend="scripted") for _ in range(3)]
    backend.finish(str(runs[0].remote_id))
    backend.fail(str(runs[1].remote_id))
    backend.say(str(runs[2].remote_id), TrainingStatus.CANCELLED)
    over = await client.wait(*(run.id for run in runs), timeout=10)
    assert [run.status.value for run in over] == ["completed", "failed", "cancelled"]


async def test_wait_times_out_while_the_run_goes_on(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Giving up waiting is not giving up the run; the message counts the unfinished ones."""
    run = await client.launch(make_config(), backend="scripted")
    ended = await client.launch(make_config(), backend="scripted")
    backend.finish(str(ended.remote_id))
    await client.status(ended.id)
    with pytest.raises(WaitTimeout, match=r"after 0.05 s; 1 run is still in progress\."):
        await client.wait(run.id, ended.id, timeout=0.05)
    assert (await client.get(run.id)).status is TrainingStatus.RUNNING


async def test_wait_knows_a_wrong_id_at_once(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A typo behind a run that goes on is not waited for."""
    run = await client.launch(make_config(), backend="scripted")
    with pytest.raises(RunNotFound):
        await client.wait(run.id, "typo", timeout=10)


async def test_a_finished_run_never_changes(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What a provider says after the end does not undo it."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    await client.status(run.id)
    backend.say(str(run.remote_id), TrainingStatus.RUNNING)
    assert (await client.status(run.id)).status is TrainingStatus.COMPLETED


async def test_what_is_told_after_the_end_is_kept_and_logged(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that was under way when another process saw the end changes nothing."""
    run = await client.launch(make_config(), backend="scripted")

    async def late(asked: TrainingRun, *, after: str | None = None) -> Observation:
        over = RunState(status=TrainingStatus.COMPLETED)
        await anyio.to_thread.run_sync(
            client._store.update, asked.id, lambda now: now.updated(over)
        )
        busy = RunState(status=TrainingStatus.RUNNING, raw_status="BUSY")
        return Observation(busy, cursor=after)

    monkeypatch.setattr(backend, "observe", late)
    with capture_logs() as entries:
        seen = await client.status(run.id)
    assert (seen.status, seen.raw_status) == (TrainingStatus.COMPLETED, "BUSY")
    assert [entry["told"] for entry in entries if entry["log_level"] == "warning"] == ["BUSY"]


async def test_logs_follow_to_the_end_and_the_record_is_up_to_date(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Following ends with the run, and the store knows how it ended."""
    run = await client.launch(make_config(), backend="scripted")
    remote_id = str(run.remote_id)
    messages = []
    backend.log(remote_id, "one")
    async with aclosing(client.logs(run.id, follow=True)) as records:
        async for record in records:
            messages.append(record.message)
            if record.message == "one":
                backend.log(remote_id, "two")
                backend.finish(remote_id)
    assert messages == ["running", "one", "two", "completed"]
    assert (await client.get(run.id)).status is TrainingStatus.COMPLETED


async def test_logs_go_on_behind_a_cursor(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Nothing is repeated and nothing is left out."""
    run = await client.launch(make_config(), backend="scripted")
    for number in range(4):
        backend.log(str(run.remote_id), str(number))
    seen = [record async for record in client.logs(run.id)]
    assert [record.message for record in seen] == ["running", "0", "1", "2", "3"]
    rest = [record.message async for record in client.logs(run.id, after=seen[2].cursor)]
    assert rest == ["2", "3"]


async def test_a_failed_run_is_resumed_as_a_new_one(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The new run says what it continues."""
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))
    await client.status(run.id)
    resumed = await client.resume(run.id, new_id="second")
    assert (resumed.id, resumed.resumed_from) == ("second", run.id)


async def test_a_resumed_run_is_resumed_at_the_same_estimate(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """However often: a price that was known is not asked about as unknown."""
    backend.price = Money.model_validate("9 USD")
    run = await client.launch(make_config(), backend="scripted")
    estimates: list[Estimate] = []

    async def agree(estimate: Estimate) -> bool:
        estimates.append(estimate)
        return True

    for _ in range(2):
        backend.fail(str(run.remote_id), "preempted")
        await client.refresh(run.id)
        run = await client.resume(run.id, confirm=agree)
    assert estimates == [run.estimate, run.estimate]
    assert run.estimate is not None


async def test_a_running_run_is_not_resumed(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """There is nothing to continue."""
    run = await client.launch(make_config(), backend="scripted")
    with pytest.raises(UnsupportedOperation, match="running"):
        await client.resume(run.id)


async def test_a_model_is_asked_with_a_conversation(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """If its backend takes one; a single message is asked by any."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    first: ChatMessage = {"role": "system", "content": "Be brief."}
    last: ChatMessage = {"role": "user", "content": "hello"}
    assert (await client.sample(run.id, [first, last])).answer == "hello"
    backend._capabilities = backend.capabilities.model_copy(update={"samples_chats": False})
    assert (await client.sample(run.id, [last])).answer == "hello"
    with pytest.raises(UnsupportedOperation, match="conversation"):
        await client.sample(run.id, [first, last])


@pytest.mark.parametrize(
    "prompt",
    [[], [{"role": "robot", "content": "hi"}], [{"role": "assistant", "content": "hi"}], 5],
)
async def test_a_malformed_conversation_is_a_value_error(
    client: AsyncTrainingClient, prompt: Any
) -> None:
    """Before the run is looked up."""
    with pytest.raises(ValueError, match="prompt"):
        await client.sample("none", prompt)


async def test_only_a_completed_run_is_downloaded_or_asked(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig, tmp_path: Path
) -> None:
    """There is no half of a model."""
    run = await client.launch(make_config(), backend="scripted")
    with pytest.raises(UnsupportedOperation):
        await client.download(run.id, tmp_path / "model")
    with pytest.raises(UnsupportedOperation):
        await client.sample(run.id, "hello")
    backend.finish(str(run.remote_id))
    assert (await client.sample(run.id, "hello", max_tokens=4)).answer == "hell"
    path = await client.download(run.id, tmp_path / "model")
    assert (path / "model.txt").read_text() == run.id
    with pytest.raises(UnsupportedOperation, match="download a checkpoint"):
        await client.download(run.id, tmp_path / "other", checkpoint="1")


async def test_a_deleted_run_is_gone(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Afterwards nobody knows it."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    await client.delete(run.id)
    with pytest.raises(RunNotFound):
        await client.get(run.id)


async def test_verbs_take_complete_ids_only(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Repeating the delete of `exp-1`, as a retried step does, leaves `exp-10` alone."""
    for name in ("exp-1", "exp-10"):
        run = await client.launch(make_config(), backend="scripted", run_id=name)
        backend.finish(str(run.remote_id))
    live = await client.launch(make_config(), backend="scripted", run_id="exp-100")
    await client.delete("exp-1")
    for touch in (
        lambda: client.delete("exp-1"),
        lambda: client.stop("exp-1"),
        lambda: client.get("exp-1"),
        lambda: client.status("exp-1"),
        lambda: client.wait("exp-1"),
        lambda: client.resume("exp-1"),
        lambda: client.metrics("exp-1"),
        lambda: client.download("exp-1", tmp_path / "model"),
        lambda: client.sample("exp-1", "?"),
        lambda: read_log(client, "exp-1"),
    ):
        with pytest.raises(RunNotFound) as caught:
            await touch()
        assert caught.value.candidates == ("exp-10", "exp-100")
    assert (await client.status("exp-10")).status is TrainingStatus.COMPLETED
    assert (await client.status(live.id)).status is TrainingStatus.RUNNING


async def test_a_live_run_is_not_deleted(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """Deleting would lose what still costs money."""
    run = await client.launch(make_config(), backend="scripted")
    with pytest.raises(UnsupportedOperation, match="running"):
        await client.delete(run.id)


async def test_an_unknown_backend_names_the_nearest(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A misspelt name is answered with the right one."""
    with pytest.raises(ConfigError) as caught:
        await client.launch(make_config(), backend="mistrl")
    assert caught.value.issues[0].fix == "did you mean 'mistral'?"


@pytest.mark.parametrize("run_id", ["", "../etc", "a b", "x" * 129])
async def test_an_id_that_cannot_be_a_name_is_refused(
    client: AsyncTrainingClient, make_config: MakeConfig, run_id: str
) -> None:
    """Ids become file names, so they are plain."""
    with pytest.raises(ConfigError, match="id"):
        await client.launch(make_config(), backend="scripted", run_id=run_id)


class CutOff(BaseException):
    """Ends a launch where it stands, as the end of the process does."""


def cut_off() -> None:
    raise CutOff


async def cut_off_launch(
    client: AsyncTrainingClient, backend: ScriptedBackend, config: TrainingConfig
) -> None:
    """Leave a run that is recorded and has no job."""
    backend.before_create = cut_off
    with pytest.raises(CutOff):
        await client.launch(config, backend="scripted", run_id="mine")
    backend.before_create = lambda: None


async def test_a_run_without_a_job_is_cancelled_at_once(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A launch that was cut off and stopped is not taken up again."""
    await cut_off_launch(client, backend, make_config())
    stopped = await client.stop("mine")
    again = await client.launch(make_config(), backend="scripted", run_id="mine")
    assert (stopped.status, again.status, backend.created) == (
        TrainingStatus.CANCELLED,
        TrainingStatus.CANCELLED,
        [],
    )


@pytest.mark.parametrize("cut", ["before its id is known", "before its id is stored"])
async def test_the_job_of_an_interrupted_launch_is_found_and_stopped(
    cut: str,
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To call its run cancelled would leave a job that trains and costs."""
    with monkeypatch.context() as patch:
        if cut == "before its id is known":
            patch.setattr(backend, "after_create", cut_off)
        else:
            patch.setattr(StoreJournal, "record", Mock(side_effect=CutOff))
        with pytest.raises(CutOff):
            await client.launch(make_config(), backend="scripted", run_id="mine")
    stopped = await client.stop("mine")
    assert (stopped.status, stopped.remote_id) == (TrainingStatus.STOPPING, backend.created[0])
    assert len(backend.created) == 1


class Branching(ScriptedBackend):
    """Takes another way when a launch is repeated, as with a file that has changed since."""

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Begin with a step of this launch only."""

        async def do() -> str:
            return "done"

        await journal.step(f"first of {len(self.created)}", do)
        return await super().launch(run, journal)


async def test_a_run_that_may_have_a_job_is_not_called_cancelled(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Where it cannot be found out whether an interrupted launch has created a job."""
    backend = Branching()
    backend.after_create = cut_off
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        with pytest.raises(CutOff):
            await client.launch(make_config(), backend="scripted", run_id="mine")
        with pytest.raises(UnsupportedOperation, match="may have a job") as caught:
            await client.stop("mine")
        assert "Repeat the launch" in str(caught.value.hint)
        assert (await client.get("mine")).status is TrainingStatus.PENDING


async def test_a_run_being_launched_elsewhere_is_not_called_cancelled(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would get its job all the same, and nobody would know."""
    monkeypatch.setattr(launch, "LAUNCH_PATIENCE", 0.1)
    await cut_off_launch(client, backend, make_config())
    async with other._leases.hold(launch_lease("mine")):
        with pytest.raises(UnsupportedOperation, match="being launched"):
            await client.stop("mine")
    assert (await client.get("mine")).status is TrainingStatus.PENDING


async def test_a_run_that_gets_its_job_while_it_is_stopped_is_stopped_there(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """A stop waits for the launch that goes on, then ends what came of it."""
    await cut_off_launch(client, backend, make_config())
    stopped: list[TrainingRun] = []

    async def stop() -> None:
        stopped.append(await other.stop("mine"))

    async with anyio.create_task_group() as tasks, client._leases.hold(launch_lease("mine")):
        tasks.start_soon(stop)
        await anyio.wait_all_tasks_blocked()  # the stop waits for the lease
        run = await other.get("mine")
        remote = RunState(status=TrainingStatus.RUNNING, remote_id="job")
        backend.adopt("job")
        await anyio.to_thread.run_sync(
            client._store.update, run.id, lambda now: now.updated(remote)
        )
    assert [run.status for run in stopped] == [TrainingStatus.STOPPING]


class Announcing(ScriptedBackend):
    """Records the run's id at the provider before the provider has it."""

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Announce, then fail as on a full disk."""
        await journal.record(RunState(status=TrainingStatus.PENDING, remote_id=run.id))
        raise OSError(28, "No space left on device")


async def test_a_run_announced_but_never_started_can_be_ended_and_deleted(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """The provider does not know it, which says that there is nothing to end there."""
    backends = {"scripted": Announcing()}
    async with AsyncTrainingClient(home=tmp_path / "home", backends=backends) as client:
        with pytest.raises(BackendBroken, match="space") as caught:
            await client.launch(make_config(), backend="scripted", run_id="mine")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.retryable
        assert (await client.status("mine")).status is TrainingStatus.PENDING
        assert (await client.stop("mine")).status is TrainingStatus.CANCELLED
        await client.delete("mine")
        assert await client.list() == []


async def test_a_launched_run_that_the_provider_lost_is_not_called_cancelled(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Not knowing a run that was started is an error, not an ending."""
    run = await client.launch(make_config(), backend="scripted")
    backend.lose(str(run.remote_id))
    with pytest.raises(RunNotFound):
        await client.stop(run.id)
    assert (await client.get(run.id)).status is TrainingStatus.RUNNING


async def test_a_delete_that_was_cut_off_is_finished(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What the provider has forgotten already does not keep the record for ever."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    await client.status(run.id)
    backend.lose(str(run.remote_id))
    await client.delete(run.id)
    assert await client.list() == []


async def test_a_run_whose_launch_was_cut_off_is_not_waited_for(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Nothing would ever happen, so waiting says so and what to do."""
    await cut_off_launch(client, backend, make_config())
    with pytest.raises(UnsupportedOperation, match="interrupted") as caught:
        await client.wait("mine", timeout=10)
    assert "--id mine" in str(caught.value.hint)


async def test_a_resumption_cut_off_goes_on_as_a_resumption(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Repeated, it starts from the checkpoint that was asked for, not from nothing."""
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))
    backend.before_create = cut_off
    with pytest.raises(CutOff):
        await client.resume(run.id, checkpoint="step-5", new_id="second")
    backend.before_create = lambda: None
    await client.resume("second")
    assert backend.resumed == [(run.id, "second", "step-5")] * 2


async def test_a_resume_asks_first_how_the_run_stands(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A run that failed since it was last seen can be resumed."""
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))
    assert (await client.resume(run.id)).resumed_from == run.id


async def test_a_checkpoint_that_was_refused_is_not_held_on_to(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """The same resumption works with another one, or with none."""
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))
    backend.before_create = backend.refusing(ConfigError("There is no checkpoint '7'."))
    with pytest.raises(ConfigError):
        await client.resume(run.id, checkpoint="7", new_id="second")
    backend.before_create = lambda: None
    await client.resume(run.id, new_id="second")
    assert backend.resumed[-1] == (run.id, "second", None)


async def test_a_resumption_under_way_keeps_its_checkpoint(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """Another one under the same id is a conflict, not silently left aside."""
    run = await client.launch(make_config(), backend="scripted")
    backend.fail(str(run.remote_id))
    backend.before_create = cut_off
    with pytest.raises(CutOff):
        await client.resume(run.id, checkpoint="5", new_id="second")
    backend.before_create = lambda: None
    with pytest.raises(DuplicateRun, match="resumed from 5"):
        await client.resume(run.id, checkpoint="6", new_id="second")


async def test_a_relative_path_is_stored_as_an_absolute_one(
    client: AsyncTrainingClient,
    train_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The training process runs in another directory."""
    monkeypatch.chdir(train_file.parent)
    config = TrainingConfig.model_validate(
        {"model": "tiny-mistral", "data": {"train": train_file.name}}
    )
    report = await client.validate(config, backend="scripted")
    run = await client.launch(config, backend="scripted")
    assert report.ok
    assert [source.path for source in run.config.data.train] == [train_file]


@pytest.mark.parametrize("form", ["mapping", "path", "text"])
async def test_a_configuration_is_taken_in_any_form(
    client: AsyncTrainingClient, make_config: MakeConfig, tmp_path: Path, form: str
) -> None:
    """A mapping, or the path of a YAML file, works wherever a TrainingConfig does."""
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny-mistral\ndata: {train: train.jsonl}\n")
    config: Any = {
        "mapping": {"model": "tiny-mistral", "data": {"train": tmp_path / "train.jsonl"}}
    }
    config = config.get(form, str(path) if form == "text" else path)
    assert (await client.validate(config, backend="scripted")).ok
    assert (await client.estimate(config, backend="scripted")).steps == 10
    run = await client.launch(config, backend="scripted")
    assert run.config == make_config()


@pytest.mark.parametrize(
    ("method", "arguments", "name"),
    [
        ("launch", {"config": 3, "backend": "scripted"}, "config"),
        ("launch", {"config": {}, "backend": None}, "backend"),
        ("get", {"run_id": 7}, "run_id"),
        ("stop", {"run_id": None}, "run_id"),
        ("resume", {"run_id": "mine", "new_id": 7}, "new_id"),
    ],
)
async def test_a_wrong_type_is_a_type_error_that_names_the_parameter(
    client: AsyncTrainingClient, method: str, arguments: dict[str, Any], name: str
) -> None:
    """Not an error about something else."""
    with pytest.raises(TypeError, match=f"{name} must be a"):
        await getattr(client, method)(**arguments)


async def test_a_run_id_of_another_type_is_a_type_error(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A number is not turned into an id."""
    with pytest.raises(TypeError, match="run_id must be a str, not int"):
        await client.launch(make_config(), backend="scripted", run_id=7)  # type: ignore[arg-type]


async def test_runs_are_listed_by_the_word_of_a_status(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A word works like the enum; one that does not exist names those that do."""
    run = await client.launch(make_config(), backend="scripted")
    assert [found.id for found in await client.list(status="running")] == [run.id]
    assert await client.list(status="completed") == []
    with pytest.raises(ValueError, match=r"one of .*completed.*, not 'done'"):
        await client.list(status="done")


async def test_an_unknown_option_without_a_value_is_an_error(
    client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """A misspelt option is found before its value is written."""
    report = await client.validate(make_config(options={"gpus": None}), backend="scripted")
    assert report.errors[0].field == "options.gpus"


@pytest.mark.parametrize("change", ["none", "same content", "same size", "longer", "removed"])
async def test_a_repeated_launch_says_whether_the_data_has_changed(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    train_file: Path,
    change: str,
) -> None:
    """The run that exists was trained on other data than is there now."""
    run = await client.launch(make_config(), backend="scripted", run_id="mine")
    backend.finish(str(run.remote_id))
    await client.status("mine")
    text = train_file.read_text()
    match change:
        case "same content":
            train_file.write_text(text)
            os.utime(train_file, (1, 1))
        case "same size":
            train_file.write_text(text.replace("0", "1"))
            os.utime(train_file, (1, 1))
        case "longer":
            train_file.write_text(text * 2)
        case "removed":
            train_file.unlink()
    said: list[str] = []
    await client.launch(make_config(), backend="scripted", run_id="mine", on_notice=said.append)
    assert said[0] == "Run mine already exists (completed); nothing launched."
    changed = [f"Data file {train_file} has changed since run mine was launched."]
    assert said[1:] == ([] if change in {"none", "same content"} else changed)


async def test_a_draft_is_deleted(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A launch that was rejected before the provider had anything leaves nothing to stop."""
    backend.before_create = backend.refusing(ConfigError("no key"))
    with pytest.raises(ConfigError):
        await client.launch(make_config(), backend="scripted", run_id="mine")
    await client.delete("mine")
    assert await client.list() == []


async def test_a_draft_that_may_have_a_job_is_not_deleted(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Its record is all that leads to a job that may cost money."""
    await cut_off_launch(client, backend, make_config())
    with pytest.raises(UnsupportedOperation, match="may have a job"):
        await client.delete("mine")
    assert [run.id for run in await client.list()] == ["mine"]


async def test_a_paused_run_continues_in_place(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Pausing and unpausing are safe to repeat; a paused run is not resumed as a new one."""
    run = await client.launch(make_config(), backend="scripted")
    for _ in range(2):
        assert (await client.pause(run.id)).status is TrainingStatus.PAUSED
    with pytest.raises(UnsupportedOperation, match="resume a run that is paused"):
        await client.resume(run.id)
    for _ in range(2):
        assert (await client.unpause(run.id)).status is TrainingStatus.RUNNING
    await client.pause(run.id)
    assert (await client.stop(run.id)).status is TrainingStatus.STOPPING
    assert [found.id for found in await client.list()] == [run.id]


async def test_only_a_run_in_progress_can_be_paused(
    tmp_path: Path, client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Neither a finished one nor one of a backend that does not declare it."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    for ask in (client.pause, client.unpause):
        with pytest.raises(UnsupportedOperation, match="completed"):
            await ask(run.id)
    lacking = ScriptedBackend(capabilities=Capabilities())
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": lacking}) as other:
        run = await other.launch(make_config(), backend="scripted")
        for ask in (other.pause, other.unpause):
            with pytest.raises(UnsupportedOperation, match="cannot pause runs"):
                await ask(run.id)


async def test_a_wait_reports_a_paused_run_and_goes_on(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Until it is unpaused and finishes."""
    run = await client.launch(make_config(), backend="scripted")
    backend.say(str(run.remote_id), TrainingStatus.PAUSED)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.wait, run.id)
            await until(lambda: any("paused" in entry["event"] for entry in logs))
            backend.finish(str(run.remote_id))
    assert (await client.get(run.id)).status is TrainingStatus.COMPLETED


async def test_a_wait_returns_once_a_run_is_paused(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A run that is past the status is returned at once; the record may be older than the pause."""
    run = await client.launch(make_config(), backend="scripted")
    await client.status(run.id)
    backend.say(str(run.remote_id), TrainingStatus.PAUSED)
    asked = len(backend.looks)
    (seen,) = await client.wait(run.id, until="running")
    assert (seen.status, len(backend.looks)) == (TrainingStatus.RUNNING, asked)
    (seen,) = await client.wait(run.id, until=["paused", "finished"], timeout=30)
    assert seen.status is TrainingStatus.PAUSED
    backend.say(str(run.remote_id), TrainingStatus.RUNNING)
    with pytest.raises(WaitTimeout):
        await client.wait(run.id, until="paused", timeout=0.3)
    with pytest.raises(ValueError, match="'over' is not one of: finished, pending"):
        await client.wait(run.id, until="over")


async def test_a_wait_reports_a_run_that_finishes_without_the_status(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """It is returned as it ended, and `has_reached` tells."""
    run = await client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    for _ in range(2):  # known to the provider only, and recorded
        with capture_logs() as logs:
            (done,) = await client.wait(run.id, until="paused", timeout=30)
        assert [entry["run_id"] for entry in logs if "finished before" in entry["event"]] == [
            run.id
        ]
        assert not done.has_reached(TrainingStatus.PAUSED)
        assert done.has_reached(TrainingStatus.RUNNING)


async def test_a_backend_that_cannot_resume_leaves_no_record(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """The client asks the capabilities before it makes the new run."""
    backend = ScriptedBackend(capabilities=Capabilities())
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        run = await client.launch(make_config(), backend="scripted")
        backend.fail(str(run.remote_id))
        with pytest.raises(UnsupportedOperation, match="cannot resume"):
            await client.resume(run.id, new_id="second")
        assert [found.id for found in await client.list()] == [run.id]


async def test_a_checkpoint_is_refused_where_a_run_is_resumed_anew(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Before the new run is recorded, and before the backend is asked."""
    backend = ScriptedBackend(capabilities=Capabilities(resumes="anew"))
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        run = await client.launch(make_config(), backend="scripted")
        backend.fail(str(run.remote_id))
        with pytest.raises(UnsupportedOperation, match="from a checkpoint"):
            await client.resume(run.id, checkpoint="1")
        assert [found.id for found in await client.list()] == [run.id]
        assert backend.resumed == []


async def test_an_undeclared_field_ends_the_launch_before_the_backend_is_asked(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """`validate`, `estimate` and `launch` name it, and there is no record."""
    backend = ScriptedBackend(capabilities=Capabilities(hyperparameters=frozenset({"epochs"})))
    backend.report = ValidationReport(issues=(Issue(code="asked", message="asked"),))
    config = make_config(hyperparameters={"seed": 1})
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        report = await client.validate(config, backend="scripted")
        assert [issue.field for issue in report.errors] == ["hyperparameters.seed"]
        for ask in (client.estimate, client.launch):
            with pytest.raises(ConfigError, match="not valid for the backend") as caught:
                await ask(config, backend="scripted")
            assert caught.value.issues == report.errors
        assert await client.list() == []


async def test_a_backend_may_need_neither_model_nor_data_nor_rows(tmp_path: Path) -> None:
    """Files of any content only have to exist, and data elsewhere is not looked at."""
    capabilities = Capabilities(
        needs_model=False, needs_data=False, inspects=False, data=frozenset({"file", "uri"})
    )
    backend = ScriptedBackend(capabilities=capabilities)
    table = tmp_path / "table.csv"
    table.write_text("a,b\n")
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        data = {"train": [table, tmp_path, "s3://bucket/x"]}
        run = await client.launch({"data": data}, backend="scripted")
        assert [str(source) for source in run.config.data.train] == list(map(str, data["train"]))
        assert (await client.launch({}, backend="scripted")).config.model is None
        with pytest.raises(DatasetError) as caught:
            await client.launch({"data": {"train": tmp_path / "none"}}, backend="scripted")
        assert [issue.code for issue in caught.value.issues] == ["missing_file"]


async def test_a_run_that_was_never_started_is_not_resumed(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Stopped before its launch, there is nothing to continue, and no second record."""
    backend.before_create = backend.refusing(ConfigError("no key"))
    with pytest.raises(ConfigError):
        await client.launch(make_config(), backend="scripted", run_id="mine")
    await client.stop("mine")
    with pytest.raises(UnsupportedOperation, match="never started"):
        await client.resume("mine")
    assert len(await client.list()) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.list(),
        lambda client: client.get("mine"),
        lambda client: client.validate({}, backend="scripted"),
        lambda client: client.watch(),
    ],
)
async def test_a_closed_client_raises(
    client: AsyncTrainingClient, call: Callable[[Any], Awaitable[object]]
) -> None:
    """Its leases are not renewed any more, so it must not launch either; closing again is safe."""
    await client.aclose()
    await client.aclose()
    with pytest.raises(TrainingBackendError, match="is closed"):
        await call(client)
