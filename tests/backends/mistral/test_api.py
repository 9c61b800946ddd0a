"""Every operation of the protocol, as it goes over the wire."""

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pytest

from training_backends import BackendUnavailable, ConfigError, ProtocolError, RunNotFound
from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.http.client import HttpClient
from training_backends.protocols.mistral import wire
from training_backends.protocols.mistral.errors import error_from_answer
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.provider import ScriptedProvider, read_form
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio
TUNED = "ft:open-mistral-7b:587a6b29:20240514:7e773925"


@pytest.fixture
def api(backend: MistralAPIBackend) -> MistralAPI:
    """Return the operations over the scripted provider."""
    return backend.api


def job_of(file_id: str, **fields: object) -> wire.JobIn:
    """Make a create request."""
    values = {
        "model": "open-mistral-7b",
        "training_files": [{"file_id": file_id}],
        "hyperparameters": {"training_steps": 10},
        **fields,
    }
    return wire.JobIn.model_validate(values)


@pytest.fixture
async def file_id(api: MistralAPI, one_file: Path) -> str:
    """Upload a file."""
    return (await api.upload_file(one_file)).id


async def test_file_goes_through_its_life(
    api: MistralAPI, provider: ScriptedProvider, one_file: Path, tmp_path: Path
) -> None:
    """A file is uploaded, listed, looked at, fetched, linked to and deleted."""
    made = await api.upload_file(one_file, expiry=24, visibility="user", filename="x.jsonl")
    fields, filename, content = read_form(provider.asked("POST", "/files")[0])
    assert fields == {"expiry": "24", "visibility": "user", "purpose": "fine-tune"}
    assert (filename, content) == ("x.jsonl", one_file.read_bytes())
    assert [file.id for file in (await api.list_files()).data] == [made.id]
    assert (await api.retrieve_file(made.id)).bytes == one_file.stat().st_size
    fetched = await api.download_file(made.id, tmp_path / "fetched.jsonl")
    assert fetched.read_bytes() == one_file.read_bytes()
    assert made.id in await api.get_signed_url(made.id, expiry=2)
    assert provider.requests[-1].target.endswith("/url?expiry=2")
    assert (await api.delete_file(made.id)).deleted
    with pytest.raises(RunNotFound):
        await api.retrieve_file(made.id)


async def test_same_file_is_the_same(api: MistralAPI, one_file: Path) -> None:
    """The same name and content uploaded again gives the same id."""
    first, second = await api.upload_file(one_file), await api.upload_file(one_file)
    assert first.id == second.id


async def test_file_filters_are_sent(api: MistralAPI, provider: ScriptedProvider) -> None:
    """All filters of a file list go out under their names, lists as repeated keys."""
    await api.list_files(
        page=2,
        page_size=7,
        include_total=False,
        sample_type=["instruct", "pretrain"],
        source=["upload"],
        search="a b",
        purpose="fine-tune",
        mimetypes=["application/jsonl", "text/plain"],
    )
    assert sorted(provider.requests[-1].query) == [
        ("include_total", "false"),
        ("mimetypes", "application/jsonl"),
        ("mimetypes", "text/plain"),
        ("page", "2"),
        ("page_size", "7"),
        ("purpose", "fine-tune"),
        ("sample_type", "instruct"),
        ("sample_type", "pretrain"),
        ("search", "a b"),
        ("source", "upload"),
    ]


async def test_job_filters_are_sent(api: MistralAPI, provider: ScriptedProvider) -> None:
    """All ten filters of a job list go out under their names, times with their offset."""
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    filters = JobFilters(
        model="m",
        created_after=at,
        created_before=at.astimezone(UTC),
        created_by_me=True,
        status="RUNNING",
        wandb_project="p",
        wandb_name="n",
        suffix="s",
    )
    await api.list_jobs(filters, page=1, page_size=5)
    assert dict(provider.requests[-1].query) == {
        "page": "1",
        "page_size": "5",
        "model": "m",
        "created_after": "2026-01-02T03:04:05+02:00",
        "created_before": "2026-01-02T01:04:05+00:00",
        "created_by_me": "true",
        "status": "RUNNING",
        "wandb_project": "p",
        "wandb_name": "n",
        "suffix": "s",
    }
    assert "created_after=2026-01-02T03%3A04%3A05%2B02%3A00" in provider.requests[-1].target


async def test_naive_time_is_refused(api: MistralAPI) -> None:
    """A filter by a time without a zone is refused here, not misread there."""
    with pytest.raises(ValueError, match="time zone"):
        await api.list_jobs(JobFilters(created_after=datetime(2026, 1, 2)))  # noqa: DTZ001


async def test_pages_are_followed(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A long list is read a hundred at a time, each job once."""
    made = {provider.add_job(job_of(file_id).to_wire()) for _ in range(230)}
    before = len(provider.requests)
    found = [job.id async for job in api.iter_jobs()]
    assert len(found) == 230
    assert set(found) == made
    assert len(provider.requests) - before == 3


async def test_server_without_pages_is_read_once(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A server that ignores the page number does not make us ask for ever."""
    for _ in range(100):
        provider.add_job(job_of(file_id).to_wire())
    shown = [job.document(detailed=False) for job in provider.jobs.values()]
    page = {"object": "list", "total": 100, "data": shown}
    provider.fail(OtherAnswer(status=200, body=page), method="GET", times=99)
    assert len([job.id async for job in api.iter_jobs()]) == 100


@pytest.mark.parametrize("size", [1, 100])
async def test_a_list_that_never_ends_is_an_error(size: int) -> None:
    """A server that always has more jobs, or says so, does not hold a launch for ever."""
    document = {"model": "m", "status": "QUEUED", "created_at": 1, "modified_at": 1}

    def answer(request: Received) -> StubReply:
        page = int(dict(request.query)["page"])
        jobs = [{**document, "id": f"job-{page}-{number}"} for number in range(size)]
        return StubReply(content=json.dumps({"data": jobs, "total": 10**12}).encode())

    with LoopbackServer(answer) as server:
        http = HttpClient(server.base_url, key=None, decode_error=error_from_answer)
        with pytest.raises(ProtocolError, match="is too long"):
            async for _ in MistralAPI(http).job_heads():
                pass
        await http.aclose()
        assert len(server.requests) == 1000


async def test_completion_job_carries_every_parameter(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A completion job goes out with all its parameters, secrets where they belong."""
    other = provider.files[file_id].id
    job = job_of(
        file_id,
        training_files=[{"file_id": file_id, "weight": 2.5}],
        validation_files=[other],
        suffix="mine",
        auto_start=True,
        invalid_sample_skip_percentage=0.1,
        job_type="completion",
        hyperparameters={
            "epochs": 1.5,
            "learning_rate": 2e-5,
            "weight_decay": 0.0,
            "warmup_fraction": 0.1,
            "seq_len": 4096,
            "fim_ratio": 0.5,
        },
        integrations=[{"project": "p", "name": "n", "run_name": "r", "api_key": "k" * 40}],
        repositories=[{"owner": "o", "name": "r", "ref": "main", "weight": 0.5, "token": "t"}],
    )
    made = await api.create_job(job)
    assert made.suffix == "mine"
    assert json.loads(provider.asked("POST", "/jobs")[0].body) == {
        "model": "open-mistral-7b",
        "training_files": [{"file_id": file_id, "weight": 2.5}],
        "validation_files": [other],
        "suffix": "mine",
        "auto_start": True,
        "invalid_sample_skip_percentage": 0.1,
        "job_type": "completion",
        "hyperparameters": {
            "epochs": 1.5,
            "learning_rate": 2e-5,
            "weight_decay": 0.0,
            "warmup_fraction": 0.1,
            "seq_len": 4096,
            "fim_ratio": 0.5,
        },
        "integrations": [
            {"type": "wandb", "project": "p", "name": "n", "run_name": "r", "api_key": "k" * 40}
        ],
        "repositories": [
            {
                "type": "github",
                "owner": "o",
                "name": "r",
                "ref": "main",
                "weight": 0.5,
                "token": "t",
            }
        ],
    }


async def test_classifier_job_carries_its_targets(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A classifier job goes out with its targets and without what only completion knows."""
    target = {
        "name": "mood",
        "labels": ["good", "bad"],
        "weight": 2.0,
        "loss_function": "multi_class",
    }
    job = job_of(
        file_id, model="ministral-3b-latest", job_type="classifier", classifier_targets=[target]
    )
    made = await api.create_job(job)
    body = json.loads(provider.asked("POST", "/jobs")[0].body)
    assert body["classifier_targets"] == [target]
    assert body["hyperparameters"] == {"training_steps": 10}
    found = await api.get_job(made.id)
    assert isinstance(found, wire.ClassifierDetailedJobOut)
    assert found.classifier_targets[0].loss_function == "multi_class"


async def test_dry_run_creates_nothing(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A dry run tells what a job would take, and there is no job."""
    told = await api.dry_run_job(job_of(file_id))
    assert told.train_tokens == 1_310_720
    assert dict(provider.requests[-1].query) == {"dry_run": "true"}
    assert provider.jobs == {}


async def test_job_is_started_and_cancelled(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """Start and cancel are empty POSTs that answer with the job."""
    provider.auto = "none"
    job = await api.create_job(job_of(file_id))
    provider.set_status(job.id, "VALIDATED")
    assert (await api.start_job(job.id)).status == "QUEUED"
    provider.set_status(job.id, "RUNNING")
    assert (await api.cancel_job(job.id)).status == "CANCELLATION_REQUESTED"
    assert [request.body for request in provider.asked("POST")[-2:]] == [b"", b""]


async def test_model_goes_through_its_life(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A fine-tuned model is listed, renamed, put away, brought back and deleted."""
    job_id = provider.add_job(job_of(file_id).to_wire())
    provider.set_status(job_id, "SUCCESS")
    name = str(provider.jobs[job_id].fine_tuned_model)
    cards = {card.id: card for card in (await api.list_models(model="x", provider="y")).data}
    assert dict(provider.requests[-1].query) == {"model": "x", "provider": "y"}
    assert isinstance(cards[name], wire.FTModelCard)
    assert isinstance(await api.retrieve_model("open-mistral-7b"), wire.BaseModelCard)
    changed = await api.update_model(name, wire.UpdateFTModelIn(description="better"))
    assert (changed.description, changed.job) == ("better", job_id)
    assert json.loads(provider.requests[-1].body) == {"description": "better"}
    assert (await api.archive_model(name)).archived
    assert not (await api.unarchive_model(name)).archived
    assert (await api.delete_model(name)).deleted


async def test_ids_are_quoted(api: MistralAPI, provider: ScriptedProvider) -> None:
    """An id is one segment of the path, whatever it holds; colons stay readable."""
    for name, target in [
        (TUNED, f"/v1/models/{TUNED}"),
        ("a/b?c#d é", "/v1/models/a%2Fb%3Fc%23d%20%C3%A9"),
        ("../jobs", "/v1/models/..%2Fjobs"),
    ]:
        with pytest.raises(RunNotFound):
            await api.retrieve_model(name)
        assert provider.requests[-1].target == target


@pytest.mark.parametrize("name", ["", ".", "..", "/", " "])
async def test_empty_id_asks_nobody(name: str, api: MistralAPI, provider: ScriptedProvider) -> None:
    """An id that would make the URL of all things is refused before anything is asked."""
    calls: list[Callable[[str], Awaitable[object]]] = [
        api.delete_file,
        api.delete_model,
        api.cancel_job,
        api.archive_model,
    ]
    for call in calls:
        with pytest.raises(RunNotFound):
            await call(name)
    assert provider.requests == []


async def test_wrong_shape_breaks_the_protocol(api: MistralAPI, provider: ScriptedProvider) -> None:
    """JSON of another shape is an error that names the fields, with an excerpt, no secret."""
    body = {"id": 5, "integrations": [{"api_key": "k" * 40}], "note": "Bearer abcdefgh"}
    provider.fail(OtherAnswer(status=200, body=body))
    with pytest.raises(ProtocolError, match="status: Field required") as caught:
        await api.get_job(str(uuid4()))
    assert '"id": 5' in caught.value.excerpt
    assert "kkkk" not in caught.value.excerpt
    assert "abcdefgh" not in caught.value.excerpt


async def test_create_is_never_repeated_blindly(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A create whose answer is lost goes out once; the error says it may have arrived."""
    provider.fail(LoseAnswer(), method="POST", path="/jobs", times=9)
    with pytest.raises(BackendUnavailable) as caught:
        await api.create_job(job_of(file_id))
    assert caught.value.sent is True
    assert len(provider.asked("POST", "/jobs")) == len(provider.jobs) == 1


async def test_secrets_of_a_job_stay_out_of_errors(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A refusal that repeats the keys of the request does not show them."""
    job = job_of(
        file_id,
        integrations=[{"project": "p", "api_key": "w" * 40}],
        repositories=[{"owner": "o", "name": "n", "token": "gh-token-1"}],
    )
    said = {"detail": f"no access with {'w' * 40} and gh-token-1"}
    provider.fail(OtherAnswer(status=422, body=said), method="POST", path="/jobs")
    with pytest.raises(ConfigError, match="redacted") as caught:
        await api.create_job(job)
    shown = repr(caught.value) + repr(job)
    assert "wwww" not in shown
    assert "gh-token-1" not in shown
