"""The server of the OpenAI protocol, driven by OpenAI's own client."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training_backends.protocols.openai.events import read_metrics
from training_backends.protocols.openai.results import read_results
from training_backends.protocols.openai.wire import (
    FineTuningJob,
    FineTuningJobEvent,
    ListPage,
    StepMetrics,
)
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

openai = pytest.importorskip("openai")

MODEL = "gpt-4o-mini-2024-07-18"


def rows(count: int = 12) -> bytes:
    """Return training data."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return (json.dumps({"messages": messages}) + "\n").encode() * count


@pytest.fixture(scope="module")
def any_client() -> Iterator[Any]:
    """A client whose connections all tests share."""
    with openai.OpenAI(api_key="test-key", base_url="http://127.0.0.1:9", max_retries=0) as client:
        yield client


@pytest.fixture
def server() -> Iterator[ScriptedOpenAIProvider]:
    """A server whose jobs advance when the test says so."""
    with ScriptedOpenAIProvider() as server:
        yield server


@pytest.fixture
def client(any_client: Any, server: ScriptedOpenAIProvider) -> Any:
    """The official client of this server."""
    return any_client.with_options(base_url=server.url)


@pytest.fixture
def file_id(server: ScriptedOpenAIProvider) -> str:
    """A training file of 12 rows."""
    return server.add_file(rows())


def test_job_lives_from_upload_to_model(
    client: Any, server: ScriptedOpenAIProvider, tmp_path: Path
) -> None:
    """A file becomes a job, a model, a result file in base64; each step is visible."""
    path = tmp_path / 'déjà "日".jsonl'
    path.write_bytes(rows())
    with path.open("rb") as stream:
        file = client.files.create(file=stream, purpose="fine-tune")
    assert (file.filename, file.bytes, file.status) == (path.name, len(rows()), "processed")
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == rows()

    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini",
        training_file=file.id,
        suffix="mine",
        seed=None,
        metadata={"run": "a b"},
        method=method,
    )
    assert (job.status, job.model, job.metadata) == ("validating_files", MODEL, {"run": "a b"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    server.run_to(job.id, "running")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.hyperparameters.batch_size, job.method.supervised.hyperparameters.n_epochs) == (
        1,
        2,
    )
    assert job.error, "the empty error of a healthy job is an object"
    server.run_to(job.id, "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:test:mine:")
    content = client.files.content(job.result_files[0]).read()
    assert base64.b64decode(content).startswith(b"step,train_loss,train_accuracy")
    found = read_results(content)
    assert [row.step for row in found] == list(range(1, 25))
    assert found[0].train_loss == server.jobs[job.id].metrics[0].train_loss

    assert client.models.retrieve(job.fine_tuned_model).owned_by == "test"
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(job.fine_tuned_model)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id.startswith("req_")


@pytest.mark.parametrize("says_has_more", [True, False])
def test_lists_have_pages(
    client: Any, server: ScriptedOpenAIProvider, file_id: str, *, says_has_more: bool
) -> None:
    """The official client finds everything, newest first, with and without `has_more`."""
    server.says_has_more = says_has_more
    ids = [
        server.add_job({"model": MODEL, "training_file": file_id, "metadata": {"n": str(n % 2)}})
        for n in range(5)
    ]
    jobs = client.fine_tuning.jobs
    assert [job.id for job in jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in jobs.list(metadata={"n": "1"}, limit=1)] == [ids[3], ids[1]]
    server.add_job({"model": MODEL, "training_file": file_id})
    assert len(list(jobs.list(extra_query={"metadata": "null"}))) == 1
    others = [server.add_file(b"{}", filename=f"{n}.jsonl") for n in range(3)]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [file_id, *others]


def test_events_and_checkpoints_tell_the_progress(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """Events carry metrics, checkpoints names of their own, the last the model's name."""
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file_id, validation_file=file_id, hyperparameters={"n_epochs": 4}
    )
    server.run_to(job.id, "running")
    server.train(job.id, 13)
    name = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    assert name.endswith(":ckpt-step-12")
    server.run_to(job.id, "succeeded")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=30))
    assert [event.message for event in events[:2]] == [
        "The job has successfully completed",
        f"New fine-tuned model created: {server.jobs[job.id].fine_tuned_model}",
    ]
    assert [event.message for event in events[::-1]][2:4] == [
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(48, 0, -1))
    assert metrics[0].message == (
        "Step 48/48: training loss=0.34, validation loss=0.50, full validation loss=0.25"
    )
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [point.step_number for point in points] == [48, 36, 24]
    names = [point.fine_tuned_model_checkpoint for point in points]
    assert names[0] == server.jobs[job.id].fine_tuned_model
    assert len({name.split(":")[4] for name in names}) == 3
    assert client.models.retrieve(names[1]).id == names[1]
    assert points[0].metrics.full_valid_loss == 0.25


def test_job_is_paused_resumed_and_cancelled(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """Pause may take a while, resume queues; what a status does not allow is a 400, sent once."""
    server.pauses_at_once = False
    jobs = client.with_options(max_retries=2).fine_tuning.jobs
    job = jobs.create(model=MODEL, training_file=file_id)
    with pytest.raises(openai.BadRequestError):
        jobs.pause(job.id)
    assert len(server.asked("POST", "/pause")) == 1
    server.run_to(job.id, "running")
    server.train(job.id, 5)
    assert jobs.pause(job.id).status == "pausing"
    assert server.advance(job.id) == "paused"
    assert server.advance(job.id) == "paused"
    assert jobs.resume(job.id).status == "queued"
    server.run_to(job.id, "running")
    assert len(server.jobs[job.id].metrics) == 5
    cancelled = jobs.cancel(job.id)
    assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    for act in (jobs.cancel, jobs.resume):
        with pytest.raises(openai.BadRequestError):
            act(job.id)


def test_errors_are_the_clients_classes(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """Each rejection arrives as the class, the parameter and the code that were recorded."""
    jobs = client.fine_tuning.jobs
    cases: list[tuple[Any, Any, str | None, str | None]] = [
        (
            openai.AuthenticationError,
            client.with_options(api_key="wrong").models.list,
            None,
            "invalid_api_key",
        ),
        (
            openai.NotFoundError,
            lambda: jobs.retrieve("x"),
            "fine_tune_id",
            "fine_tune_not_found",
        ),
        (openai.NotFoundError, lambda: client.files.retrieve("x"), "id", None),
        (
            openai.BadRequestError,
            lambda: jobs.create(model=MODEL, training_file="file-x"),
            "training_file",
            None,
        ),
        (
            openai.BadRequestError,
            lambda: jobs.create(model="gpt-2", training_file=file_id),
            "model",
            "model_not_available",
        ),
        (
            openai.BadRequestError,
            lambda: jobs.create(model=MODEL, training_file=file_id, suffix="x" * 65),
            "suffix",
            None,
        ),
        (
            openai.BadRequestError,
            lambda: client.files.create(file=b"no JSON", purpose="fine-tune"),
            "file",
            None,
        ),
        (
            openai.BadRequestError,
            lambda: jobs.create(model=MODEL, training_file=file_id, extra_body={"lora": True}),
            "lora",
            None,
        ),
    ]
    for kind, call, param, code in cases:
        caught: Any
        with pytest.raises(kind) as caught:
            call()
        assert (caught.value.param, caught.value.code) == (param, code)
    server.fail(OtherAnswer(status=429, body={"error": {"message": "slow"}}))
    with pytest.raises(openai.RateLimitError):
        jobs.list()
    server.fail(LoseAnswer())
    with pytest.raises(openai.APIConnectionError):
        jobs.create(model=MODEL, training_file=file_id)
    assert len(server.jobs) == 1, "a lost answer leaves its job"


def test_bad_data_fails_the_job_not_the_request(
    client: Any, server: ScriptedOpenAIProvider
) -> None:
    """Too few rows and a wrong format are found once the job exists."""
    preference = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5}}}
    for content, method, code in (
        (rows(3), None, "invalid_n_examples"),
        (rows(12), preference, "invalid_training_file"),
    ):
        file = client.files.create(file=content, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=MODEL, training_file=file.id, **({"method": method} if method else {})
        )
        assert server.advance(job.id) == "failed"
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.error.code, job.error.param) == (code, "training_file")


def test_names_with_slashes_are_one_part_of_the_path(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """A base model with a slash gives a model whose name is found, encoded, and can be a base."""
    job_id = server.add_job({"model": "org/open-model", "training_file": file_id}, "queued")
    server.run_to(job_id, "succeeded")
    name = server.jobs[job_id].fine_tuned_model
    assert client.models.retrieve(name).id == name
    assert "%2F" in server.requests[-1].target
    assert client.fine_tuning.jobs.create(model=name, training_file=file_id).model == name


def test_large_file_is_uploaded_in_parts(client: Any, server: ScriptedOpenAIProvider) -> None:
    """The client's helper sends parts, and the file is what it was."""
    upload = client.uploads.upload_file_chunked(
        file=rows(30),
        filename="big.jsonl",
        bytes=len(rows(30)),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
    )
    assert upload.status == "completed"
    assert client.files.content(upload.file.id).read() == rows(30)
    with pytest.raises(openai.BadRequestError):
        client.uploads.cancel(upload.id)
    assert server.files[upload.file.id].filename == "big.jsonl"


def test_azure_is_another_path_header_and_status(
    any_client: Any, server: ScriptedOpenAIProvider
) -> None:
    """Azure's dated API: a query, `api-key`, 201, files that wait, errors without type."""
    server.base_path, server.query = "/openai", {"api-version": "2024-10-21"}
    server.created_status, server.new_file_status = 201, "pending"
    server.error_style, server.extras = "azure", {"trainingType": "Standard"}
    with openai.AzureOpenAI(
        azure_endpoint=server.base_url,
        api_key="test-key",
        api_version="2024-10-21",
        max_retries=0,
    ) as client:
        file = client.files.create(file=rows(), purpose="fine-tune")
        assert file.status == "pending"
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        assert (job.status, job.trainingType) == ("validating_files", "Standard")
        server.set_status(job.id, "pending")
        assert client.fine_tuning.jobs.retrieve(job.id).status == "pending"
        with pytest.raises(openai.NotFoundError) as caught:
            client.fine_tuning.jobs.retrieve("x")
        assert (caught.value.code, caught.value.type) == ("fine_tune_not_found", None)
    assert "api-key" in server.requests[-1].headers
    with pytest.raises(openai.NotFoundError):
        any_client.with_options(base_url=server.url).models.list()  # without the version


def test_fastapi_errors_have_no_text_in_the_client(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """A server on FastAPI answers 422, which is another class, and says nothing to it."""
    server.error_style = "detail"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.fine_tuning.jobs.create(model="gpt-2", training_file=file_id)
    assert caught.value.code is None


def test_lost_create_appears_later(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """A create that timed out is carried out after some lists, and is found by its metadata."""
    server.late_creates, server.owner = [2], "me"
    jobs = client.fine_tuning.jobs
    with pytest.raises(openai.InternalServerError):
        jobs.create(model=MODEL, training_file=file_id, metadata={"run": "r"})
    seen = [len(jobs.list(metadata={"run": "r"}).data) for _ in range(3)]
    assert (seen, [job.owner for job in server.jobs.values()]) == ([0, 0, 1], ["me"])
    server.lists_lag = 1
    assert [len(jobs.list().data) for _ in range(2)] == [0, 1]


def test_jobs_advance_by_themselves_if_told_to(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """With `auto`, every retrieval shows the next status."""
    server.auto = "complete"
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    seen = [client.fine_tuning.jobs.retrieve(job.id).status for _ in range(4)]
    assert seen == ["validating_files", "queued", "running", "succeeded"]


def test_every_answer_has_the_clients_types(
    any_client: Any, server: ScriptedOpenAIProvider
) -> None:
    """Types are checked strictly, but for the empty error that the live service sends as well."""
    client = any_client.with_options(
        base_url=server.url, _extra_kwargs={"_strict_response_validation": True}
    )
    file = client.files.create(file=rows(), purpose="fine-tune")
    jobs = client.fine_tuning.jobs
    with pytest.raises(openai.APIResponseValidationError):
        jobs.create(model=MODEL, training_file=file.id)
    server.extras = {"error": None}
    job = jobs.create(model=MODEL, training_file=file.id, validation_file=file.id)
    server.run_to(job.id, "succeeded")
    job = jobs.retrieve(job.id)
    assert len(list(jobs.list())) == 2
    assert len(list(jobs.list_events(job.id))) > 36
    assert len(list(jobs.checkpoints.list(job.id))) == 3
    assert len(list(client.models.list())) > 3
    assert client.files.delete(file.id).deleted
    assert [file.purpose for file in client.files.list()] == ["fine-tune-results"]


def test_our_models_read_and_write_what_the_client_reads(
    client: Any, server: ScriptedOpenAIProvider, file_id: str
) -> None:
    """Our models read the server's JSON, and what they write is valid by the client's types."""
    job_id = server.add_job(
        {"model": MODEL, "training_file": file_id, "metadata": {"run": "r"}}, "queued"
    )
    server.run_to(job_id, "succeeded")
    raw = client.fine_tuning.jobs.with_raw_response.retrieve(job_id).http_response.content
    job = FineTuningJob.model_validate_json(raw)
    assert (job.error, job.effective_hyperparameters["n_epochs"]) == (None, 3)
    theirs = openai.types.fine_tuning.FineTuningJob.model_validate(job.to_wire())
    assert (theirs.id, theirs.error, theirs.metadata) == (job_id, None, {"run": "r"})
    raw = client.fine_tuning.jobs.with_raw_response.list_events(job_id, limit=3).http_response
    page = ListPage[FineTuningJobEvent].model_validate_json(raw.content)
    assert page.next_after == page.data[-1].id
    server.sends_metrics_data = False
    server.add_event(job_id, "Step 3/36: training loss=1.54")
    event = FineTuningJobEvent.model_validate(server.jobs[job_id].events[-1])
    assert read_metrics(event) == StepMetrics(step=3, total_steps=36, train_loss=1.54)
    for written in (event.model_dump(), page.data[0].model_dump()):
        openai.types.fine_tuning.FineTuningJobEvent.model_validate(written)
