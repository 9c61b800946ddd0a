"""Every operation that the backend uses, as it goes over the wire."""

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


async def test_file_is_uploaded_and_found(
    api: MistralAPI, provider: ScriptedProvider, one_file: Path
) -> None:
    """A file is uploaded under a name, found by it and retrieved by its id."""
    made = await api.upload_file(one_file, filename="x.jsonl")
    fields, filename, content = read_form(provider.asked("POST", "/files")[0])
    assert fields == {"purpose": "fine-tune"}
    assert (filename, content) == ("x.jsonl", one_file.read_bytes())
    found = [file.id async for file in api.iter_files(search="x.json", purpose="fine-tune")]
    assert found == [made.id]
    assert dict(provider.requests[-1].query) == {
        "include_total": "false",
        "page": "0",
        "page_size": "100",
        "purpose": "fine-tune",
        "search": "x.json",
    }
    assert (await api.retrieve_file(made.id)).bytes == one_file.stat().st_size
    with pytest.raises(RunNotFound):
        await api.retrieve_file(str(uuid4()))


async def test_same_file_is_the_same(api: MistralAPI, one_file: Path) -> None:
    """The same name and content uploaded again gives the same id."""
    first, second = await api.upload_file(one_file), await api.upload_file(one_file)
    assert first.id == second.id


async def test_job_filters_are_sent(api: MistralAPI, provider: ScriptedProvider) -> None:
    """All filters of a job list go out under their names, times with their offset."""
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
    assert [job async for job in api.iter_listed(filters)] == []
    assert dict(provider.requests[-1].query) == {
        "page": "0",
        "page_size": "100",
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
        async for _ in api.iter_listed(JobFilters(created_after=datetime(2026, 1, 2))):  # noqa: DTZ001
            pass


async def test_pages_are_followed(
    api: MistralAPI, provider: ScriptedProvider, file_id: str
) -> None:
    """A long list is read a hundred at a time, each job once."""
    made = {provider.add_job(job_of(file_id).to_wire()) for _ in range(230)}
    before = len(provider.requests)
    found = [job_id async for job_id, _ in api.iter_listed()]
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
    assert len([job_id async for job_id, _ in api.iter_listed()]) == 100


@pytest.mark.parametrize("size", [1, 100])
async def test_a_list_that_never_ends_is_an_error(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that always has more jobs, or says so, does not hold a launch for ever."""
    monkeypatch.setattr("training_backends.backends.mistral.api.MAX_PAGES", 20)
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
        assert len(server.requests) == 20


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


async def test_models_are_listed(api: MistralAPI, provider: ScriptedProvider, file_id: str) -> None:
    """Base models and fine-tuned ones are told apart."""
    job_id = provider.add_job(job_of(file_id).to_wire())
    provider.set_status(job_id, "SUCCESS")
    cards = {card.id: card for card in (await api.list_models()).data}
    assert isinstance(cards[str(provider.jobs[job_id].fine_tuned_model)], wire.FTModelCard)
    assert isinstance(cards["open-mistral-7b"], wire.BaseModelCard)


async def test_ids_are_quoted(api: MistralAPI, provider: ScriptedProvider) -> None:
    """An id is one segment of the path, whatever it holds; colons stay readable."""
    for name, target in [
        (TUNED, f"/v1/files/{TUNED}"),
        ("a/b?c#d é", "/v1/files/a%2Fb%3Fc%23d%20%C3%A9"),
        ("../jobs", "/v1/files/..%2Fjobs"),
    ]:
        with pytest.raises(RunNotFound):
            await api.retrieve_file(name)
        assert provider.requests[-1].target == target


@pytest.mark.parametrize("name", ["", ".", "..", "/", " "])
async def test_empty_id_asks_nobody(name: str, api: MistralAPI, provider: ScriptedProvider) -> None:
    """An id that would make the URL of a collection is refused before anything is sent."""
    calls: list[Callable[[str], Awaitable[object]]] = [
        api.retrieve_file,
        api.get_job,
        api.start_job,
        api.cancel_job,
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
