"""The life of jobs over HTTP."""

import errno
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest

from tests.gateway.conftest import ROWS, Site, jsonl, scripted, site
from tests.readings import counted_readings
from tests.waiting import until
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    BackendUnavailable,
    DatasetError,
    Issue,
    RunNotFound,
    StoreError,
    TrainingBackendError,
)
from training_backends.core.estimate import Estimate, Money
from training_backends.core.run import TrainingRun, ValidationReport, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.gateway import runner
from training_backends.gateway.job_events import STATUS_EVENT
from training_backends.gateway.store import GatewayStore
from training_backends.store import RunStore
from training_backends.testing import backend as scripted_backend
from training_backends.testing.backend import ScriptedBackend
from training_backends.tokens import count_tokens

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


def statuses(job: dict[str, Any]) -> list[str]:
    """Return the statuses that a job's events tell of."""
    return [event["data"]["status"] for event in job["events"] if event["name"] == STATUS_EVENT]


async def test_a_job_lives_from_upload_to_model(here: Site) -> None:
    """Quoted once validated, queued again without event, followed to its model."""
    job = await here.create(suffix="mine")
    assert (job["status"], job["metadata"], job["fine_tuned_model"]) == ("QUEUED", None, None)
    validated = await here.until(job["id"], "VALIDATED")
    assert validated["metadata"]["cost"] == 0
    assert validated["metadata"]["cost_currency"] == "USD"
    assert validated["metadata"]["data_tokens"] == len(jsonl())
    assert here.backend.created == []
    started = (await here.http.post(f"{JOBS}/{job['id']}/start")).json()
    assert (started["status"], statuses(started)[-1]) == ("QUEUED", "VALIDATED")
    running = await here.until(job["id"], "RUNNING")
    assert running["checkpoints"] == []
    (remote,) = here.backend.created
    here.backend.measure(remote, 10, train_loss=2.0)
    here.backend.measure(remote, 20, train_loss=1.5, valid_loss=1.6, valid_mean_token_accuracy=0.4)
    here.backend.finish(remote)
    done = await here.until(job["id"], "SUCCESS")
    assert statuses(done) == ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]
    assert [point["step_number"] for point in done["checkpoints"]] == [20, 10]
    assert done["checkpoints"][0]["metrics"] == {
        "train_loss": 1.5,
        "valid_loss": 1.6,
        "valid_mean_token_accuracy": 0.4,
    }
    assert done["checkpoints"][1]["metrics"]["valid_loss"] is None
    head, base, org, day, suffix, tail = done["fine_tuned_model"].split(":")
    assert (head, base, suffix, tail) == ("ft", "tiny-mistral", "mine", job["id"][:8])
    assert (len(org), len(day)) == (8, 8)


async def test_auto_start_needs_no_start(shared: Site) -> None:
    """A job that asks for it is started once it is validated."""
    job_id, remote = await shared.started()
    await shared.until(job_id, "RUNNING")
    shared.backend.finish(remote)
    assert statuses(await shared.until(job_id, "SUCCESS"))[-2:] == ["RUNNING", "SUCCESS"]


async def test_the_backend_s_own_steps_are_told(shared: Site) -> None:
    """Initializing is STARTED, and a status never goes back."""
    backend = shared.backend
    job_id, remote = await shared.started()
    await shared.until(job_id, "RUNNING")
    backend.tell(remote, TrainingStatus.INITIALIZING)
    backend.measure(remote, 10, train_loss=1.0)
    job = await until(lambda: shared.get(job_id), lambda job: job["checkpoints"])
    assert job["status"] == "RUNNING"
    backend.finish(remote)
    await shared.until(job_id, "SUCCESS")


async def test_nothing_is_null_that_clients_cannot_read(here: Site) -> None:
    """A TypeScript client drops a job in which one of these is null."""
    job = await here.create()
    detailed = await here.get(job["id"])
    assert job["repositories"] == []
    assert job["validation_files"] == []
    assert job["hyperparameters"]["learning_rate"] == 1e-4
    assert (detailed["repositories"], detailed["checkpoints"]) == ([], [])
    assert isinstance(detailed["events"][0]["created_at"], int)
    listed = (await here.http.get(JOBS)).json()
    assert (listed["object"], listed["total"]) == ("list", 1)
    assert "events" not in listed["data"][0]


async def test_bare_ids_are_read_as_training_files(shared: Site) -> None:
    """The documentation's own sample sends them."""
    file_id = await shared.upload(name="bare.jsonl")
    job = await shared.create(training_files=[file_id])
    assert job["training_files"] == [file_id]


async def test_a_job_that_names_no_length_gets_one_and_shows_it(shared: Site) -> None:
    """What is taken by default stands in the job."""
    job = await shared.create(hyperparameters={})
    assert job["hyperparameters"]["epochs"] == 3.0
    assert job["hyperparameters"]["training_steps"] is None


async def test_a_validated_job_shows_the_hyperparameters_it_will_be_trained_with(
    shared: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that were sent stay; the rest is what the backend settled on."""
    estimate = shared.backend.estimate

    async def settled(*args: Any) -> Any:
        found = await estimate(*args)
        values = {"learning_rate": 0.002, "weight_decay": 0.1, "seq_len": 1024, "batch_size": 16}
        return found.model_copy(update={"hyperparameters": values, "epochs": 1.5})

    monkeypatch.setattr(shared.backend, "estimate", settled)
    chosen = {"epochs": 2, "weight_decay": 0.0}
    unknown = dict.fromkeys(("training_steps", "warmup_fraction", "seq_len", "fim_ratio"))
    job = await shared.create(hyperparameters=chosen)
    assert job["hyperparameters"] == {**unknown, **chosen, "learning_rate": 1e-4}
    validated = await shared.until(job["id"], "VALIDATED")
    taken = {"training_steps": 10, "learning_rate": 0.002, "seq_len": 1024}
    assert validated["hyperparameters"] == {**unknown, **chosen, **taken}
    again = await shared.try_create(files=job["training_files"], hyperparameters=chosen)
    assert again.status_code == 409


async def test_the_quote_is_the_backend_s(tmp_path: Path) -> None:
    """Cost and currency come from the estimate."""
    backend = scripted()
    backend.price = Money.model_validate("12.5 EUR")
    async with site(tmp_path, backend) as here:
        job = await here.create()
        quote = (await here.until(job["id"], "VALIDATED"))["metadata"]
    assert (quote["cost"], quote["cost_currency"]) == (12.5, "EUR")
    assert quote["train_tokens_per_step"] == round(quote["train_tokens"] / 10)


async def test_a_dry_run_quotes_and_makes_no_job(shared: Site) -> None:
    """The answer is metadata, and nothing is left."""
    file_id = await shared.upload()
    before = (await shared.http.get(JOBS)).json()["total"]
    body = {
        "model": "tiny-mistral",
        "training_files": [{"file_id": file_id}],
        "hyperparameters": {"epochs": 2},
    }
    answer = await shared.http.post(f"{JOBS}?dry_run=true", json=body)
    found = answer.json()
    assert (answer.status_code, found["object"]) == (200, "job.metadata")
    assert (found["deprecated"], found["epochs"], found["training_steps"]) == (True, 2, 10)
    assert isinstance(found["details"], str)
    assert (await shared.http.get(JOBS)).json()["total"] == before


async def test_a_dry_run_of_what_cannot_run_says_why(here: Site) -> None:
    """The backend's objections are the answer."""
    here.backend.report = ValidationReport(issues=(Issue(code="x", message="not on this chip"),))
    answer = await here.http.post(
        f"{JOBS}?dry_run=true",
        json={
            "model": "tiny-mistral",
            "training_files": [await here.upload()],
            "hyperparameters": {},
        },
    )
    assert (answer.status_code, answer.json()) == (422, {"detail": "not on this chip"})


async def test_every_filter_of_the_list(here: Site) -> None:
    """Each filter keeps what fits and leaves out what does not."""
    done = await here.finished(suffix="one")
    waits = await here.create(suffix="two", model="open-mistral-7b")
    await here.until(waits["id"], "VALIDATED")
    created = datetime.fromtimestamp(done["created_at"], UTC)
    hour = timedelta(hours=1)

    async def ids(**query: Any) -> list[str]:
        answer = await here.http.get(JOBS, params=query)
        assert answer.status_code == 200, answer.text
        found = [job["id"] for job in answer.json()["data"]]
        assert answer.json()["total"] == len(found)
        return found

    both = [waits["id"], done["id"]]
    assert await ids() == both
    assert await ids(model="open-mistral-7b") == [waits["id"]]
    assert await ids(status="SUCCESS") == [done["id"]]
    assert await ids(suffix="one") == [done["id"]]
    assert await ids(created_by_me=True) == both
    assert await ids(wandb_project="p") == []
    assert await ids(wandb_name="n") == []
    for moment in (created - hour, (created - hour).replace(tzinfo=None)):
        assert await ids(created_after=moment.isoformat()) == both
        assert await ids(created_before=moment.isoformat()) == []
    assert await ids(created_after=(created + hour).isoformat()) == []
    assert await ids(created_before=f"{created + hour:%Y-%m-%dT%H:%M:%S}.000Z") == both


async def test_pages_of_the_list_count_all(here: Site) -> None:
    """The total is that of the filter, not of the page."""
    made = [(await here.create(suffix=f"n{n}"))["id"] for n in range(3)]
    page = (await here.http.get(f"{JOBS}?page=1&page_size=2")).json()
    assert ([job["id"] for job in page["data"]], page["total"]) == ([made[0]], 3)


async def test_created_by_me_knows_the_key(here: Site) -> None:
    """Another key's jobs are left out."""
    await here.create()
    keys = here.served.gateway.keys
    other = await anyio.to_thread.run_sync(keys.create, "other")
    here.http.headers["authorization"] = f"Bearer {other.key.get_secret_value()}"
    assert (await here.http.get(f"{JOBS}?created_by_me=true")).json()["total"] == 0
    assert (await here.http.get(JOBS)).json()["total"] == 1


async def test_a_start_repeated_is_harmless_and_one_too_early_or_late_refused(here: Site) -> None:
    """One run comes of many starts."""
    gate = here.backend.gate = anyio.Event()
    job = await here.create()
    early = await here.http.post(f"{JOBS}/{job['id']}/start")
    assert early.status_code == 422
    assert "VALIDATED" in early.json()["detail"]
    gate.set()
    await here.until(job["id"], "VALIDATED")
    for _ in range(3):
        assert (await here.http.post(f"{JOBS}/{job['id']}/start")).status_code == 200
    await here.until(job["id"], "RUNNING")
    assert (await here.http.post(f"{JOBS}/{job['id']}/start")).status_code == 200
    assert len(here.backend.created) == 1
    here.backend.finish(here.backend.created[0])
    await here.until(job["id"], "SUCCESS")
    assert (await here.http.post(f"{JOBS}/{job['id']}/start")).status_code == 422


@pytest.mark.parametrize("while_validating", [True, False])
async def test_a_job_cancelled_before_its_start_is_over_at_once(
    here: Site, while_validating: bool
) -> None:
    """Whether its validation is over or not."""
    gate = here.backend.gate = anyio.Event() if while_validating else None
    job = await here.create()
    await here.until(job["id"], "VALIDATING" if while_validating else "VALIDATED")
    answer = await here.http.post(f"{JOBS}/{job['id']}/cancel")
    assert answer.json()["status"] == "CANCELLED"
    if gate:
        gate.set()
    assert (await here.http.post(f"{JOBS}/{job['id']}/cancel")).json()["status"] == "CANCELLED"
    assert (await here.http.post(f"{JOBS}/{job['id']}/start")).status_code == 422
    assert here.backend.created == []


async def test_a_running_job_is_cancelled_when_the_backend_has_stopped(shared: Site) -> None:
    """CANCELLATION_REQUESTED first; CANCELLED is not said before it is true."""
    job_id, remote = await shared.started()
    await shared.until(job_id, "RUNNING")
    answer = await shared.http.post(f"{JOBS}/{job_id}/cancel")
    assert answer.json()["status"] == "CANCELLATION_REQUESTED"
    await until(lambda: shared.backend._jobs[remote].status is TrainingStatus.STOPPING)
    again = await shared.http.post(f"{JOBS}/{job_id}/cancel")
    assert again.json()["status"] == "CANCELLATION_REQUESTED"
    shared.backend.say(remote, TrainingStatus.CANCELLED)
    job = await shared.until(job_id, "CANCELLED")
    assert statuses(job)[-3:] == ["RUNNING", "CANCELLATION_REQUESTED", "CANCELLED"]
    assert job["fine_tuned_model"] is None


async def test_a_start_that_only_the_launch_reported_stays_among_the_events(here: Site) -> None:
    """Also when the first observation finds the run stopping already."""
    here.backend.trouble = BackendUnavailable("away", sent=False)
    job_id, remote = await here.started()
    await here.until(job_id, "RUNNING")
    await here.http.post(f"{JOBS}/{job_id}/cancel")
    await until(lambda: here.backend._jobs[remote].status is TrainingStatus.STOPPING)
    here.backend.trouble = None
    seen = len(here.backend.looks)
    await until(lambda: len(here.backend.looks) > seen)
    here.backend.say(remote, TrainingStatus.CANCELLED)
    job = await here.until(job_id, "CANCELLED")
    assert statuses(job)[-3:] == ["RUNNING", "CANCELLATION_REQUESTED", "CANCELLED"]


class Stops(ScriptedBackend):
    """Keeps whether each stop saves a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        self.asked.append(save_checkpoint)
        await super().stop(run, save_checkpoint=save_checkpoint)


async def test_a_run_stopped_elsewhere_is_not_stopped_again(tmp_path: Path) -> None:
    """It would save the checkpoint that was not wanted; nor by the next gateway."""
    backend = Stops()
    async with site(tmp_path, backend) as here:
        job_id, remote_id = await here.started()
        await here.until(job_id, "RUNNING")
        await here.served.gateway.client.stop(job_id, save_checkpoint=False)
        await here.until(job_id, "CANCELLATION_REQUESTED")
    async with site(tmp_path, backend) as here:
        seen = len(backend.looks)
        await until(lambda: len(backend.looks) > seen + 2)
        backend.say(remote_id, TrainingStatus.CANCELLED)
        await here.until(job_id, "CANCELLED")
    assert backend.asked == [False]


async def test_a_job_cancelled_while_its_launch_fails_is_over(here: Site) -> None:
    """A backend that is away must not keep a job alive that nobody wants."""
    error = BackendUnavailable("away", sent=False)
    here.backend.before_create = here.backend.refusing(error)
    job = await here.create(auto_start=True)
    await until(
        lambda: here.get(job["id"]),
        lambda job: job["status"] == "QUEUED" and "VALIDATED" in statuses(job),
    )
    await here.http.post(f"{JOBS}/{job['id']}/cancel")
    await here.until(job["id"], "CANCELLED")
    assert here.backend.created == []


async def test_a_backend_that_cannot_stop_keeps_its_jobs(tmp_path: Path) -> None:
    """The refusal says so, and the job goes on."""
    async with site(tmp_path, scripted(stops=False)) as here:
        job_id, remote = await here.started()
        answer = await here.http.post(f"{JOBS}/{job_id}/cancel")
        assert (answer.status_code, "cannot stop" in answer.json()["detail"]) == (422, True)
        here.backend.finish(remote)
        await here.until(job_id, "SUCCESS")


async def test_a_failure_stands_in_an_event(shared: Site) -> None:
    """With the reason that the backend gave."""
    job_id, remote = await shared.started()
    shared.backend.fail(remote, "out of luck")
    job = await shared.until(job_id, "FAILED")
    assert job["events"][-1]["data"] == {
        "status": "FAILED",
        "error": "out of luck",
        "kind": "internal",
    }


async def test_a_job_that_cannot_run_fails_validation_with_the_reasons(here: Site) -> None:
    """File names as the client gave them; nobody hears where they lie here."""
    file_id = await here.upload(name="mine.jsonl")
    path = next((here.home / "gateway" / "files").iterdir())
    here.backend.report = ValidationReport(
        issues=(
            Issue(code="x", message=f"{path} is odd", path=str(path), line=3),
            Issue(code="y", message="too deep", field="hyperparameters.seq_len"),
        )
    )
    job = await here.create(files=[file_id])
    failed = await here.until(job["id"], "FAILED_VALIDATION")
    data = failed["events"][-1]["data"]
    assert data["error"] == (
        "mine.jsonl line 3: mine.jsonl is odd; hyperparameters.seq_len: too deep"
    )
    assert data["errors"][0] == {
        "message": "mine.jsonl is odd",
        "file": "mine.jsonl",
        "line_number": 3,
    }
    assert str(here.home) not in str(failed)
    assert (failed["metadata"], here.backend.created) == (None, [])


async def test_a_failed_validation_says_what_to_do(here: Site) -> None:
    """In the sentence and beside each reason."""
    here.backend.report = ValidationReport(
        issues=(Issue(code="x", message="too deep", field="a", fix="use less"),)
    )
    job = await here.create()
    data = (await here.until(job["id"], "FAILED_VALIDATION"))["events"][-1]["data"]
    assert data["error"] == "a: too deep (use less)"
    assert data["errors"] == [{"message": "too deep", "field": "a", "fix": "use less"}]


async def test_the_same_content_to_train_and_validate_fails_validation(shared: Site) -> None:
    """What the dataset inspection finds stops a job too."""
    both = [await shared.upload(), await shared.upload(name="again.jsonl")]
    job = await shared.create(files=both[:1], validation_files=both[1:])
    failed = await shared.until(job["id"], "FAILED_VALIDATION")
    error = failed["events"][-1]["data"]["error"]
    assert "same content as the training file train.jsonl / again.jsonl" in error


async def test_a_bug_in_a_backend_fails_one_job_and_not_the_gateway(
    here: Site, logs: list[Any]
) -> None:
    """The event names the kind of error only; the log has the rest."""

    def bug() -> None:
        raise ZeroDivisionError("secret detail")

    here.backend.before_create = bug
    job = await here.create(auto_start=True)
    failed = await here.until(job["id"], "FAILED")
    assert "ZeroDivisionError" in failed["events"][-1]["data"]["error"]
    assert "secret detail" not in str(failed)
    assert any(entry.get("exc_info") for entry in logs)
    here.backend.before_create = lambda: None
    await here.finished(suffix="next")


async def test_a_run_that_the_backend_lost_fails(shared: Site) -> None:
    """Instead of running for ever."""
    job_id, remote = await shared.started()
    await shared.until(job_id, "RUNNING")
    shared.backend.lose(remote)
    failed = await shared.until(job_id, "FAILED")
    assert "has not found this run" in failed["events"][-1]["data"]["error"]


async def test_a_backend_that_is_away_is_waited_for(here: Site) -> None:
    """The launch is tried again, and one run comes of it."""
    tries: list[int] = []

    def away_once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise BackendUnavailable("away", sent=False)

    here.backend.before_create = away_once
    await here.finished()
    assert (len(tries), len(here.backend.created)) == (2, 1)


@pytest.mark.parametrize(
    ("store", "method"),
    [(GatewayStore, "write"), (RunStore, "observed"), (RunStore, "undelivered")],
    ids=["job", "run", "event"],
)
async def test_a_database_that_fails_for_a_while_fails_no_job(
    shared: Site, monkeypatch: pytest.MonkeyPatch, store: type, method: str
) -> None:
    """The run continues meanwhile, and its job shows how it ends."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.01)
    job_id, remote_id = await shared.started()
    await shared.until(job_id, "RUNNING")
    working = getattr(store, method)
    rejected: list[str] = []

    def full(*_: Any, **__: Any) -> Any:
        rejected.append(method)
        raise StoreError("The database cannot be used: disk is full")

    monkeypatch.setattr(store, method, full)
    shared.backend.measure(remote_id, 10, train_loss=1.5)
    shared.backend.tell(remote_id, TrainingStatus.STOPPING)
    await until(lambda: rejected)
    monkeypatch.setattr(store, method, working)
    shared.backend.measure(remote_id, 20, train_loss=1.0)
    shared.backend.finish(remote_id)
    ended = await shared.until(job_id, "SUCCESS", "FAILED")
    steps = [point["step_number"] for point in ended["checkpoints"]]
    assert (ended["status"], steps) == ("SUCCESS", [20, 10])


SHORTAGES = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
    RuntimeError("can't start new thread"),
    StoreError("disk I/O error"),
    DatasetError("x", issues=[Issue(code="unreadable_file", message="too many open files")]),
]


@pytest.mark.parametrize(
    ("verb", "shortage"),
    [
        *(("launch", shortage) for shortage in SHORTAGES),
        *((verb, SHORTAGES[0]) for verb in ("validate", "estimate", "observe", "stop")),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each) or "memory",
)
async def test_a_shortage_of_the_system_is_not_the_job_s_failure(
    shared: Site, monkeypatch: pytest.MonkeyPatch, verb: str, shortage: Exception
) -> None:
    """Whatever the gateway was doing for it, it tries again, also if a boundary wrapped it."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.01)
    original = getattr(shared.backend, verb)
    before = len(shared.backend.created)
    raised: list[Exception] = []

    async def short(*args: Any, **kwargs: Any) -> Any:
        if len(raised) < 2:
            raised.append(shortage)
            if len(raised) == 2 and not isinstance(shortage, TrainingBackendError):
                raise TrainingBackendError("The plugin failed.") from shortage
            raise shortage
        return await original(*args, **kwargs)

    if verb in {"observe", "stop"}:
        job_id, remote_id = await shared.started()
        await shared.until(job_id, "RUNNING")
        monkeypatch.setattr(shared.backend, verb, short)
    else:
        monkeypatch.setattr(shared.backend, verb, short)
        job_id, remote_id = await shared.started()
    if verb == "stop":
        await shared.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        await until(lambda: shared.backend._jobs[remote_id].status is TrainingStatus.STOPPING)
        shared.backend.say(remote_id, TrainingStatus.CANCELLED)
    else:
        shared.backend.measure(remote_id, 10, train_loss=1.0)
        shared.backend.finish(remote_id)
    ended = await shared.until(job_id, "SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED")
    assert ended["status"] == ("CANCELLED" if verb == "stop" else "SUCCESS")
    assert (len(raised), len(shared.backend.created)) == (2, before + 1)


async def test_what_a_job_leaves_is_cleaned_up_after_a_shortage(
    here: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that only it needed are removed, though the first try failed."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.01)
    collect = here.served.gateway.files.collect
    failures = [OSError(errno.EMFILE, "Too many open files")]

    async def short(digests: Any) -> None:
        if failures:
            raise failures.pop()
        await collect(digests)

    file_id = await here.upload()
    job_id, remote_id = await here.started(files=[file_id])
    await here.until(job_id, "RUNNING")
    await here.http.delete(f"/v1/files/{file_id}")
    monkeypatch.setattr(here.served.gateway.files, "collect", short)
    here.backend.finish(remote_id)
    await here.until(job_id, "SUCCESS")
    # The result file of the job stays.
    await until(lambda: len(list((here.home / "gateway" / "files").iterdir())) == 1)


async def test_a_file_that_cannot_be_read_for_a_while_fails_no_validation(
    here: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway wrote it, so its disk is in trouble and not the job's data."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.01)
    issue = Issue(code="unreadable_file", message="the file cannot be read: too many open files")
    here.backend.report = ValidationReport(issues=(issue,))
    job = await here.create()
    waiting = await here.until(job["id"], "VALIDATING")
    waiting = await until(lambda: here.get(job["id"]), lambda job: len(job["events"]) > 2)
    assert waiting["events"][-1]["name"] == "waiting"
    assert "will retry" in waiting["events"][-1]["data"]["message"]
    here.backend.report = ValidationReport()
    await here.until(job["id"], "VALIDATED")


@pytest.mark.parametrize(
    ("total", "told"),
    [
        (1500, [*range(150, 1501, 150)]),
        (104, [*range(11, 104, 11), 104]),
        (24, [10, 20, 24]),
        (4, [4]),
        (0, [10, 20, 30]),  # not known
    ],
)
async def test_checkpoints_are_a_tenth_of_the_run_apart_and_ten_steps_at_least(
    shared: Site, total: int, told: list[int]
) -> None:
    """However often the backend measures, and newest first; the last step is always there."""
    job_id, remote = await shared.started()
    shared.backend.say(remote, TrainingStatus.RUNNING, total_steps=total or None)
    for step in range(1, (total or 35) + 1):
        shared.backend.measure(remote, step, train_loss=1 / step)
    shared.backend.finish(remote)
    points = (await shared.until(job_id, "SUCCESS"))["checkpoints"]
    assert [point["step_number"] for point in reversed(points)] == told


async def test_what_a_backend_validates_more_often_is_told(shared: Site) -> None:
    """Ten steps apart at least, and no more than a hundred of them."""
    job_id, remote = await shared.started()
    shared.backend.say(remote, TrainingStatus.RUNNING, total_steps=2000)
    for step in range(10, 2001, 10):
        shared.backend.measure(remote, step, train_loss=1.0, valid_loss=1.0)
    shared.backend.finish(remote)
    points = (await shared.until(job_id, "SUCCESS"))["checkpoints"]
    assert [point["step_number"] for point in reversed(points)] == [*range(20, 2001, 20)]


async def test_a_step_measured_twice_is_one_checkpoint(shared: Site) -> None:
    """Training and validation of a step may come in records of their own."""
    job_id, remote = await shared.started()
    shared.backend.measure(remote, 10, train_loss=2.0)
    shared.backend.measure(remote, 10, valid_loss=1.0, train_loss=None)
    shared.backend.measure(remote, 20, train_loss=float("nan"))
    shared.backend.finish(remote)
    (point,) = (await shared.until(job_id, "SUCCESS"))["checkpoints"]
    assert (point["step_number"], point["metrics"]["train_loss"]) == (10, 2.0)
    assert point["metrics"]["valid_loss"] == 1.0


async def test_a_job_keeps_what_it_shows_when_its_model_is_deleted(shared: Site) -> None:
    """The run is deleted with the model, and its log with the run."""
    done = await shared.finished()
    assert done["checkpoints"]
    await shared.http.delete(f"/v1/models/{done['fine_tuned_model']}")
    with pytest.raises(RunNotFound):
        await shared.served.gateway.client.get(done["id"])
    kept = await shared.get(done["id"])
    assert (kept["events"], kept["checkpoints"]) == (done["events"], done["checkpoints"])


async def test_only_what_the_gateway_does_itself_is_stored_in_its_tables(here: Site) -> None:
    """The log of a run is stored once by the client; events are computed from it."""

    def train() -> None:
        (remote,) = here.backend.created
        here.backend.tell(remote, TrainingStatus.INITIALIZING)
        here.backend.tell(remote, TrainingStatus.RUNNING)
        for step in range(10, 60, 10):
            here.backend.measure(remote, step, train_loss=1.0)
        here.backend.finish(remote)

    # Before the run is first observed, which would be running without a log.
    here.backend.after_create = train
    job_id, _ = await here.started()
    job = await here.until(job_id, "SUCCESS")
    query = "SELECT data FROM gateway_events ORDER BY id"
    rows = await here.served.gateway.store.aread(lambda c: c.exec_driver_sql(query).scalars().all())
    own = [json.loads(row)["status"] for row in rows]
    assert own == ["QUEUED", "VALIDATING", "VALIDATED", "SUCCESS"]
    assert statuses(job) == [*own[:3], "STARTED", "RUNNING", "SUCCESS"]
    assert len(job["checkpoints"]) == 5


@pytest.mark.parametrize("ahead", [-3600, 3600])
async def test_events_are_in_order_whatever_the_clock_of_the_backend(
    shared: Site, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """A status is never followed by an earlier one, nor by an earlier time."""
    now = utc_now() + timedelta(seconds=ahead)
    monkeypatch.setattr(scripted_backend, "utc_now", lambda: now)
    job_id, remote = await shared.started()
    shared.backend.tell(remote, TrainingStatus.RUNNING)
    await shared.until(job_id, "RUNNING")
    await shared.http.post(f"{JOBS}/{job_id}/cancel")
    shared.backend.tell(remote, TrainingStatus.CANCELLED)
    job = await shared.until(job_id, "CANCELLED")
    assert statuses(job)[3:] == ["RUNNING", "CANCELLATION_REQUESTED", "CANCELLED"]
    times = [event["created_at"] for event in job["events"]]
    assert times == sorted(times)


async def test_tokens_trained_are_told_when_known(shared: Site) -> None:
    """From the backend's own count."""
    job_id, remote = await shared.started()
    shared.backend.say(remote, TrainingStatus.RUNNING, metrics={"tokens": 1234.0})
    shared.backend.finish(remote)
    assert (await shared.until(job_id, "SUCCESS"))["trained_tokens"] == 1234


async def test_unknown_jobs_are_not_found(shared: Site) -> None:
    """In the service's words."""
    for method, path in (("GET", ""), ("POST", "/start"), ("POST", "/cancel")):
        answer = await shared.http.request(method, f"{JOBS}/{uuid4()}{path}")
        assert answer.status_code == 404
        assert answer.json() == {"detail": "No fine tuning job matches the given query."}
        assert (await shared.http.request(method, f"{JOBS}/x{path}")).status_code == 422


class CountingBackend(ScriptedBackend):
    """A backend that counts tokens, as the real ones do."""

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Count the tokens of the data."""
        del config
        count = await anyio.to_thread.run_sync(count_tokens, dataset, "tiny-mistral")
        return Estimate(data_tokens=count.data_tokens, steps=10, cost=self.price)


async def test_a_file_is_read_once_when_it_arrives_and_once_for_its_job(tmp_path: Path) -> None:
    """The upload is checked as it is stored; the job's rows, digest and tokens share a reading."""
    content = jsonl(ROWS * 500)
    backend = CountingBackend()
    with counted_readings() as readings:
        async with site(tmp_path / "home", backend) as here:
            file_id = await here.upload(content)
            job_id, remote_id = await here.started(files=[file_id])
            backend.finish(remote_id)
            job = await here.until(job_id, "SUCCESS")
    assert job["metadata"]["data_tokens"]
    stored = {"incoming", "files"}
    read = sum(count for path, count in readings.items() if Path(path).parent.name in stored)
    assert 1 < read / len(content) <= 2
