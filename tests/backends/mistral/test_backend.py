"""Status, logs, stop, resume and the rest, against a provider that moves by itself."""

import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

import anyio
import pytest

from training_backends import (
    AuthenticationFailed,
    BackendRetired,
    BackendUnavailable,
    ChatMessage,
    ConfigError,
    CredentialNotFound,
    DatasetError,
    LogRecord,
    RemoteFilters,
    RunNotFound,
    RunState,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import HOSTED_URL
from training_backends.core.backend import BackendContext, CredentialSource
from training_backends.core.registry import backend_class
from training_backends.protocols.mistral.status import JOB_STATUSES
from training_backends.testing.faults import DropRequest, Fault, LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
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
    state = await backend.launch(journal.run, journal)
    provider.auto = "none"
    provider.set_status(str(state.remote_id), "RUNNING")
    return journal.run


async def collect(
    backend: MistralAPIBackend, run: TrainingRun, **kwargs: object
) -> list[LogRecord]:
    """Read a log to its end."""
    async with aclosing(backend.logs(run, **kwargs)) as records:  # type: ignore[arg-type]
        return [record async for record in records]


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("QUEUED", "pending"),
        ("VALIDATING", "validating"),
        ("VALIDATED", "ready"),
        ("STARTED", "initializing"),
        ("RUNNING", "running"),
        ("CANCELLATION_REQUESTED", "stopping"),
        ("SUCCESS", "completed"),
        ("FAILED", "failed"),
        ("FAILED_VALIDATION", "failed"),
        ("CANCELLED", "cancelled"),
        ("SUCCEEDED", "unknown"),
        ("ON_HOLD", "unknown"),
    ],
)
async def test_each_word_has_its_status(
    word: str, status: str, backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """All ten words of the protocol map, and any other is unknown and kept as it came."""
    assert len(JOB_STATUSES) == 10
    provider.set_status(str(run.remote_id), word)
    state = await backend.status(run)
    assert (state.status.value, state.raw_status) == (status, word)


async def test_many_calls_need_one_connection(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A launch and a hundred looks at it go over a single connection."""
    for _ in range(100):
        await backend.status(run)
    assert len(provider.requests) > 100
    assert provider.connections == 1


async def test_lost_runs_are_left_out_and_trouble_is_not(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A run that the provider lost is left out; a wrong key is an error, never an empty answer."""
    gone = run.model_copy(update={"id": "gone", "remote_id": "0" * 36})
    assert list(await backend.statuses([run, gone])) == [run.id]
    provider.key = "another"
    with pytest.raises(AuthenticationFailed):
        await backend.statuses([run, gone])


async def test_logs_tell_the_life(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """Logs exist: events, status changes and checkpoints, and they end with the run."""
    job_id = str(run.remote_id)
    provider.add_checkpoint(job_id, 10, train_loss=1.5)
    provider.set_status(job_id, "SUCCESS")
    told = await collect(backend, run, follow=True)
    assert [record.message for record in told] == [
        "QUEUED",
        "VALIDATING",
        "VALIDATED",
        "RUNNING",
        "checkpoint at step 10: train_loss 1.5",
        "SUCCESS",
    ]


async def test_follow_goes_on_to_the_end(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """Following yields what happens as it happens; each request is retried for itself."""
    job_id = str(run.remote_id)
    told: list[str] = []
    async with aclosing(backend.logs(run, follow=True)) as records:
        async for record in records:
            told.append(record.message)
            if record.message == "RUNNING":
                provider.fail(DropRequest())
                provider.fail(OtherAnswer(status=503))
                provider.add_checkpoint(job_id, 10, train_loss=1.5)
            if record.source == "checkpoint":
                provider.set_status(job_id, "SUCCESS")
    assert told[-3:] == ["RUNNING", "checkpoint at step 10: train_loss 1.5", "SUCCESS"]


async def test_follow_reports_a_server_that_stays_away(
    make_backend: Callable[..., MistralAPIBackend], provider: ScriptedProvider, run: TrainingRun
) -> None:
    """Following ends with an error that names the run once all attempts of a request failed."""
    backend = make_backend(attempts=2)
    provider.fail(OtherAnswer(status=503), times=2)
    with pytest.raises(BackendUnavailable) as caught:
        await collect(backend, run, follow=True)
    await backend.aclose()
    assert caught.value.run_id == run.id


async def test_stop_is_not_over_before_the_provider_says_so(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """After a stop the run is stopping for as long as the provider says so, then cancelled."""
    await backend.stop(run)
    state = await backend.status(run)
    assert (state.status, state.raw_status) == (TrainingStatus.STOPPING, "CANCELLATION_REQUESTED")
    await backend.stop(run)
    assert len(provider.asked("POST", "/cancel")) == 1
    provider.set_status(str(run.remote_id), "CANCELLED")
    assert (await backend.status(run)).status is TrainingStatus.CANCELLED
    await backend.stop(run)
    assert len(provider.asked("POST", "/cancel")) == 1


async def test_stop_before_the_start_is_over_at_once(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A job that was never started is cancelled by the stop itself."""
    job = provider.jobs[str(run.remote_id)]
    job.started = False
    provider.set_status(job.id, "VALIDATED")
    await backend.stop(run)
    assert (await backend.status(run)).status is TrainingStatus.CANCELLED


async def test_stop_that_comes_too_late_is_fine(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A cancel that is refused because the job has just ended is no error."""
    provider.fail(OtherAnswer(status=422, body={"detail": "Job is over."}), path="/cancel")
    answer = provider.answer

    def end_meanwhile(request):  # type: ignore[no-untyped-def]
        reply = answer(request)
        provider.set_status(str(run.remote_id), "SUCCESS")
        return reply

    provider.answer = end_meanwhile  # type: ignore[method-assign]
    await backend.stop(run)
    assert (await backend.status(run)).status is TrainingStatus.COMPLETED


@pytest.mark.parametrize("fault", [LoseAnswer(), OtherAnswer(status=200, body=b"{", done=True)])
async def test_stop_whose_answer_is_lost_is_seen_by_the_status(
    fault: Fault,
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    run: TrainingRun,
) -> None:
    """A stop that was carried out unheard is no error; the run's status shows it."""
    backend = make_backend(attempts=1)
    provider.fail(fault, method="POST", path="/cancel")
    await backend.stop(run)
    assert (await backend.status(run)).status is TrainingStatus.STOPPING
    await backend.aclose()


async def test_stop_that_did_not_arrive_is_reported(
    make_backend: Callable[..., MistralAPIBackend], provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A stop that nobody answers is an error as long as the run goes on."""
    backend = make_backend(attempts=1)
    provider.fail(DropRequest(), method="POST", path="/cancel")
    with pytest.raises(BackendUnavailable):
        await backend.stop(run)
    assert (await backend.status(run)).status is TrainingStatus.RUNNING
    await backend.aclose()


async def test_refused_stop_is_reported(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """A cancel that is refused while the job goes on is an error."""
    provider.fail(OtherAnswer(status=422, body={"detail": "Not now."}), path="/cancel")
    with pytest.raises(ConfigError, match="Not now"):
        await backend.stop(run)


@pytest.mark.parametrize("word", ["FAILED", "CANCELLED"])
async def test_ended_run_is_trained_anew_on_the_same_files(
    word: str,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """Resuming makes one new job on the uploaded files, even if they are gone here."""
    provider.set_status(str(run.remote_id), word)
    provider.auto = "complete"
    run.config.data.train[0].local_path.unlink()
    journal = make_journal()
    state = await backend.resume(run, journal.run, journal)
    old, new = provider.jobs.values()
    assert state.remote_id == new.id != old.id
    assert new.asked["training_files"] == old.asked["training_files"]
    assert len(provider.asked("POST", "/files")) == 1
    assert any("keeps no checkpoint" in note for note in journal.quotes[0].notes)
    # Whoever is not asked finds it in the record.
    estimates = [state.estimate for state in journal.states if state.estimate is not None]
    assert estimates
    for estimate in estimates:
        assert any("keeps no checkpoint" in note for note in estimate.notes)
    assert state.estimate is None


async def test_killed_resumption_goes_on_with_its_note(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """A resumption that was cut off behind its create still says what it cannot do."""
    provider.set_status(str(run.remote_id), "FAILED")
    journal = make_journal()
    record = journal.record

    async def record_and_die(state: RunState) -> None:
        await record(state)
        raise Killed

    journal.record = record_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await backend.resume(run, journal.run, journal)
    assert journal.run.remote_id is not None
    assert journal.quotes == []
    provider.auto = "complete"
    journal.record = record  # type: ignore[method-assign]
    await backend.resume(run, journal.run, journal)
    assert any("keeps no checkpoint" in note for note in journal.quotes[0].notes)
    assert len(provider.jobs) == 2


@pytest.mark.parametrize("job_is_gone", [False, True])
async def test_resume_with_nothing_to_train_on_says_so(
    job_is_gone: bool,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """With the files gone there and here, the error says both, and no job is made."""
    provider.set_status(str(run.remote_id), "FAILED")
    run = run.updated(await backend.status(run))
    provider.files.clear()
    run.config.data.train[0].local_path.unlink()
    if job_is_gone:
        provider.jobs.clear()
    known = len(provider.jobs)
    journal = make_journal()
    with pytest.raises(DatasetError, match="no longer has the files") as caught:
        await backend.resume(run, journal.run, journal)
    assert "train.jsonl" in caught.value.message
    assert len(provider.jobs) == known


async def test_run_whose_job_is_gone_is_trained_anew(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """A failed run that the provider has forgotten is resumed with what lies here."""
    provider.set_status(str(run.remote_id), "FAILED")
    run = run.updated(await backend.status(run))
    provider.jobs.clear()
    provider.auto = "complete"
    journal = make_journal()
    state = await backend.resume(run, journal.run, journal)
    assert [state.remote_id] == list(provider.jobs)


async def test_resume_uploads_what_the_provider_lost(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """Files deleted at the provider meanwhile are uploaded again for the new job."""
    provider.set_status(str(run.remote_id), "FAILED")
    provider.auto = "complete"
    provider.files.clear()
    journal = make_journal()
    await backend.resume(run, journal.run, journal)
    assert len(provider.asked("POST", "/files")) == 2


async def test_run_restored_from_the_list_is_resumed_on_the_files_of_the_server(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """Its data is known by id only: used as it is, or missed by name, and never uploaded."""
    provider.set_status(str(run.remote_id), "FAILED")
    provider.auto = "complete"
    (listed,) = await backend.list_remote(RemoteFilters())
    restored = run.model_copy(update={"config": listed.config})
    provider.requests.clear()
    journal = make_journal()
    other = restored.model_copy(update={"remote_id": str(uuid4())})  # the job itself is gone
    journal.run = journal.run.model_copy(update={"config": listed.config})
    await backend.resume(
        other.model_copy(update={"status": TrainingStatus.FAILED}), journal.run, journal
    )
    assert provider.asked("POST", "/files") == []
    provider.set_status(str(journal.run.remote_id), "FAILED")
    provider.files.clear()
    journal = make_journal()
    journal.run = journal.run.model_copy(update={"config": listed.config})
    with pytest.raises(DatasetError, match="The server has no file"):
        await backend.resume(restored, journal.run, journal)


async def test_waiting_job_is_started_by_resume(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """Resuming a validated job that nobody started starts it."""
    job = provider.jobs[str(run.remote_id)]
    job.started = False
    provider.set_status(job.id, "VALIDATED")
    journal = make_journal()
    state = await backend.resume(run, journal.run, journal)
    assert (state.remote_id, job.starts, len(provider.jobs)) == (job.id, 2, 1)


@pytest.mark.parametrize("word", ["RUNNING", "SUCCESS", "CANCELLATION_REQUESTED", "ODD"])
async def test_other_runs_are_not_resumed(
    word: str,
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """A run that goes on, succeeded or is in an unknown state makes no new job."""
    provider.set_status(str(run.remote_id), word)
    journal = make_journal()
    with pytest.raises(UnsupportedOperation):
        await backend.resume(run, journal.run, journal)
    assert len(provider.jobs) == 1


async def test_checkpoints_cannot_be_chosen(
    backend: MistralAPIBackend, run: TrainingRun, make_journal: MakeJournal
) -> None:
    """Resuming from a named checkpoint is refused, with a way on."""
    journal = make_journal()
    with pytest.raises(UnsupportedOperation) as caught:
        await backend.resume(run, journal.run, journal, checkpoint="10")
    assert caught.value.hint is not None


async def test_the_hosted_service_has_no_download_and_no_chat(
    make_backend: Callable[..., MistralAPIBackend], run: TrainingRun
) -> None:
    """It is declared, and the error says where there are."""
    backend = make_backend(base_url=HOSTED_URL)
    assert (backend.capabilities.downloads, backend.capabilities.samples) == (False, False)
    done = run.model_copy(update={"result_model": "ft:x"})
    with pytest.raises(UnsupportedOperation) as caught:
        await backend.download(done, run.config.data.train[0].local_path)
    assert "gateway" in str(caught.value.hint)
    with pytest.raises(UnsupportedOperation):
        await backend.sample(done, "hello")


async def test_a_conversation_is_asked_as_it_is(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """The server gets all messages."""
    job = provider.jobs[provider.add_job({"model": "m"}, status="SUCCESS")]
    job.fine_tuned_model = "ft:x"
    said: list[ChatMessage] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    done = run.model_copy(update={"result_model": "ft:x"})
    assert (await backend.sample(done, said)).answer == "hello"
    assert json.loads(provider.requests[-1].body)["messages"] == said


async def test_a_server_without_the_model_says_so(
    backend: MistralAPIBackend, run: TrainingRun, tmp_path: Path
) -> None:
    """Nothing is written."""
    gone = run.model_copy(update={"result_model": "ft:gone"})
    for verb in (backend.download(gone, tmp_path / "out" / "model"), backend.sample(gone, "hello")):
        with pytest.raises(UnsupportedOperation) as caught:
            await verb
        assert "No model matches" in str(caught.value.hint)
    assert [*(tmp_path / "out").iterdir()] == []


async def test_remote_runs_are_filtered(
    backend: MistralAPIBackend, provider: ScriptedProvider, run: TrainingRun
) -> None:
    """The provider's runs are listed by status, model and suffix; failed means both words."""
    asked = provider.jobs[str(run.remote_id)].asked
    failed = {provider.add_job(asked, word) for word in ("FAILED", "FAILED_VALIDATION")}
    odd = provider.add_job({**asked, "suffix": "mine"}, "ODD")

    async def ids(**filters: object) -> set[str]:
        chosen = RemoteFilters.model_validate(filters)
        return {entry.remote_id for entry in await backend.list_remote(chosen)}

    assert await ids() == {run.remote_id, odd, *failed}
    assert await ids(status="failed") == failed
    assert await ids(status="running") == {run.remote_id}
    assert await ids(status="unknown") == {odd}
    assert await ids(suffix="mine") == {odd}
    assert await ids(model="none") == set()


async def test_run_without_a_job_is_not_found(
    backend: MistralAPIBackend, make_journal: MakeJournal
) -> None:
    """A run whose launch never came to a job is not found, with how to go on."""
    run = make_journal().run
    with pytest.raises(RunNotFound) as caught:
        await backend.status(run)
    assert f"launch --id {run.id}" in str(caught.value.hint)


async def test_health_tells_each_trouble(
    make_backend: Callable[..., MistralAPIBackend], provider: ScriptedProvider
) -> None:
    """Health is one harmless request, and says what is wrong and what to do."""
    backend = make_backend(attempts=1)
    assert (await backend.health()).ok
    assert [request.method for request in provider.requests] == ["GET"]
    provider.retired = True
    assert "410" in (await backend.health()).message
    provider.key = "another"
    health = await backend.health()
    assert not health.ok
    assert "credentials set" in str(health.hint)
    provider.stop()
    assert not (await backend.health()).ok
    await backend.aclose()


async def test_retired_service_is_not_a_bare_error(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    run: TrainingRun,
    make_journal: MakeJournal,
) -> None:
    """Every verb tells 410 as a retired service, with what else can run the configuration."""
    provider.retired = True
    journal = make_journal()
    runs = [run.model_copy(update={"id": f"r{n}"}) for n in range(5)]
    listed: list[Awaitable[object]] = [
        backend.list_remote(RemoteFilters()),
        backend.statuses([one.model_copy(update={"remote_id": one.id}) for one in runs]),
    ]
    for ask in listed:
        with pytest.raises(BackendRetired):
            await ask
    asked: list[Awaitable[object]] = [
        backend.status(run),
        backend.observe(run),
        backend.stop(run),
        collect(backend, run),
        backend.resume(run, runs[0].model_copy(update={"remote_id": None}), journal),
    ]
    for ask in asked:
        with pytest.raises(BackendRetired) as caught:
            await ask
        assert "--backend local" in str(caught.value.hint)
        assert caught.value.run_id in {run.id, "r0"}


async def test_missing_key_asks_nobody(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    secrets: CredentialSource,
    make_journal: MakeJournal,
) -> None:
    """Without a key nothing is sent."""
    secrets.values.clear()  # type: ignore[attr-defined]
    journal = make_journal()
    with pytest.raises(CredentialNotFound):
        await backend.launch(journal.run, journal)
    assert provider.requests == []


async def test_profile_chooses_the_key(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    secrets: CredentialSource,
) -> None:
    """The profile of the settings says which key is used."""
    secrets.values["mistral/work"] = "work-key"  # type: ignore[attr-defined]
    provider.key = "work-key"
    backend = make_backend(profile="work")
    assert (await backend.health()).ok
    await backend.aclose()


async def test_key_is_not_sent_over_plain_http(
    make_backend: Callable[..., MistralAPIBackend], make_journal: MakeJournal
) -> None:
    """A base URL of plain http on another host is refused before anything is sent."""
    backend = make_backend(base_url="http://gpu.example.com:8000")
    journal = make_journal()
    with pytest.raises(ConfigError, match="plain HTTP"):
        await backend.launch(journal.run, journal)
    assert not (await backend.health()).ok


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
async def test_base_url_comes_from_the_environment(
    tail: str,
    provider: ScriptedProvider,
    secrets: CredentialSource,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    """The registered backend takes its URL from the environment, with or without /v1."""
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", provider.base_url + tail)
    context = BackendContext(home=tmp_path, credentials=secrets)  # type: ignore[arg-type]
    backend = backend_class("mistral").create(context)
    assert isinstance(backend, MistralAPIBackend)
    health = await backend.health()
    await backend.aclose()
    assert health.ok, health.message


async def test_bad_settings_name_the_variable(
    secrets: CredentialSource, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """A URL that cannot be used is an error that names its variable."""
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", "api.mistral.ai")
    context = BackendContext(home=tmp_path, credentials=secrets)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        backend_class("mistral").create(context)
    assert caught.value.issues[0].field == "TRAINING_BACKENDS_MISTRAL__BASE_URL"


async def test_runs_at_the_same_time_do_not_mix(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    config: TrainingConfig,
) -> None:
    """Launches side by side over one backend object make one job each."""
    journals = [
        make_journal(config.model_copy(update={"suffix": f"run-{number}"})) for number in range(6)
    ]
    async with anyio.create_task_group() as tasks:
        for journal in journals:
            tasks.start_soon(backend.launch, journal.run, journal)
    suffixes = {journal.run.remote_id: journal.run.config.suffix for journal in journals}
    assert {job.id: job.asked["suffix"] for job in provider.jobs.values()} == suffixes
    assert [job.starts for job in provider.jobs.values()] == [1] * 6
    assert provider.connections <= 5
