"""A whole life of fine-tuning jobs, driven by OpenAI's official Python SDK against a gateway.

    python sdk_openai.py URL KEY TRAIN.jsonl VALIDATION.jsonl

Ends with exit code 0 if everything was as it should be, and prints how much that was. With the
variable DELIVERIES, a file in which each line is a delivery to the gateway's webhook.
"""

import asyncio
import base64
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import openai
from openai import AsyncOpenAI, OpenAI

DEADLINE = 300.0
MESSAGES: Any = [{"role": "user", "content": "What is the local backend?"}]
UNKNOWN = "00000000000040008000000000000000"


class Checks:
    """Counts what was as it should be, and fails with what was not."""

    def __init__(self) -> None:
        self.passed = 0

    def same(self, what: str, found: Any, wanted: Any) -> None:
        assert found == wanted, f"{what}: {found!r}, not {wanted!r}"
        self.passed += 1

    def true(self, what: str, found: Any) -> None:
        assert found, f"{what}: {found!r}"
        self.passed += 1

    def refused(
        self, what: str, kind: type[openai.APIStatusError], ask: Callable[[], Any], **facts: Any
    ) -> openai.APIStatusError:
        """Check class, status and four keys of an error, and those facts of it."""
        try:
            answer = ask()
        except openai.APIStatusError as error:
            self.same(f"{what}: class", type(error), kind)
            self.same(f"{what}: keys", {*error.body}, {"message", "type", "param", "code"})  # type: ignore[misc]
            self.true(f"{what}: request id", error.request_id)
            for name, wanted in facts.items():
                self.same(f"{what}: {name}", getattr(error, name), wanted)
            return error
        raise AssertionError(f"{what}: not refused: {answer}")


check = Checks()


def main(url: str, key: str, train: Path, validation: Path) -> None:
    """Drive everything that a gateway offers; unmodified code needs two variables."""
    os.environ |= {"OPENAI_BASE_URL": f"{url}/openai/v1", "OPENAI_API_KEY": key}
    client = OpenAI()
    files(client, train)
    uploads(client, train)
    job = job_life(client, train, validation)
    repeated(client, job)
    models(client, job)
    chat(client, job)
    asyncio.run(chat_in_parallel(job.fine_tuned_model))
    again = tuned_again(client, job)
    cancelled = cancel(client, job)
    failed = failure(client, train)
    lists(client, [failed, cancelled, again.id, job.id])
    refusals(client, url, job)
    delete(client, job)
    print(f"ok: {check.passed} checks")


# -- files -----------------------------------------------------------------------------


def files(client: OpenAI, train: Path) -> None:
    """Files of every kind of argument, their content, pages and expiry."""
    content = train.read_bytes()
    with train.open("rb") as handle:
        made = client.files.create(file=handle, purpose="fine-tune")
    check.same("object", made.object, "file")
    check.true("id", made.id.startswith("file-"))
    check.same("bytes", made.bytes, len(content))
    check.same("name", made.filename, train.name)
    check.same("purpose", made.purpose, "fine-tune")
    check.same("status", made.status, "processed")
    check.same("expires", made.expires_at, None)
    check.true("created", abs(made.created_at - time.time()) < 600)
    check.true("request id", made._request_id)
    check.same("retrieved", client.files.retrieve(made.id), made)
    check.same("waited for", client.files.wait_for_processing(made.id), made)
    check.same("content", client.files.content(made.id).read(), content)
    with client.files.with_streaming_response.content(made.id) as streamed:
        check.same("streamed", b"".join(streamed.iter_bytes(1000)), content)
    raw = client.files.with_raw_response.content(made.id)
    check.true("disposition", train.name in raw.headers["content-disposition"])
    check.same("type", raw.headers["content-type"], "application/octet-stream")
    bare = client.files.create(file=content, purpose="fine-tune")
    check.same("a name of the SDK", bare.filename, "upload")
    short = client.files.create(
        file=("été \U0001f40d.txt", b"notes"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    check.same("a name of any script", short.filename, "été \U0001f40d.txt")
    check.same("an expiry", short.expires_at, short.created_at + 3600)
    check.same("text", client.files.content(short.id).text, "notes")
    newest = [file.id for file in client.files.list(limit=2)]
    check.same("newest first", newest[:3], [short.id, bare.id, made.id])
    oldest = [file.id for file in client.files.list(limit=1, order="asc", purpose="fine-tune")]
    check.same("oldest first, by purpose", oldest, [made.id, bare.id])
    page = client.files.list(limit=1)
    check.same("more", page.has_more, True)
    check.same("after", client.files.list(after=short.id).data[0].id, bare.id)
    repeated = client.files.create(
        file=content, purpose="fine-tune", extra_headers={"x-stainless-retry-count": "1"}
    )
    check.same("a retry", repeated.id, bare.id)
    keyed = [
        client.files.create(
            file=content, purpose="fine-tune", extra_headers={"Idempotency-Key": "files"}
        ).id
        for _ in range(2)
    ]
    check.same("an idempotency key", keyed[0], keyed[1])
    for file_id in (bare.id, short.id, keyed[0], made.id):
        gone = client.files.delete(file_id)
        check.same("deleted", (gone.id, gone.deleted, gone.object), (file_id, True, "file"))
    refused(client.files.retrieve, made.id, "deleted file", param="id", code=None, status_code=404)


def refused(act: Callable[[str], Any], given: str, what: str, **facts: Any) -> None:
    """Check a 404."""
    check.refused(what, openai.NotFoundError, lambda: act(given), **facts)


def uploads(client: OpenAI, train: Path) -> None:
    """Uploads in parts, by the helper of the SDK and by hand."""
    content = train.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    done = client.uploads.upload_file_chunked(
        file=train, mime_type="text/jsonl", purpose="fine-tune", part_size=5000, md5=md5
    )
    check.same("completed", (done.object, done.status), ("upload", "completed"))
    assert done.file is not None
    check.same("joined", client.files.content(done.file.id).read(), content)
    check.same("file", client.files.retrieve(done.file.id), done.file)
    made = client.uploads.create(
        bytes=6, filename="a.txt", mime_type="text/plain", purpose="user_data"
    )
    check.true("upload id", made.id.startswith("upload_"))
    check.same("pending", (made.status, made.file), ("pending", None))
    check.same("an hour", made.expires_at - made.created_at, 3600)
    later = client.uploads.parts.create(made.id, data=b"def")
    first = client.uploads.parts.create(made.id, data=b"abc")
    check.same("part", (first.object, first.upload_id), ("upload.part", made.id))
    bad = openai.BadRequestError
    complete = client.uploads.complete
    check.refused("short", bad, lambda: complete(made.id, part_ids=[first.id]), param="part_ids")
    ids = [first.id, later.id]
    check.refused("md5", bad, lambda: complete(made.id, part_ids=ids, md5="0"), param="md5")
    joined = complete(made.id, part_ids=ids)
    assert joined.file is not None
    check.same("in order", client.files.content(joined.file.id).text, "abcdef")
    check.same("completed again", complete(made.id, part_ids=ids), joined)
    check.refused(
        "over", bad, lambda: client.uploads.cancel(made.id), code="invalid_state", status_code=400
    )
    other = client.uploads.create(
        bytes=6, filename="a.txt", mime_type="text/plain", purpose="user_data"
    )
    check.same("cancelled", client.uploads.cancel(other.id).status, "cancelled")
    refused(client.uploads.cancel, f"upload_{UNKNOWN}", "unknown upload", param="id")


# -- jobs ------------------------------------------------------------------------------


def reached(client: OpenAI, job_id: str, *statuses: str) -> Any:
    """Poll a job until it has one of these statuses."""
    deadline = time.monotonic() + DEADLINE
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        assert job.status not in {"succeeded", "failed", "cancelled"}, job
        assert time.monotonic() < deadline, f"still {job.status}"
        time.sleep(0.2)


def job_life(client: OpenAI, train: Path, validation: Path) -> Any:
    """Create a job and follow it to its model."""
    jobs = client.fine_tuning.jobs
    training, checking = (
        client.files.create(file=path, purpose="fine-tune").id for path in (train, validation)
    )
    made = jobs.create(
        model="tiny-mistral",
        training_file=training,
        validation_file=checking,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 1.0}},
        },
        suffix="life",
        metadata={"team": "a b&c", "n": "1"},
        integrations=None,
    )
    check.same("object", made.object, "fine_tuning.job")
    check.true("id", made.id.startswith("ftjob-"))
    check.true("first status", made.status in {"validating_files", "queued", "running"})
    check.same("model", made.model, "tiny-mistral")
    check.same("files", (made.training_file, made.validation_file), (training, checking))
    unknown = (made.fine_tuned_model, made.finished_at, made.trained_tokens, made.error)
    check.same("unknown yet", unknown, (None,) * 4)
    check.same("results", made.result_files, [])
    check.same("metadata", made.metadata, {"team": "a b&c", "n": "1"})
    check.same("integrations", made.integrations, [])
    check.true("seed", isinstance(made.seed, int))
    check.true("organization", made.organization_id)
    check.same("suffix", made.to_dict()["user_provided_suffix"], "life")
    for name in ("fine_tuned_model", "finished_at", "trained_tokens", "error", "estimated_finish"):
        check.true(f"{name} is present", name in made.to_dict())
    running = reached(client, made.id, "running", "succeeded")
    values = running.hyperparameters.to_dict()
    check.same("epochs", values["n_epochs"], 3)
    check.true("batch size", isinstance(values["batch_size"], int))
    check.same("multiplier", values["learning_rate_multiplier"], 1.0)
    check.same("method", running.method.supervised.hyperparameters.to_dict(), values)
    job = reached(client, made.id, "succeeded")
    reported(client, "succeeded", job.id)
    check.same("seed stays", job.seed, made.seed)
    check.true("name", job.fine_tuned_model.startswith("ft:tiny-mistral:"))
    check.true("suffix in the name", ":life:" in job.fine_tuned_model)
    check.true("finished", job.finished_at >= job.created_at)
    check.true("tokens", job.trained_tokens > 0)
    check.same("no error", job.error, None)
    events(client, job)
    checkpoints(client, job)
    results(client, job)
    return job


def events(client: OpenAI, job: Any) -> None:
    """Messages in the words of the service, and metrics of each step."""
    found = list(client.fine_tuning.jobs.list_events(job.id, limit=9))
    check.same("unique", len({event.id for event in found}), len(found))
    check.true("ids", all(event.id.startswith("ftevent-") for event in found))
    check.same("objects", {event.object for event in found}, {"fine_tuning.job.event"})
    check.same("levels", {event.level for event in found}, {"info"})
    times = [event.created_at for event in found]
    check.same("newest first", times, sorted(times, reverse=True))
    messages = [event.message for event in reversed(found) if event.type == "message"]
    check.same("created", messages[0], f"Created fine-tuning job: {job.id}")
    check.same(
        "validating",
        messages[1],
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
    )
    check.same(
        "the rest",
        messages[2:],
        [
            "Files validated, moving job to queued state",
            "Fine-tuning job started",
            f"New fine-tuned model created: {job.fine_tuned_model}",
            "The job has successfully completed",
        ],
    )
    metrics: list[Any] = [event for event in reversed(found) if event.type == "metrics"]
    steps = [event.data["step"] for event in metrics]
    check.same("every step", steps, list(range(1, len(steps) + 1)))
    check.true("loss falls", metrics[-1].data["train_loss"] < metrics[0].data["train_loss"])
    check.same("total", {event.data["total_steps"] for event in metrics}, {len(steps)})
    check.true("text", metrics[0].message.startswith(f"Step 1/{len(steps)}: training loss="))
    check.true("validation", any("valid_loss" in event.data for event in metrics))
    second = client.fine_tuning.jobs.list_events(job.id, after=found[0].id, limit=1)
    check.same("after", (second.data[0].id, second.has_more), (found[1].id, True))


def checkpoints(client: OpenAI, job: Any) -> None:
    """Usable names, newest first."""
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    check.true("several", len(found) >= 2)
    check.same("newest", found[0].fine_tuned_model_checkpoint, job.fine_tuned_model)
    steps = [point.step_number for point in found]
    check.same("order", steps, sorted(steps, reverse=True))
    for point in found:
        check.true("id", point.id.startswith("ftckpt_"))
        check.same("job", point.fine_tuning_job_id, job.id)
        check.same("step", point.metrics.step, point.step_number)
        check.true("losses", point.metrics.train_loss and point.metrics.valid_loss)
        name = point.fine_tuned_model_checkpoint
        check.same("model", client.models.retrieve(name).id, name)
    name = f"{job.fine_tuned_model}:ckpt-step-{found[1].step_number}"
    check.same("earlier", found[1].fine_tuned_model_checkpoint, name)


def results(client: OpenAI, job: Any) -> None:
    """The CSV, as the cookbook reads it."""
    (result,) = job.result_files
    file = client.files.retrieve(result)
    check.same("purpose", file.purpose, "fine-tune-results")
    text = base64.b64decode(client.files.content(result).read()).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    check.same(
        "columns",
        [*rows[0]],
        ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"],
    )
    check.same("rows", [row["step"] for row in rows], [str(n + 1) for n in range(len(rows))])
    check.true("losses", all(float(row["train_loss"]) > 0 for row in rows))
    check.true("validation", any(row["valid_loss"] for row in rows))
    check.same("listed", client.files.list(purpose="fine-tune-results").data[0].id, result)


def repeated(client: OpenAI, job: Any) -> None:
    """Requests that are sent again make no second job."""
    asked: Any = {
        "model": "tiny-mistral",
        "training_file": job.training_file,
        "hyperparameters": {"n_epochs": 50},
        "seed": 5,
    }
    create = client.fine_tuning.jobs.create
    first = create(**asked)
    again = create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    check.same("a retry", again.id, first.id)
    key = {"Idempotency-Key": str(uuid4())}
    keyed = create(**asked, extra_headers=key)
    check.true("another key", keyed.id != first.id)
    check.same("the same key", create(**asked, extra_headers=key).id, keyed.id)
    check.refused(
        "another request",
        openai.BadRequestError,
        lambda: create(**{**asked, "seed": 6}, extra_headers=key),
        code="idempotency_error",
    )
    for made in (first, keyed):
        client.fine_tuning.jobs.cancel(made.id)
        check.same("cancelled", reached(client, made.id, "cancelled").error, None)


# -- models and chat -------------------------------------------------------------------


def models(client: OpenAI, job: Any) -> None:
    """The tuned model beside the base models."""
    listed = {model.id: model for model in client.models.list()}
    check.true("both", {job.fine_tuned_model, "tiny-mistral"} <= listed.keys())
    model = client.models.retrieve(job.fine_tuned_model)
    check.same("the same", model, listed[job.fine_tuned_model])
    check.same("object", model.object, "model")
    check.true("owner", model.owned_by)
    refused(client.models.retrieve, "org/name", "slash", param="model", code="model_not_found")


def said(answers: Iterable[Any]) -> str:
    return "".join(part.choices[0].delta.content or "" for part in answers if part.choices)


def chat(client: OpenAI, job: Any) -> None:
    """The tuned model and a checkpoint answer, streamed and not."""
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    for name in (job.fine_tuned_model, points[1].fine_tuned_model_checkpoint):
        asked: Any = {"model": name, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(**asked)
        check.same("object", answer.object, "chat.completion")
        check.same("model", answer.model, name)
        check.same("role", answer.choices[0].message.role, "assistant")
        check.true("finish", answer.choices[0].finish_reason in {"stop", "length"})
        assert answer.usage is not None
        check.true("usage", 0 < answer.usage.completion_tokens <= 8)
        options: Any = {"include_usage": True}
        parts = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
        check.same("the same streamed", said(parts), answer.choices[0].message.content)
        check.true("usage at the end", parts[-1].usage and not parts[-1].choices)
    check.refused(
        "no model",
        openai.NotFoundError,
        lambda: client.chat.completions.create(model="ft:none", messages=MESSAGES),
        code="model_not_found",
    )


async def chat_in_parallel(model: str) -> None:
    """Several chats of the asynchronous client at a time."""
    async with AsyncOpenAI() as client:
        asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
        answers = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(4)))
    check.same("all alike", len({each.choices[0].message.content for each in answers}), 1)


# -- more jobs -------------------------------------------------------------------------


def tuned_again(client: OpenAI, job: Any) -> Any:
    """Train the tuned model further."""
    made = client.fine_tuning.jobs.create(
        model=job.fine_tuned_model,
        training_file=job.training_file,
        hyperparameters={"n_epochs": 1},
        suffix="more",
    )
    check.same("base", made.model, job.fine_tuned_model)
    done = reached(client, made.id, "succeeded")
    check.true("name", done.fine_tuned_model.startswith("ft:tiny-mistral:"))
    check.true("another", done.fine_tuned_model != job.fine_tuned_model)
    first: list[Any] = [
        [event for event in client.fine_tuning.jobs.list_events(each) if event.type == "metrics"]
        for each in (job.id, done.id)
    ]
    before, after = (metrics[-1].data["train_loss"] for metrics in first)
    check.true("it goes on where the other ended", after < before)
    return done


def cancel(client: OpenAI, job: Any) -> str:
    """Cancel a running job; pausing is said to be impossible where it is."""
    jobs = client.fine_tuning.jobs
    made = jobs.create(
        model="tiny-mistral",
        training_file=job.training_file,
        hyperparameters={"n_epochs": 50},
        metadata={"team": "b"},
    )
    reached(client, made.id, "running")
    bad = openai.BadRequestError
    check.refused("pause", bad, lambda: jobs.pause(made.id), code="unsupported_operation")
    check.true("cancelling", jobs.cancel(made.id).status in {"running", "cancelled"})
    gone = reached(client, made.id, "cancelled")
    reported(client, "cancelled", made.id)
    check.same("no model", (gone.fine_tuned_model, gone.result_files), (None, []))
    newest = jobs.list_events(made.id, limit=1).data[0]
    check.same("said", newest.message, "The job was cancelled")
    check.refused("again", bad, lambda: jobs.cancel(made.id), code="invalid_state")
    return made.id


def failure(client: OpenAI, train: Path) -> str:
    """A row that cannot be trained on fails the job, not the upload."""
    content = train.read_bytes() + b'{"messages": [{"content": "no role"}]}\n'
    file = client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(model="tiny-mistral", training_file=file.id)
    job = reached(client, made.id, "failed")
    reported(client, "failed", made.id)
    check.same("code", job.error.code, "invalid_training_file")
    check.same("param", job.error.param, "training_file")
    lines = len(content.splitlines())
    check.true("line", f"bad.jsonl line {lines}" in job.error.message)
    newest = client.fine_tuning.jobs.list_events(made.id, limit=1).data[0]
    check.same("level", newest.level, "error")
    return made.id


def lists(client: OpenAI, newest_first: list[str]) -> None:
    """Pages and filters."""
    jobs = client.fine_tuning.jobs
    check.same("pages", [job.id for job in jobs.list(limit=2)][:3], newest_first[:3])
    check.same("after", jobs.list(after=newest_first[0], limit=1).data[0].id, newest_first[1])
    check.same("metadata", [j.id for j in jobs.list(metadata={"team": "b"})], [newest_first[1]])
    both = {"team": "a b&c", "n": "1"}
    check.same("all pairs", [job.id for job in jobs.list(metadata=both)], [newest_first[3]])
    check.same("none", jobs.list(metadata={"team": "c"}).data, [])
    without = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
    check.true("without", newest_first[0] in without and newest_first[3] not in without)


def refusals(client: OpenAI, url: str, job: Any) -> None:
    """Ask for what cannot be; everything is an error that the SDK does not repeat."""
    bad = openai.BadRequestError
    create: Any = client.fine_tuning.jobs.create
    asked = {"model": "tiny-mistral", "training_file": job.training_file}
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"model": "gpt-4o-mini"}, {"param": "model", "code": "model_not_available"}),
        ({"training_file": "file-nope"}, {"param": "training_file", "code": None}),
        ({"validation_file": "nope"}, {"param": "validation_file"}),
        ({"suffix": "x" * 65}, {"param": "suffix"}),
        ({"seed": -1}, {"param": "seed"}),
        ({"metadata": {"k" * 65: "v"}}, {}),
        ({"hyperparameters": {"n_epochs": 51}}, {}),
        ({"method": {"type": "reinforcement"}}, {"param": "method"}),
    ]
    for change, facts in wrong:
        what = str(change)[:40]
        check.refused(what, bad, partial(create, **{**asked, **change}), **facts)
    jobs = client.fine_tuning.jobs
    acts: list[Callable[[str], Any]] = [jobs.retrieve, jobs.cancel, jobs.list_events]
    for act in acts:
        refused(act, f"ftjob-{UNKNOWN}", "unknown job", code="fine_tune_not_found")
    refused(client.files.content, f"file-{UNKNOWN}", "unknown file", param="id")
    stranger = OpenAI(api_key="tb-not-a-key", base_url=f"{url}/openai/v1", max_retries=0)
    check.refused(
        "wrong key",
        openai.AuthenticationError,
        lambda: list(stranger.models.list()),
        code="invalid_api_key",
    )
    check.refused(
        "not JSONL",
        bad,
        lambda: client.files.create(file=b"not json\n", purpose="fine-tune"),
        param="file",
    )
    check.refused("limit", bad, lambda: client.files.list(limit=0), param="limit")
    base = openai.PermissionDeniedError
    check.refused("base model", base, lambda: client.models.delete("tiny-mistral"))


def reported(client: OpenAI, status: str, job_id: str) -> None:
    """The end of a job has reached the webhook, signed."""
    if "DELIVERIES" not in os.environ:
        return
    deadline = time.monotonic() + 60
    while True:
        for line in Path(os.environ["DELIVERIES"]).read_text().splitlines():
            delivery = json.loads(line)
            if job_id in delivery["body"]:
                event: Any = client.webhooks.unwrap(delivery["body"], delivery["headers"])
                check.same("event", event.type, f"fine_tuning.job.{status}")
                check.same("its job", event.data.id, job_id)
                return
        assert time.monotonic() < deadline, f"{job_id} is not reported as {status}"
        time.sleep(0.1)


def delete(client: OpenAI, job: Any) -> None:
    """The model is gone, with its checkpoints; the job stays."""
    name = job.fine_tuned_model
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    gone = client.models.delete(name)
    check.same("deleted", (gone.id, gone.deleted, gone.object), (name, True, "model"))
    for each in (name, points[1].fine_tuned_model_checkpoint):
        refused(client.models.retrieve, each, "deleted model", code="model_not_found")
    check.refused(
        "chat",
        openai.NotFoundError,
        lambda: client.chat.completions.create(model=name, messages=MESSAGES),
        code="model_not_found",
    )
    check.same("job", client.fine_tuning.jobs.retrieve(job.id), job)
    check.true("events", client.fine_tuning.jobs.list_events(job.id).data)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
