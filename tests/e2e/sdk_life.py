"""A whole life of fine-tuning jobs, driven by the official Python SDK against a gateway.

    python sdk_life.py URL KEY TRAIN.jsonl VALIDATION.jsonl

Runs with `mistralai` 1.x and 2.x. Ends with exit code 0 if everything was as it should be.
"""

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

try:
    from mistralai.client import Mistral
except ImportError:
    from mistralai import Mistral

DEADLINE = 240.0
HYPERPARAMETERS = {"training_steps": 30, "learning_rate": 0.002, "seq_len": 256}


def main(url: str, key: str, train: Path, validation: Path) -> None:
    """Drive everything that a gateway offers, refusals last."""
    client = Mistral(api_key=key, server_url=url)
    files = upload(client, train, validation)
    job = create(client, files)
    finished = run_to_success(client, job.id)
    lists(client, finished)
    model_life(client, finished)
    cancelled = cancel_while_running(client, files)
    refusals(client, url, files, finished, cancelled)
    delete_files(client, files)
    print("ok: whole life")


def upload(client: Any, train: Path, validation: Path) -> tuple[str, str]:
    """Upload both files, twice, and read one back."""
    ids = []
    for path in (train, validation):
        with path.open("rb") as handle:
            made = client.files.upload(
                file={"file_name": path.name, "content": handle}, purpose="fine-tune"
            )
        with path.open("rb") as handle:
            again = client.files.upload(file={"file_name": path.name, "content": handle})
        assert again.id == made.id, "the same file twice is one file"
        found = client.files.retrieve(file_id=made.id)
        assert (found.size_bytes, found.filename) == (path.stat().st_size, path.name), found
        ids.append(made.id)
    content = b"".join(client.files.download(file_id=ids[1]).iter_bytes())
    assert content == validation.read_bytes(), "what comes back is what was sent"
    assert client.files.get_signed_url(file_id=ids[1]).url.startswith("http")
    listed = client.files.list(
        purpose="fine-tune", search=train.stem, sample_type=["instruct"], source=["upload"]
    )
    assert [file.id for file in listed.data] == [ids[0]], listed
    print("ok: files")
    return ids[0], ids[1]


def create(client: Any, files: tuple[str, str]) -> Any:
    """Create a job that waits for its start."""
    job = client.fine_tuning.jobs.create(
        model="tiny-mistral",
        training_files=[{"file_id": files[0], "weight": 1}],
        validation_files=[files[1]],
        hyperparameters=HYPERPARAMETERS,
        suffix="life",
        auto_start=False,
    )
    assert job.status in {"QUEUED", "VALIDATING"}, job.status
    assert job.fine_tuned_model is None
    return job


def wait_for(client: Any, job_id: str, *statuses: str) -> Any:
    """Poll a job until it is in one of `statuses`."""
    deadline = time.monotonic() + DEADLINE
    while True:
        job = client.fine_tuning.jobs.get(job_id=job_id)
        if job.status in statuses:
            return job
        ended = job.status in {"SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED"}
        assert not ended, f"{job.status}: {job.events}"
        assert time.monotonic() < deadline, f"still {job.status}"
        time.sleep(0.2)


def run_to_success(client: Any, job_id: str) -> Any:
    """See the quote, start, and follow to the end."""
    validated = wait_for(client, job_id, "VALIDATED")
    quote = validated.metadata
    assert quote.cost == 0, quote
    assert quote.train_tokens >= quote.data_tokens // 100 > 0, quote
    taken = validated.hyperparameters
    assert (taken.training_steps, taken.seq_len) == (30, 256), taken
    assert (taken.epochs > 0, taken.weight_decay) == (True, 0.1), taken
    client.fine_tuning.jobs.start(job_id=job_id)
    job = wait_for(client, job_id, "SUCCESS")
    words = [e.data["status"] for e in sorted_events(job) if e.name == "status-updated"]
    order = ["QUEUED", "VALIDATING", "VALIDATED", "STARTED", "RUNNING", "SUCCESS"]
    assert [word for word in order if word in words] == words, words
    points = sorted(job.checkpoints, key=lambda point: point.step_number)
    losses = [point.metrics.train_loss for point in points if point.metrics.train_loss]
    assert len(points) >= 2, points
    assert losses[-1] < losses[0], losses
    accuracies = [p.metrics.valid_mean_token_accuracy for p in points]
    assert any(a is not None and 0 <= a <= 1 for a in accuracies), accuracies
    name = job.fine_tuned_model.split(":")
    assert (name[0], name[1], name[-2], name[-1]) == ("ft", "tiny-mistral", "life", job_id[:8])
    print(f"ok: job, train loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(points)} points")
    return job


def sorted_events(job: Any) -> list[Any]:
    """Events as they happened; those of one second keep the order of the answer."""
    events = list(job.events)
    if events and events[0].created_at > events[-1].created_at:
        events.reverse()
    return sorted(events, key=lambda event: event.created_at)


def lists(client: Any, job: Any) -> None:
    """Find the job by every filter, and not by a filter that does not fit."""
    created = datetime.fromtimestamp(job.created_at, UTC)
    fitting: list[dict[str, Any]] = [
        {"page": 0, "page_size": 10},
        {"model": "tiny-mistral"},
        {"created_after": created - timedelta(hours=1)},
        {"created_before": created + timedelta(hours=1)},
        {"created_by_me": True},
        {"status": "SUCCESS"},
        {"suffix": "life"},
    ]
    for filters in fitting:
        found = client.fine_tuning.jobs.list(**filters)
        assert job.id in [each.id for each in found.data], (filters, found)
    excluding: list[dict[str, Any]] = [
        {"page": 50},
        {"model": "open-mistral-7b"},
        {"created_after": created + timedelta(hours=1)},
        {"created_before": created - timedelta(hours=1)},
        {"status": "FAILED"},
        {"wandb_project": "none"},
        {"wandb_name": "none"},
        {"suffix": "other"},
    ]
    for filters in excluding:
        found = client.fine_tuning.jobs.list(**filters)
        assert job.id not in [each.id for each in found.data], (filters, found)
    print("ok: lists")


def model_life(client: Any, job: Any) -> None:
    """Retrieve, update, archive, unarchive and delete the model."""
    model_id = job.fine_tuned_model
    card = client.models.retrieve(model_id=model_id)
    assert (card.root, card.job) == ("tiny-mistral", job.id), card
    assert (card.capabilities.classification, card.capabilities.completion_chat) == (False, True)
    answers(client, model_id)
    updated = client.models.update(model_id=model_id, name="renamed", description="a test")
    assert (updated.name, updated.description) == ("renamed", "a test"), updated
    assert client.models.archive(model_id=model_id).archived is True
    assert client.models.retrieve(model_id=model_id).archived is True
    assert client.models.unarchive(model_id=model_id).archived is False
    assert model_id in [each.id for each in client.models.list().data]
    assert client.models.delete(model_id=model_id).deleted is True
    assert refused(lambda: client.models.retrieve(model_id=model_id)) == 404
    print("ok: model")


def answers(client: Any, model_id: str) -> None:
    """Chat with the model, streamed and not."""
    asked: dict[str, Any] = {
        "model": model_id,
        "messages": [{"role": "user", "content": "What is 2 plus 2?"}],
        "max_tokens": 12,
    }
    said = client.chat.complete(**asked)
    assert (said.model, said.usage.completion_tokens <= 12) == (model_id, True), said
    text = said.choices[0].message.content
    parts = [event.data for event in client.chat.stream(**asked)]
    heard = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    # A stream ends before a character that is incomplete.
    assert heard, parts
    assert text.startswith(heard.rstrip("\N{REPLACEMENT CHARACTER}")), (text, heard)
    assert parts[-1].usage.total_tokens > 0, parts[-1]
    print("ok: answers")


def cancel_while_running(client: Any, files: tuple[str, str]) -> Any:
    """Start a long job at once and cancel it."""
    job = client.fine_tuning.jobs.create(
        model="tiny-mistral",
        training_files=[{"file_id": files[0]}],
        hyperparameters={**HYPERPARAMETERS, "training_steps": 20_000},
        auto_start=True,
    )
    similar = refused(
        lambda: client.fine_tuning.jobs.create(
            model="tiny-mistral",
            training_files=[{"file_id": files[0]}],
            hyperparameters={**HYPERPARAMETERS, "training_steps": 20_000},
            auto_start=True,
        )
    )
    assert similar == 409, similar
    wait_for(client, job.id, "RUNNING")
    asked = client.fine_tuning.jobs.cancel(job_id=job.id)
    assert asked.status in {"CANCELLATION_REQUESTED", "CANCELLED"}, asked.status
    cancelled = wait_for(client, job.id, "CANCELLED")
    print("ok: cancel")
    return cancelled


def refusals(client: Any, url: str, files: tuple[str, str], finished: Any, cancelled: Any) -> None:
    """Ask for what cannot be."""
    unknown = "00000000-0000-4000-8000-000000000000"
    jobs = client.fine_tuning.jobs
    wanted: dict[str, Any] = {
        "model": "tiny-mistral",
        "training_files": [{"file_id": files[0]}],
        "hyperparameters": HYPERPARAMETERS,
    }
    both = {**HYPERPARAMETERS, "epochs": 2}
    stranger = Mistral(api_key="tb-not-a-key", server_url=url)
    asked: list[tuple[str, Callable[[], Any], set[int]]] = [
        ("wrong key", lambda: stranger.files.list(), {401}),
        ("unknown job", lambda: jobs.get(job_id=unknown), {404}),
        ("unknown file", lambda: client.files.retrieve(file_id=unknown), {404}),
        ("unknown model", lambda: client.models.retrieve(model_id="ft:none"), {404}),
        ("model not offered", lambda: jobs.create(**{**wanted, "model": "gpt-9"}), {422}),
        ("long suffix", lambda: jobs.create(**wanted, suffix="x" * 19), {422}),
        ("steps and epochs", lambda: jobs.create(**{**wanted, "hyperparameters": both}), {422}),
        (
            "file that is not there",
            lambda: jobs.create(**{**wanted, "training_files": [{"file_id": unknown}]}),
            {404, 422},
        ),
        ("start of a finished job", lambda: jobs.start(job_id=finished.id), {400, 409, 422}),
        ("start of a cancelled job", lambda: jobs.start(job_id=cancelled.id), {400, 409, 422}),
        (
            "file that is no JSONL",
            lambda: client.files.upload(
                file={"file_name": "bad.jsonl", "content": b"not json\n"}, purpose="fine-tune"
            ),
            {422},
        ),
    ]
    for name, ask, statuses in asked:
        status = refused(ask)
        assert status in statuses, f"{name}: {status}"
    print(f"ok: {len(asked)} refusals")


def refused(ask: Callable[[], Any]) -> int:
    """Return the HTTP status with which `ask` is refused."""
    try:
        answer = ask()
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status is None:
            response = getattr(error, "raw_response", None)
            status = getattr(response, "status_code", None)
        assert status is not None, f"not an HTTP error: {error!r}"
        return int(status)
    raise AssertionError(f"not refused: {answer}")


def delete_files(client: Any, files: tuple[str, str]) -> None:
    """Delete both files and see that they are gone."""
    for file_id in files:
        assert client.files.delete(file_id=file_id).deleted is True
        assert refused(partial(client.files.retrieve, file_id=file_id)) == 404
    print("ok: files deleted")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
