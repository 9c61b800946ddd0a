"""The verbs of the backend over the scripted provider: state, log, stop, pause, lists, errors."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from tests.backends.openai.conftest import KEY, MODEL, Secrets
from training_backends import (
    AuthenticationFailed,
    BackendRetired,
    BackendUnavailable,
    ConfigError,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.core.backend import RemoteFilters
from training_backends.core.run import Observation
from training_backends.datasets.inspect import inspect
from training_backends.protocols.openai.events import STARTED
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytestmark = pytest.mark.anyio
NewJournal = Callable[..., MemoryJournal]
Make = Callable[..., OpenAIBackend]


@pytest.fixture
async def run(backend: OpenAIBackend, make_journal: NewJournal) -> TrainingRun:
    """Launch a run."""
    journal = make_journal()
    return journal.run.updated(await backend.launch(journal.run, journal))


def job_id(run: TrainingRun) -> str:
    """Return the provider job id."""
    return str(run.remote_id)


# -- state and log ---------------------------------------------------------------------


async def test_one_observation_shows_a_whole_life(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """State, metrics of every step, checkpoints and model come from job, events and checkpoints."""
    provider.run_to(job_id(run), "succeeded")
    seen = await backend.observe(run)
    state = seen.state
    assert (state.status, state.raw_status) == (TrainingStatus.COMPLETED, "succeeded")
    assert state.result_model is not None
    assert state.result_model.startswith(f"ft:{MODEL}:")
    assert (state.step, state.total_steps) == (2, 2)
    assert state.metrics is not None
    assert set(state.metrics) == {"train_loss", "train_mean_token_accuracy"}
    assert state.started_at is not None
    assert state.finished_at is not None
    assert state.checkpoints is not None
    assert [point.step for point in state.checkpoints] == [2]
    metrics = [record for record in seen.records if record.source == "metrics"]
    assert [record.step for record in metrics] == [1, 2]
    exact = provider.jobs[job_id(run)].metrics[0].train_loss
    assert metrics[0].fields["train_loss"] == exact
    assert seen.records[0].message == f"Created fine-tuning job: {run.remote_id}"


async def test_log_continues_in_another_process(
    make_backend: Make, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """Events behind a cursor come once, oldest first, also beyond a page."""
    seen: list[str] = []
    after: str | None = None
    for round_ in range(4):
        for number in range(130 if round_ == 1 else 3):
            provider.add_event(job_id(run), f"{round_} {number}")
        backend = make_backend()
        look: Observation = await backend.observe(run, after=after)
        again = await backend.observe(run, after=look.cursor)
        await backend.aclose()
        assert (again.records, again.cursor) == ((), look.cursor)
        seen += [record.message for record in look.records]
        middle = look.records[len(look.records) // 2].cursor
        rest = await backend.observe(run, after=middle)
        await backend.aclose()
        assert rest.records == look.records[len(look.records) // 2 + 1 :]
        after = look.cursor
    assert seen == [event["message"] for event in provider.jobs[job_id(run)].events]


async def test_nothing_new_costs_two_requests(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """Checkpoints are only requested if there are new events, or at the end."""
    seen = await backend.observe(run)
    before = len(provider.requests)
    again = await backend.observe(run, after=seen.cursor)
    assert len(provider.requests) - before == 2
    assert again.state.checkpoints is None


@pytest.mark.parametrize("says_has_more", [True, False])
async def test_metrics_are_parsed_from_the_text(
    backend: OpenAIBackend,
    provider: ScriptedOpenAIProvider,
    run: TrainingRun,
    *,
    says_has_more: bool,
) -> None:
    """A server that sends no data has the losses in the message."""
    provider.sends_metrics_data = False
    provider.says_has_more = says_has_more
    provider.run_to(job_id(run), "succeeded")
    records = (await backend.observe(run)).records
    losses = [record.fields for record in records if record.source == "metrics"]
    assert losses == [{"train_loss": 1.82}, {"train_loss": 1.67}]


@pytest.mark.parametrize("coding", ["plain", "base64"])
async def test_result_file_has_the_metrics_that_events_lack(
    coding: str, backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """Rows of the CSV follow the last event, each once."""
    provider.result_coding = coding  # type: ignore[assignment]
    provider.run_to(job_id(run), "succeeded")
    job = provider.jobs[job_id(run)]
    job.events = [event for event in job.events if event["type"] == "message"]
    seen = await backend.observe(run)
    assert [record.step for record in seen.records[-2:]] == [1, 2]
    assert seen.records[-1].fields["train_loss"] == job.metrics[-1].train_loss
    assert (await backend.observe(run, after=seen.records[-2].cursor)).records == seen.records[-1:]
    assert (await backend.observe(run, after=seen.cursor)).records == ()


async def test_unknown_status_is_kept_raw(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """A word of no specification is unknown, and `paused` has a status of its own."""
    for word, status in (("reticulating", "unknown"), ("paused", "paused"), ("pending", "pending")):
        provider.set_status(job_id(run), word)
        state = (await backend.observe(run)).state
        assert (state.status, state.raw_status) == (TrainingStatus(status), word)


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        ("invalid_n_examples", "validation", False),
        ("exceeded_quota", "quota", False),
        ("server_error", "provider", True),
    ],
)
async def test_failure_has_a_kind_and_the_reason(
    code: str,
    kind: str,
    retryable: bool,
    *,
    backend: OpenAIBackend,
    provider: ScriptedOpenAIProvider,
    run: TrainingRun,
) -> None:
    """The job's error says why it failed."""
    provider.fail_job(job_id(run), code=code, message="It broke.")
    failure = (await backend.status(run)).failure
    assert failure is not None
    assert (failure.kind, failure.retryable) == (kind, retryable)
    assert failure.message == f"It broke. ({code})"


async def test_cursor_of_another_backend_is_rejected(
    backend: OpenAIBackend, run: TrainingRun
) -> None:
    """A cursor that is none is an error of the caller."""
    with pytest.raises(ConfigError, match="Invalid log cursor"):
        await backend.observe(run, after="banana")


# -- stop and pause --------------------------------------------------------------------


async def test_stop_is_repeatable_and_leaves_finished_jobs_alone(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """A lost response is looked up; a job that has ended by itself is no error."""
    provider.fail(LoseAnswer(), method="POST", path="/cancel", times=2)
    await backend.stop(run)
    await backend.stop(run)
    assert provider.jobs[job_id(run)].status == "cancelled"
    provider.jobs[job_id(run)].status = "running"
    answer = provider.answer

    def finish_first(request):  # type: ignore[no-untyped-def]
        if request.method == "POST":
            provider.set_status(job_id(run), "succeeded")
        return answer(request)

    provider.answer = finish_first  # type: ignore[method-assign]
    await backend.stop(run)
    assert provider.jobs[job_id(run)].status == "succeeded"


async def test_pause_and_unpause(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """Both are repeatable; what a status does not allow is the provider's error."""
    with pytest.raises(ConfigError, match="not running"):
        await backend.pause(run)
    provider.run_to(job_id(run), "running")
    provider.pauses_at_once = False
    await backend.pause(run)
    await backend.pause(run)
    assert (await backend.status(run)).raw_status == "pausing"
    provider.advance(job_id(run))
    await backend.unpause(run)
    await backend.unpause(run)
    assert provider.jobs[job_id(run)].status == "queued"


# -- lists -----------------------------------------------------------------------------


async def test_listed_jobs_are_restored_with_their_runs(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """Every job is listed, ours with the id of its run; filters apply."""
    strangers = provider.add_job({"model": MODEL, "training_file": "file-x", "suffix": "theirs"})
    listed = {entry.remote_id: entry for entry in await backend.list_remote(RemoteFilters())}
    assert listed[job_id(run)].run_id == run.id
    assert listed[strangers].run_id is None
    assert listed[strangers].config is not None
    for filters in ({"suffix": "theirs"}, {"status": "running"}):
        (entry,) = await backend.list_remote(RemoteFilters.model_validate(filters))
        assert entry.remote_id == strangers


async def test_many_statuses_are_one_request(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """The job list answers for all runs; one that is gone is left out."""
    runs = [
        TrainingRun(
            id=f"r{n}",
            backend="openai",
            config=config,
            remote_id=provider.add_job({"model": MODEL, "training_file": "f"}),
        )
        for n in range(10)
    ]
    gone = runs[0].model_copy(update={"id": "gone", "remote_id": "ftjob-none"})
    before = len(provider.requests)
    found = await backend.statuses([*runs, gone])
    assert len(provider.requests) - before == 1
    assert {state.status for state in found.values()} == {TrainingStatus.RUNNING}
    assert set(found) == {run.id for run in runs}


# -- estimate --------------------------------------------------------------------------


async def test_estimate_has_a_cost_only_with_a_price(
    make_backend: Make, make_config: Callable[..., TrainingConfig]
) -> None:
    """Tokens are counted; the price comes from the settings, or the cost is noted as unknown."""
    config = make_config(hyperparameters={"epochs": 2, "batch_size": 10})
    dataset = inspect(config)
    unpriced = await make_backend().estimate(config, dataset)
    assert unpriced.data_tokens is not None
    assert unpriced.train_tokens == 2 * unpriced.data_tokens
    assert (unpriced.steps, unpriced.epochs, unpriced.cost) == (4, 2, None)
    assert any("openai.prices" in note for note in unpriced.notes)
    priced = await make_backend(prices={config.base_model: "3 USD"}).estimate(config, dataset)
    assert priced.cost is not None
    assert priced.cost.amount == Decimal(3) * unpriced.train_tokens / 10**6


async def test_finished_run_has_the_cost_of_its_trained_tokens(
    make_backend: Make, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """The provider's own count of tokens replaces ours, where the settings have a price."""
    provider.run_to(job_id(run), "succeeded")
    backend = make_backend(prices={MODEL: "3 USD"})
    state = (await backend.observe(run)).state
    await backend.aclose()
    trained = provider.jobs[job_id(run)].trained_tokens
    assert trained is not None
    assert state.usage == {"trained_tokens": Decimal(trained)}
    assert state.cost is not None
    assert state.cost.amount == Decimal(3) * trained / 10**6


async def test_paused_run_keeps_its_start(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, run: TrainingRun
) -> None:
    """A job that continues after a pause starts a second time, its run does not."""
    provider.run_to(job_id(run), "running")
    seen = await backend.observe(run)
    provider.clock = lambda: 2_000_000_000
    provider.add_event(job_id(run), STARTED)
    state = (await backend.observe(run.updated(seen.state), after=seen.cursor)).state
    assert state.started_at == seen.state.started_at


# -- download --------------------------------------------------------------------------


@pytest.fixture
def weights(provider: ScriptedOpenAIProvider, run: TrainingRun) -> dict[str, bytes]:
    """Let the run succeed as at Nebius: the files of a checkpoint, and no model in the job."""
    provider.run_to(job_id(run), "succeeded")
    job = provider.jobs[job_id(run)]
    job.fine_tuned_model = None
    content = {"config.json": b"{}", "adapter/adapter_model.safetensors": b"weights" * 1000}
    for step, files in ((1, {"config.json": b"old"}), (2, content)):
        provider.add_checkpoint(job.id, step)
        job.checkpoints[-1]["result_files"] = [
            provider.add_file(data, filename=name, purpose="fine-tune-results")
            for name, data in files.items()
        ]
    return content


async def test_weights_are_the_files_of_the_newest_checkpoint(
    make_backend: Make, run: TrainingRun, weights: dict[str, bytes], tmp_path: Path
) -> None:
    """At Nebius, a download is a directory with the provider's names."""
    backend = make_backend(variant="nebius")
    assert backend.capabilities.downloads
    target = await backend.download(run, tmp_path / "model")
    found = {
        str(path.relative_to(target)): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }
    assert found == weights
    with pytest.raises(ConfigError, match="not empty"):
        await backend.download(run, target)
    await backend.aclose()


@pytest.mark.usefixtures("weights")
async def test_broken_download_leaves_nothing(
    make_backend: Make, provider: ScriptedOpenAIProvider, run: TrainingRun, tmp_path: Path
) -> None:
    """Neither half of the files nor one whose name leads out of the directory."""
    backend = make_backend(variant="nebius", attempts=1)
    provider.fail(LoseAnswer(), path="/content", skip=1)
    with pytest.raises(BackendUnavailable):
        await backend.download(run, tmp_path / "new" / "model")
    for file in provider.files.values():
        file.filename = "../../escaped"
    with pytest.raises(ProtocolError, match="invalid name"):
        await backend.download(run, tmp_path / "new" / "model")
    await backend.aclose()
    assert not list((tmp_path / "new").iterdir())


async def test_openai_keeps_the_weights(
    backend: OpenAIBackend, run: TrainingRun, tmp_path: Path
) -> None:
    """Only Nebius has checkpoint files."""
    assert not backend.capabilities.downloads
    with pytest.raises(UnsupportedOperation, match="cannot download"):
        await backend.download(run, tmp_path / "model")


# -- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationFailed),
        (403, PermissionDenied),
        (404, RunNotFound),
        (410, BackendRetired),
        (429, RateLimited),
        (500, BackendUnavailable),
        (501, BackendRetired),
        (503, BackendUnavailable),
    ],
)
async def test_errors_have_their_class_and_no_key(
    status: int,
    kind: type[TrainingBackendError],
    *,
    make_backend: Make,
    provider: ScriptedOpenAIProvider,
    run: TrainingRun,
    make_journal: NewJournal,
) -> None:
    """A response that repeats the key does not show it in any message."""
    body = {"error": {"message": f"No: {KEY}", "code": None, "param": None, "type": "x"}}
    provider.fail(OtherAnswer(status=status, body=body), times=1000)
    backend, journal = make_backend(attempts=1, call_timeout=0.3), make_journal()
    for ask in (
        backend.observe(run),
        backend.stop(run),
        backend.list_remote(RemoteFilters()),
        backend.launch(journal.run, journal),
    ):
        with pytest.raises(kind) as caught:
            await ask
        assert KEY not in repr(caught.value) + str(caught.value) + str(caught.value.hint)
    health = await backend.health()
    await backend.aclose()
    assert not health.ok
    assert KEY not in health.message


async def test_health_tells_whether_it_is_set_up(
    make_backend: Make, secrets: Secrets, provider: ScriptedOpenAIProvider
) -> None:
    """It is an authenticated request of no cost, which also tells the clock."""
    backend = make_backend()
    health = await backend.health()
    await backend.aclose()
    assert health.ok
    assert health.clock_offset is not None
    secrets.values.clear()
    hosted = make_backend(base_url="https://api.openai.com/v1", variant=None)
    assert not (await hosted.health()).configured
    assert [request.method for request in provider.requests] == ["GET"]
