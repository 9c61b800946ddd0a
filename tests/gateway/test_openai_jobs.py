"""Jobs of the OpenAI API, driven by the official client."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.to_thread
import openai
import pytest
from mistralai.client import Mistral
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from tests.gateway.conftest import KEY, Site, jsonl, openai_client, own_id, scripted, site
from tests.waiting import until
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.core.estimate import Estimate
from training_backends.core.run import ValidationReport
from training_backends.core.status import TrainingStatus
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


class Options(BaseModel):
    """Options of `Reporting`."""

    dpo_beta: float = 0.1


class Reporting(ScriptedBackend):
    """Also reports its defaults."""

    options_model: ClassVar[type[BaseModel]] = Options

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        found = await super().estimate(config, dataset)
        return found.model_copy(
            update={"hyperparameters": {"learning_rate": 1e-4, "batch_size": 16}}
        )


def reporting(**capabilities: Any) -> Reporting:
    declared = ScriptedBackend().capabilities
    return Reporting(capabilities=declared.model_copy(update=capabilities))


HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {n + n}."}],
        "non_preferred_output": [{"role": "assistant", "content": "Five."}],
    }
    for n in range(8)
]


async def upload(sdk: AsyncOpenAI, content: bytes = jsonl()) -> str:
    return (await sdk.files.create(file=("a.jsonl", content), purpose="fine-tune")).id


async def create(sdk: AsyncOpenAI, **fields: Any) -> FineTuningJob:
    asked = {"model": "tiny-mistral", **fields}
    if "training_file" not in asked:
        asked["training_file"] = await upload(sdk)
    return await sdk.fine_tuning.jobs.create(**asked)


async def reached(sdk: AsyncOpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    """Wait until a job has one of these statuses."""
    return await until(
        lambda: sdk.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in statuses
    )


async def run_of(here: Site, sdk: AsyncOpenAI, job_id: str) -> str:
    """Return the id that the backend gave a job, once it runs."""
    await reached(sdk, job_id, "running")
    return await here.remote_id(own_id(job_id))


async def cancelled_by(here: Site, sdk: AsyncOpenAI, job_id: str, remote_id: str) -> None:
    """Let the backend stop a run that was cancelled."""
    stopping = TrainingStatus.STOPPING
    await until(lambda: here.backend._jobs[remote_id].status is stopping)
    here.backend.say(remote_id, TrainingStatus.CANCELLED)
    await reached(sdk, job_id, "cancelled")


async def test_a_job_lives(shared: Site, shared_sdk: AsyncOpenAI) -> None:
    """Created, followed by events and checkpoints, succeeded."""
    validation = await upload(shared_sdk, jsonl([{"messages": HELLO}]))
    made = await create(
        shared_sdk, validation_file=validation, suffix="my model!", seed=7, metadata={"team": "a"}
    )
    assert (made.object, made.model) == ("fine_tuning.job", "tiny-mistral")
    assert made.validation_file == validation
    assert made.status in {"validating_files", "queued", "running"}
    assert (made.seed, made.metadata, made.error) == (7, {"team": "a"}, None)
    assert (made.fine_tuned_model, made.finished_at, made.trained_tokens) == (None, None, None)
    assert (made.result_files, made.integrations) == ([], [])
    remote = await run_of(shared, shared_sdk, made.id)
    for step in range(1, 31):
        shared.backend.measure(remote, step, train_loss=3 - step / 20, valid_loss=2.0)
    shared.backend.finish(remote)
    done = await reached(shared_sdk, made.id, "succeeded")
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("ft:tiny-mistral:")
    assert ":my-model-:" in done.fine_tuned_model
    assert done.finished_at is not None
    assert done.to_dict()["user_provided_suffix"] == "my model!"

    events = [event async for event in shared_sdk.fine_tuning.jobs.list_events(made.id, limit=7)]
    assert len({event.id for event in events}) == len(events)
    oldest_first = events[::-1]
    assert [event.message for event in oldest_first if event.type == "message"] == [
        f"Created fine-tuning job: {made.id}",
        f"Validating training file: {made.training_file} and validation file: {validation}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ]
    metrics: list[Any] = [event for event in oldest_first if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 31))
    assert metrics[0].data == {"step": 1, "train_loss": 2.95, "valid_loss": 2.0}
    assert metrics[0].message == "Step 1: training loss=2.95, validation loss=2.00"
    for start in (0, 3, 32):  # a message of the end, a step, a message of the beginning
        page = await shared_sdk.fine_tuning.jobs.list_events(
            made.id, after=events[start].id, limit=2
        )
        assert [event.id for event in page.data] == [one.id for one in events[start + 1 :][:2]]
        assert page.has_more is True
    with pytest.raises(openai.BadRequestError, match="invalid after"):
        await shared_sdk.fine_tuning.jobs.list_events(made.id, after="nope")

    points = [
        point async for point in shared_sdk.fine_tuning.jobs.checkpoints.list(made.id, limit=1)
    ]
    assert [point.step_number for point in points] == [30, 20, 10]
    assert points[0].fine_tuned_model_checkpoint == done.fine_tuned_model
    assert points[1].fine_tuned_model_checkpoint.endswith(":ckpt-step-20")
    assert points[0].metrics.train_loss == 1.5
    assert points[0].fine_tuning_job_id == made.id
    assert points[0].id.startswith("ftckpt_")
    with pytest.raises(openai.BadRequestError, match="invalid after"):
        await shared_sdk.fine_tuning.jobs.checkpoints.list(made.id, after="nope")


@pytest.mark.parametrize("place", ["method", "hyperparameters"])
async def test_auto_becomes_numbers(place: str, tmp_path: Path) -> None:
    """The backend decides what is left open, and a multiplier multiplies its learning rate."""
    async with site(tmp_path, reporting()) as here, openai_client(here) as sdk:
        given: Any = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 0.5}
        method = {"type": "supervised", "supervised": {"hyperparameters": given}}
        made = await create(sdk, **{place: method if place == "method" else given})
        job = await reached(sdk, made.id, "running")
        numbers = {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 0.5}
        assert job.hyperparameters.to_dict() == numbers
        assert job.method is not None
        expected = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
        assert job.method.to_dict() == expected
        run = await here.served.gateway.client.get(own_id(made.id))
        assert run.config.hyperparameters.learning_rate == 5e-5
        assert run.config.hyperparameters.batch_size is None
        assert (await here.get(own_id(made.id)))["hyperparameters"]["learning_rate"] == 5e-5


async def test_values_are_auto_until_the_job_runs(tmp_path: Path) -> None:
    """As at the service, also for a job whose validation takes a while."""
    backend = reporting()
    backend.gate = anyio.Event()
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        made = await create(sdk)
        assert made.status == "validating_files"
        assert set(made.hyperparameters.to_dict().values()) == {"auto"}
        backend.gate.set()
        job = await reached(sdk, made.id, "running")
        assert job.hyperparameters.learning_rate_multiplier == 1.0


async def test_dpo_trains_with_its_beta(tmp_path: Path) -> None:
    """The method and beta reach the backend; the old field of hyperparameters is null."""
    backend = reporting(methods=frozenset({"sft", "dpo"}))
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        asked: dict[str, Any]
        file_id = await upload(sdk, jsonl(PREFERENCES))
        for asked, shown in (({}, 0.1), ({"beta": 0.4}, 0.4)):
            method = {"type": "dpo", "dpo": {"hyperparameters": asked}}
            made = await create(sdk, training_file=file_id, method=method)
            job = await reached(sdk, made.id, "running")
            assert job.to_dict()["hyperparameters"] is None
            assert job.method is not None
            assert job.method.dpo is not None
            assert job.method.dpo.hyperparameters is not None
            assert job.method.dpo.hyperparameters.beta == shown
            config = (await here.served.gateway.client.get(own_id(made.id))).config
            assert config.method == "dpo"
            assert config.options == ({"dpo_beta": 0.4} if asked else {})


async def test_a_dry_run_estimates_and_creates_no_job(tmp_path: Path) -> None:
    """For data that only the OpenAI format has, too."""
    backend = reporting(methods=frozenset({"sft", "dpo"}))
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        body: dict[str, Any] = {
            "model": "tiny-mistral",
            "training_file": await upload(sdk, jsonl(PREFERENCES)),
            "method": {"type": "dpo"},
        }
        path = "/openai/v1/fine_tuning/jobs?dry_run=true"
        quote = (await here.http.post(path, json=body)).json()
        assert (quote["training_steps"], quote["cost"], quote["cost_currency"]) == (10, 0, "USD")
        assert (await sdk.fine_tuning.jobs.list()).data == []


async def test_rows_are_converted_for_the_backend(tmp_path: Path) -> None:
    """Rows of the OpenAI format that the backend does not accept; the file itself stays."""
    system, user, assistant = (
        {"role": role, "content": role} for role in ("developer", "user", "assistant")
    )
    rows = [
        {"messages": [system, user, assistant]},
        {"prompt": "Hello", "completion": "Hi"},
    ]
    backend = reporting(provider_format=MISTRAL)
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        file_id = await upload(sdk, jsonl(rows))
        made = await create(sdk, training_file=file_id)
        await reached(sdk, made.id, "running")
        config = (await here.served.gateway.client.get(own_id(made.id))).config
        path = config.data.train[0].local_path
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"messages": [{**system, "role": "system"}, user, assistant]},
            {"messages": HELLO},
        ]
        assert (await sdk.files.content(file_id)).content == jsonl(rows)
        # Its content is needed until the job ends.
        await sdk.files.delete(file_id)
        assert path.exists()
        here.backend.finish(here.backend.created[-1])
        await until(lambda: not path.exists())


async def test_errors_name_the_file_and_no_path(tmp_path: Path) -> None:
    """A row that no conversion makes valid is reported by line and name of the uploaded file."""
    backend = reporting(provider_format=MISTRAL)
    rows = [{"prompt": "Hello", "completion": "Hi"}, {"messages": [HELLO[0]]}]
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        file_id = await upload(sdk, jsonl(rows))
        job = await reached(sdk, (await create(sdk, training_file=file_id)).id, "failed")
        assert job.error is not None
        assert job.error.message.startswith("a.jsonl line 2: ")
        assert job.error.code == "invalid_training_file"
        assert str(here.home) not in job.to_json()


async def test_a_running_job_is_paused_resumed_and_cancelled(
    shared: Site, shared_sdk: AsyncOpenAI
) -> None:
    """Only in these statuses; anything else is an error that the client does not repeat."""
    jobs = shared_sdk.fine_tuning.jobs
    made = await create(shared_sdk)
    remote = await run_of(shared, shared_sdk, made.id)
    assert (await jobs.pause(made.id)).to_dict()["status"] == "paused"
    assert (await shared.get(own_id(made.id)))["status"] == "RUNNING"
    assert (await jobs.resume(made.id)).status == "running"
    assert (await jobs.cancel(made.id)).status == "running"
    await cancelled_by(shared, shared_sdk, made.id, remote)
    newest = (await jobs.list_events(made.id, limit=1)).data[0]
    assert newest.message == "The job was cancelled"
    for act in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError) as refused:
            await act(made.id)
        assert refused.value.code == "invalid_state"


async def test_a_job_that_fails_says_why(here: Site, sdk: AsyncOpenAI) -> None:
    """With a code, a message and the parameter, as does its last event."""
    made = await create(sdk)
    here.backend.fail(await run_of(here, sdk, made.id), "out of memory")
    job = await reached(sdk, made.id, "failed")
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("internal", "out of memory")
    newest = (await sdk.fine_tuning.jobs.list_events(made.id, limit=1)).data[0]
    assert (newest.level, newest.message) == ("error", "The job failed: out of memory")
    issue = Issue(code="bad_row", message="no answer", path="x", line=3)
    here.backend.report = ValidationReport(issues=(issue,))
    job = await reached(sdk, (await create(sdk)).id, "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.error.message == "a file line 3: no answer"


async def test_lists_have_pages_and_filters(here: Site, sdk: AsyncOpenAI) -> None:
    """Newest first, with every pair of metadata that is asked for."""
    file_id = await upload(sdk)
    made = []
    for metadata in (None, {"a b": "c&d"}, {"a b": "c&d", "x": "1"}, {}, {"x": ""}):
        fields = {} if metadata is None else {"metadata": metadata}
        made.append((await create(sdk, training_file=file_id, **fields)).id)
    jobs = sdk.fine_tuning.jobs
    assert [job.id async for job in jobs.list(limit=2)] == made[::-1]
    assert (await jobs.list(limit=2)).has_more is True
    assert [job.id async for job in jobs.list(metadata={"a b": "c&d"})] == [made[2], made[1]]
    assert [job.id async for job in jobs.list(metadata={"a b": "c&d", "x": "1"})] == [made[2]]
    assert [job.id async for job in jobs.list(metadata={"x": ""})] == [made[4]]
    without = jobs.list(extra_query={"metadata": "null"})
    assert [job.id async for job in without] == [made[3], made[0]]
    with pytest.raises(openai.BadRequestError, match="invalid after"):
        await jobs.list(after="nope")
    with pytest.raises(openai.BadRequestError, match="quotes"):
        await jobs.list(metadata={'"': "1"})


async def test_a_repeated_request_makes_no_second_job(here: Site, sdk: AsyncOpenAI) -> None:
    """Known by the client's retry count, or by an idempotency key; two requests make two jobs."""
    file_id = await upload(sdk)

    async def ask(seed: int, headers: dict[str, str] | None = None) -> str:
        made = await create(sdk, training_file=file_id, seed=seed, extra_headers=headers or {})
        return made.id

    first = await ask(1)
    assert await ask(1, {"x-stainless-retry-count": "2"}) == first
    assert await ask(2, {"x-stainless-retry-count": "1"}) != first
    assert await ask(1) != first
    keyed = await ask(3, {"Idempotency-Key": "k"})
    assert await ask(3, {"Idempotency-Key": "k"}) == keyed
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(4, {"Idempotency-Key": "k"})
    assert refused.value.code == "idempotency_error"
    assert len((await sdk.fine_tuning.jobs.list()).data) == 4


async def test_both_apis_show_the_same_jobs(here: Site, sdk: AsyncOpenAI) -> None:
    """A file and a job of either client are seen by the other, which may cancel them."""
    mistral = Mistral(api_key=KEY, server_url=here.served.url)
    file_id = await upload(sdk)
    theirs: Any = await mistral.fine_tuning.jobs.create_async(
        model="tiny-mistral",
        training_files=[{"file_id": own_id(file_id), "weight": 1}],
        hyperparameters={"training_steps": 10, "learning_rate": 1e-4},
        auto_start=True,
    )
    seen: Any = await reached(sdk, theirs.id, "running")
    assert (seen.training_file, seen.seed, seen.metadata) == (file_id, None, None)
    assert seen.method.type == "supervised"
    ours = await create(sdk, training_file=file_id, seed=1)
    remote = await run_of(here, sdk, ours.id)
    listed: Any = await mistral.fine_tuning.jobs.list_async()
    assert {job.id for job in listed.data} == {own_id(ours.id), theirs.id}
    await mistral.fine_tuning.jobs.cancel_async(job_id=own_id(ours.id))
    await cancelled_by(here, sdk, ours.id, remote)


async def test_errors_are_the_classes_of_the_client(tmp_path: Path) -> None:
    """With the messages, parameters and codes of the service."""
    backend = scripted(hyperparameters=frozenset({"epochs"}), pauses=False)
    async with site(tmp_path, backend) as here, openai_client(here) as sdk:
        jobs = sdk.fine_tuning.jobs

        async def refused(**fields: Any) -> openai.BadRequestError:
            with pytest.raises(openai.BadRequestError) as caught:
                await create(sdk, **fields)
            return caught.value

        acts: Any = (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events)
        for act in acts:
            with pytest.raises(openai.NotFoundError, match="Could not find fine tune: x") as gone:
                await act("x")
            assert gone.value.code == "fine_tune_not_found"
        error = await refused(model="gpt-4o-mini")
        assert (error.param, error.code) == ("model", "model_not_available")
        error = await refused(training_file="file-nope")
        assert "invalid training_file: file-nope" in error.message
        assert (error.param, error.code) == ("training_file", None)
        assert (await refused(validation_file="nope")).param == "validation_file"
        assert (await refused(suffix="s" * 65)).param == "suffix"
        assert (await refused(seed=1)).param == "seed"
        rate: Any = {"learning_rate_multiplier": 2}
        error = await refused(hyperparameters=rate)
        assert error.param == "hyperparameters.learning_rate_multiplier"
        for kind in ("dpo", "reinforcement"):
            assert (await refused(method={"type": kind})).param == "method"
        made = await create(sdk)
        await reached(sdk, made.id, "running")
        with pytest.raises(openai.BadRequestError, match="cannot pause"):
            await jobs.pause(made.id)


async def test_a_key_sees_its_project_only(shared: Site, shared_sdk: AsyncOpenAI) -> None:
    """Files, jobs and models of another project do not exist, and a read-only key only reads."""
    file_id = await upload(shared_sdk)
    made = await create(shared_sdk, training_file=file_id)
    keys = shared.served.gateway.keys
    other = await anyio.to_thread.run_sync(lambda: keys.create(project="other"))
    theirs = shared_sdk.with_options(api_key=other.key.get_secret_value())
    assert (await theirs.files.list()).data == []
    assert (await theirs.fine_tuning.jobs.list()).data == []
    with pytest.raises(openai.NotFoundError, match="Could not find fine tune"):
        await theirs.fine_tuning.jobs.cancel(made.id)
    with pytest.raises(openai.BadRequestError, match="invalid training_file"):
        await create(theirs, training_file=file_id)
    lists: Any
    for lists in (theirs.files.list, theirs.fine_tuning.jobs.list):
        with pytest.raises(openai.BadRequestError, match="invalid after"):
            await lists(after=made.id)
    reader = await anyio.to_thread.run_sync(lambda: keys.create(scope="read"))
    read_only = shared_sdk.with_options(api_key=reader.key.get_secret_value())
    assert (await read_only.fine_tuning.jobs.retrieve(made.id)).id == made.id
    with pytest.raises(openai.PermissionDeniedError, match="read-only"):
        await read_only.fine_tuning.jobs.cancel(made.id)


async def test_a_multiplier_needs_a_known_learning_rate(
    shared: Site, shared_sdk: AsyncOpenAI
) -> None:
    """A backend that reports no default fails the job; 1.0 is its default, whatever that is."""
    rate: Any = {"learning_rate_multiplier": 2}
    job = await reached(shared_sdk, (await create(shared_sdk, hyperparameters=rate)).id, "failed")
    assert job.error is not None
    assert "does not report its default learning rate" in job.error.message
    rate = {"learning_rate_multiplier": 1.0}
    await reached(shared_sdk, (await create(shared_sdk, hyperparameters=rate)).id, "running")


async def test_ids_have_a_prefix_here_and_none_in_the_other_api(
    here: Site, sdk: AsyncOpenAI
) -> None:
    """Pure mapping: this API reads either form, of a path, a body or the start of a page."""
    file_id = await upload(sdk)
    assert re.fullmatch("file-[0-9a-f]{32}", file_id)
    first = await create(sdk, training_file=own_id(file_id))
    second = await create(sdk, training_file=file_id)
    assert re.fullmatch("ftjob-[0-9a-f]{32}", first.id)
    assert first.training_file == second.training_file == file_id
    assert (await here.get(own_id(first.id)))["training_files"] == [own_id(file_id)]
    assert (await sdk.files.retrieve(own_id(file_id))).id == file_id
    for form in (second.id, own_id(second.id)):
        assert (await sdk.fine_tuning.jobs.retrieve(form)).id == second.id
        page = await sdk.fine_tuning.jobs.list(after=form)
        assert [job.id for job in page.data] == [first.id]
    event = (await sdk.fine_tuning.jobs.list_events(own_id(first.id))).data[-1]
    assert event.id.startswith("ftevent-")
    assert event.message == f"Created fine-tuning job: {first.id}"
    with pytest.raises(openai.NotFoundError):
        await sdk.fine_tuning.jobs.retrieve(file_id)
