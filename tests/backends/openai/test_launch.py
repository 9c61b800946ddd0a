"""One launch makes one job, whatever happens to its requests."""

from collections.abc import Callable

import anyio
import pytest

from tests.backends.openai.conftest import MODEL
from training_backends import AmbiguousLaunch, BackendUnavailable, ConfigError, TrainingConfig
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.openai.job_request import RUN_KEY
from training_backends.core.run import RunState
from training_backends.protocols.openai.requests import NebiusFineTuningJobIn
from training_backends.testing.faults import CutAnswer, DropRequest, Fault, LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.openai_provider import ScriptedOpenAIProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
NewJournal = Callable[..., MemoryJournal]
Make = Callable[..., OpenAIBackend]


def deliver_creates_twice(provider: ScriptedOpenAIProvider) -> None:
    """Carry out each create twice, and return the second response."""
    answer = provider.answer

    def twice(request: Received) -> StubReply:
        if request.method == "POST" and request.path.endswith("/jobs"):
            answer(request)
        return answer(request)

    provider.answer = twice  # type: ignore[method-assign]


async def test_job_carries_the_run(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """The id of the run is in the metadata, from which `list_remote` restores it."""
    journal = make_journal()
    state = await backend.launch(journal.run, journal)
    (job,) = provider.jobs.values()
    assert job.asked["metadata"][RUN_KEY] == journal.run.id
    assert "seed" not in job.asked
    assert (state.remote_id, state.raw_status) == (job.id, "validating_files")


@pytest.mark.parametrize("variant", ["openai", "azure", "nebius"])
@pytest.mark.parametrize(
    "fault",
    [LoseAnswer(), DropRequest(), CutAnswer(), OtherAnswer(status=502), OtherAnswer(body="<html>")],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("path", ["/files", "/jobs"])
async def test_lost_answer_makes_no_second_job(
    variant: str,
    fault: Fault,
    path: str,
    *,
    make_backend: Make,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
) -> None:
    """A request whose response is lost is looked up before it is sent again."""
    if variant == "nebius":
        provider.job_model = NebiusFineTuningJobIn
    provider.fail(fault, method="POST", path=path)
    backend, journal = make_backend(variant=variant), make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert list(provider.jobs) == [state.remote_id]
    assert len(provider.files) == 1


async def test_late_job_is_found(
    make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A create that a proxy carries out after its timeout is waited for."""
    provider.late_creates = [2]
    backend, journal = make_backend(settle_timeout=5), make_journal()
    await backend.launch(journal.run, journal)
    await backend.aclose()
    assert len(provider.asked("POST", "/jobs")) == len(provider.jobs) == 1


async def test_later_job_of_a_resent_create_is_cancelled(
    make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """Of two jobs with our metadata one is kept; somebody else's are left alone."""
    strangers = provider.add_job({"model": MODEL, "training_file": "file-x"})
    provider.late_creates = [1000]
    answer, creates, looks = provider.answer, 0, 0

    def catch_up_later(request: Received) -> StubReply:
        nonlocal creates, looks
        if request.path.endswith("/jobs"):
            creates += request.method == "POST"
            looks += request.method == "GET" and creates == 2
            if looks == 2:
                provider.catch_up()
        return answer(request)

    provider.answer = catch_up_later  # type: ignore[method-assign]
    backend, journal = make_backend(settle_timeout=0.01), make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    statuses = {job.id: job.status for job in provider.jobs.values()}
    assert statuses.pop(strangers) == "running"
    assert statuses.pop(str(state.remote_id)) == "validating_files"
    assert list(statuses.values()) == ["cancelled"]


@pytest.mark.parametrize("variant", ["openai", "azure", "nebius"])
async def test_create_that_a_proxy_delivers_twice_leaves_one_job(
    variant: str, make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """The job whose response was replaced by the second one is cancelled, also without metadata."""
    if variant == "nebius":
        provider.job_model = NebiusFineTuningJobIn
    deliver_creates_twice(provider)
    backend, journal = make_backend(variant=variant), make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    first, second = provider.jobs.values()
    assert (first.status, second.id) == ("cancelled", state.remote_id)
    assert second.status != "cancelled"


async def test_job_that_appears_after_the_process_died_is_cancelled(
    make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """That a create was sent again is remembered until its twin was looked for."""
    provider.late_creates = [1000]
    journal = make_journal()
    record = journal.record

    async def die(state: RunState) -> None:
        raise Killed

    journal.record = die  # type: ignore[method-assign]
    backend = make_backend(settle_timeout=0.01)
    with pytest.raises(Killed):
        await backend.launch(journal.run, journal)
    await backend.aclose()
    journal.record = record  # type: ignore[method-assign]
    provider.catch_up()
    assert len(provider.jobs) == 2
    backend = make_backend(settle_timeout=0.01)
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    live = [job.id for job in provider.jobs.values() if job.status != "cancelled"]
    assert live == [state.remote_id]
    assert len(provider.jobs) == 2


@pytest.mark.parametrize("seed", [None, 7])
async def test_similar_job_of_a_stranger_is_not_adopted(
    seed: int | None,
    make_backend: Make,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
    config: TrainingConfig,
) -> None:
    """Without metadata, jobs that existed before or have another seed belong to others."""
    hyper = config.hyperparameters.model_copy(update={"seed": seed})
    config = config.model_copy(update={"hyperparameters": hyper})
    backend = make_backend(variant="nebius")
    first, second = make_journal(config), make_journal(config)
    second.uploads = first.uploads
    theirs = await backend.launch(first.run, first)
    provider.fail(DropRequest(), method="POST", path="/jobs")
    ours = await backend.launch(second.run, second)
    await backend.aclose()
    assert list(provider.jobs) == [theirs.remote_id, ours.remote_id]


async def test_jobs_that_look_alike_are_not_guessed(
    make_backend: Make,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
    config: TrainingConfig,
) -> None:
    """Without metadata, two new jobs of the same seed end the launch; the run has no job."""
    hyper = config.hyperparameters.model_copy(update={"seed": 7})
    config = config.model_copy(update={"hyperparameters": hyper})
    deliver_creates_twice(provider)
    provider.fail(LoseAnswer(), method="POST", path="/jobs")
    backend, journal = make_backend(variant="nebius"), make_journal(config)
    with pytest.raises(AmbiguousLaunch) as caught:
        await backend.launch(journal.run, journal)
    await backend.aclose()
    assert all(job_id in caught.value.message for job_id in provider.jobs)


async def test_file_is_uploaded_once_and_again_if_lost(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A known upload is reused for as long as the server has it."""
    uploads: dict[tuple[str, str], str] = {}
    for _ in range(2):
        journal = make_journal()
        journal.uploads = uploads
        await backend.launch(journal.run, journal)
    assert len(provider.asked("POST", "/files")) == 1
    provider.lose_file(next(iter(provider.files)))
    journal = make_journal()
    journal.uploads = uploads
    state = await backend.launch(journal.run, journal)
    assert len(provider.asked("POST", "/files")) == 2
    assert provider.jobs[str(state.remote_id)].asked["training_file"] in provider.files


async def test_file_of_the_provider_is_used_by_its_id(
    backend: OpenAIBackend,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
    make_config: Callable[..., TrainingConfig],
) -> None:
    """A file that somebody uploaded before is neither read nor uploaded."""
    file_id = provider.add_file(b"{}\n" * 10)
    journal = make_journal(make_config(model=MODEL, data={"train": {"remote_id": file_id}}))
    await backend.launch(journal.run, journal)
    (job,) = provider.jobs.values()
    assert job.asked["training_file"] == file_id
    assert list(provider.files) == [file_id]


async def test_pending_file_is_waited_for(
    make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """Azure's files are pending first; its jobs answer 201, its errors have another form."""
    provider.new_file_status, provider.auto = "pending", "validate"
    provider.base_path, provider.query = "/openai", {"api-version": "2024-10-21"}
    provider.created_status, provider.error_style = 201, "azure"
    backend, journal = make_backend(variant="azure"), make_journal()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert list(provider.jobs) == [state.remote_id]
    assert {request.headers.get("authorization") for request in provider.requests} == {None}
    assert all(file.status == "processed" for file in provider.files.values())


async def test_launches_at_the_same_time_stay_apart(
    backend: OpenAIBackend, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """Launches in parallel, each with a lost response, have a job each."""
    provider.fail(LoseAnswer(), method="POST", path="/jobs", times=4)
    journals = [make_journal() for _ in range(4)]
    found: dict[str, str] = {}

    async def launch(journal: MemoryJournal) -> None:
        state = await backend.launch(journal.run, journal)
        found[journal.run.id] = str(state.remote_id)

    async with anyio.create_task_group() as group:
        for journal in journals:
            group.start_soon(launch, journal)
    shown = {job.asked["metadata"][RUN_KEY]: job.id for job in provider.jobs.values()}
    assert found == shown
    assert len(provider.jobs) == 4


@pytest.mark.parametrize("style", ["openai", "azure", "detail"])
async def test_rejected_job_is_not_repeated(
    style: str, make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """The provider's own words are shown, whichever form its error body has."""
    provider.error_style = style  # type: ignore[assignment]
    provider.models = ("another-model",)  # type: ignore[misc]
    backend, journal = make_backend(), make_journal()
    with pytest.raises(ConfigError, match="is not available for fine-tuning"):
        await backend.launch(journal.run, journal)
    await backend.aclose()
    assert len(provider.asked("POST", "/jobs")) == 1


async def test_outage_after_the_create_keeps_the_job(
    make_backend: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A launch that cannot look for its job fails; its repetition finds the job."""
    provider.fail(LoseAnswer(), method="POST", path="/jobs")
    provider.fail(OtherAnswer(status=500), method="GET", path="/jobs", times=1000, skip=1)
    backend, journal = make_backend(attempts=1, call_timeout=0.2), make_journal()
    with pytest.raises(BackendUnavailable):
        await backend.launch(journal.run, journal)
    await backend.aclose()
    provider.heal()
    backend = make_backend()
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert list(provider.jobs) == [state.remote_id]
