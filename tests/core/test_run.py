"""A run's record over time."""

import re
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from training_backends import (
    Checkpoint,
    ConfigError,
    LogRecord,
    Observation,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.core.run import (
    RUN_ID_PATTERN,
    Failure,
    RunState,
    new_run_id,
    provider_name,
)
from training_backends.core.status import FINISHED

CONFIG = TrainingConfig.model_validate({"model": "m", "data": {"train": "a.jsonl"}})
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make(**fields: Any) -> TrainingRun:
    return TrainingRun.model_validate({"id": "r-1", "backend": "local", "config": CONFIG, **fields})


def state(status: str, **fields: Any) -> RunState:
    return RunState.model_validate({"status": status, **fields})


def test_a_state_adds_what_it_knows() -> None:
    """What the state leaves out stays; what it says is taken."""
    run = make(remote_id="job-1", step=5, raw_status="QUEUED")
    after = run.updated(state("running", raw_status="RUNNING", total_steps=9), seen_at=NOW)
    assert (after.status, after.raw_status) == (TrainingStatus.RUNNING, "RUNNING")
    assert (after.remote_id, after.step, after.total_steps) == ("job-1", 5, 9)
    assert after.last_seen_at == NOW
    assert run.status is TrainingStatus.PENDING


def test_metrics_keep_the_latest_value_of_each_name() -> None:
    """A metric that is not in the newest state is not forgotten."""
    run = make(metrics={"train_loss": 2.0, "valid_loss": 3.0})
    assert run.updated(state("running", metrics={"train_loss": 1.0})).metrics == {
        "train_loss": 1.0,
        "valid_loss": 3.0,
    }


@pytest.mark.parametrize("terminal", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("later", ["running", "pending", "failed", "completed", "unknown"])
def test_a_terminal_run_stays_what_it_is(terminal: str, later: str) -> None:
    """A provider that says otherwise is kept as the raw word, and changes nothing else."""
    run = make(status=terminal, raw_status="DONE", step=9)
    after = run.updated(state(later, raw_status="LATER", step=1))
    assert after.status == terminal
    assert after.raw_status == "LATER"
    assert after.step == (1 if later == terminal else 9)


def test_a_differing_word_is_kept_even_if_the_provider_gave_none() -> None:
    """Without a raw word our own says what came."""
    assert make(status="failed").updated(state("running")).raw_status == "running"


def test_a_terminal_run_still_learns_its_result() -> None:
    """The same status may bring what was not there before."""
    run = make(status="completed").updated(state("completed", result_model="ft:m"))
    assert run.result_model == "ft:m"


def test_ids_are_valid_and_sort_by_time() -> None:
    """An id made later never sorts before one of an earlier second."""
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) == len(ids)
    assert all(re.match(RUN_ID_PATTERN, one) for one in ids)
    seconds = [one.rsplit("-", 1)[0] for one in ids]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", ["", "a/b", "../a", "-a", ".a", "a b", "a" * 129, "a\n"])
def test_an_id_is_safe_as_a_file_name(name: str) -> None:
    """A run's id becomes a directory, so it may not lead out of it."""
    with pytest.raises(ValidationError):
        make(id=name)


def test_times_are_kept_in_utc() -> None:
    """Any aware time is turned to UTC; a naive one is refused."""
    local = datetime(2026, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    run = make(started_at=local)
    assert run.started_at == NOW
    assert run.started_at.utcoffset() == timedelta(0)
    with pytest.raises(ValidationError):
        make(started_at=datetime(2026, 1, 2))  # noqa: DTZ001  # naive on purpose


def test_a_run_survives_json() -> None:
    """What the store writes it reads again."""
    run = make(
        status="failed",
        failure={"kind": "out_of_memory", "message": "x", "retryable": True},
        checkpoints=[Checkpoint(step=1, at=NOW, metrics={"train_loss": 1.0})],
        cost="4.00 USD",
        resumed_from="r-0",
    )
    assert TrainingRun.model_validate_json(run.model_dump_json()) == run


def test_a_log_record_survives_json() -> None:
    """Log lines are written as JSON lines."""
    record = LogRecord(at=NOW, message="x", source="metrics", step=1, fields={"a": 1}, cursor="7")
    assert LogRecord.model_validate_json(record.model_dump_json()) == record


def test_a_secret_in_the_reason_of_a_failure_gets_into_no_record() -> None:
    """Whichever way a provider's word comes: by the launch, a look or a list."""
    failure = Failure(kind="provider", message="bad key sk-abcdefgh12345678")
    told = RunState(status=TrainingStatus.FAILED, failure=failure)
    assert "sk-abcdefgh" not in make().updated(told).model_dump_json()


@pytest.mark.parametrize(
    ("run_id", "name"),
    [
        ("261130-120000-abcdef", "261130-120000-abcdef"),
        ("My_Run", "my-run-"),
        ("a.b", "a-b-"),
        ("x" * 128, "xxxxxxxxxxx-"),
    ],
)
def test_a_run_has_a_name_within_the_rules_of_a_provider(run_id: str, name: str) -> None:
    """An id that has to change ends in a hash, so that no two runs share a name."""
    allowed = "abcdefghijklmnopqrstuvwxyz0123456789-"
    found = provider_name(run_id, longest=20, allowed=allowed)
    assert found == provider_name(run_id, longest=20, allowed=allowed)
    assert found == name if found == run_id else found.startswith(name)
    assert len(found) <= 20
    assert set(found) <= set(allowed)


def test_ids_that_become_the_same_have_different_names() -> None:
    """By the hash of the whole id; a rule without room for it is an error."""
    ids = ("a.b", "a_b", "a-b", "A-b", "A.B")
    names = {provider_name(each, longest=63, allowed="0123456789abcdef-") for each in ids}
    assert len(names) == len(ids)
    for longest, allowed in ((9, "0123456789"), (63, "ab")):
        with pytest.raises(ValueError, match="at least 10"):
            provider_name("a.b.c.d.e.f", longest=longest, allowed=allowed)


def test_a_record_of_an_earlier_version_can_be_read() -> None:
    """Fields that it lacks have their defaults, and its data stays where it was."""
    stored = """{"id": "r-1", "backend": "local", "status": "completed",
        "created_at": "2026-01-02T03:04:05Z", "result_model": "m-1",
        "config": {"model": "m", "method": "sft", "tuning": null, "suffix": null,
            "data": {"train": [{"path": "/d/a.jsonl", "weight": 1.0}], "validation": []},
            "hyperparameters": {"epochs": 1.0}, "budget": {}, "labels": {"team": "a"}}}"""
    run = TrainingRun.model_validate_json(stored)
    assert [str(source.local_path) for source in run.config.data.train] == ["/d/a.jsonl"]
    assert (run.result_uri, run.usage, run.config.tags) == (None, {}, {"team": "a"})
    assert TrainingRun.model_validate_json(run.model_dump_json()) == run


def test_usage_is_kept_by_name() -> None:
    """Exact decimals, each the latest of its name; where the model is stored as well."""
    run = make().updated(state("running", usage={"tokens": 5, "gpu_hours": "0.1"}))
    run = run.updated(state("completed", usage={"tokens": 7}, result_uri="s3://b/m"))
    again = TrainingRun.model_validate_json(run.model_dump_json())
    assert again.usage == {"tokens": Decimal(7), "gpu_hours": Decimal("0.1")}
    assert again.result_uri == "s3://b/m"


@pytest.mark.parametrize(
    ("status", "fields", "reached"),
    [
        ("pending", {}, {"pending"}),
        ("initializing", {}, {"pending", "ready", "initializing"}),
        ("running", {}, {"pending", "ready", "initializing", "running"}),
        ("paused", {}, {"pending", "ready", "initializing", "running", "paused"}),
        ("completed", {}, {"pending", "ready", "initializing", "running", "completed"}),
        ("failed", {}, {"pending", "failed"}),
        ("failed", {"step": 3}, {"pending", "ready", "initializing", "running", "failed"}),
        ("unknown", {}, {"pending", "unknown"}),
    ],
)
def test_a_run_passes_the_statuses_up_to_running(
    status: str, fields: dict[str, Any], reached: set[str]
) -> None:
    """A run that failed or was stopped only if it had started; `paused` counts only while it is."""
    run = make(status=status, **fields)
    asked = ("pending", "ready", "initializing", "running", "paused", "unknown", *FINISHED)
    assert {word for word in asked if run.has_reached(TrainingStatus(word))} == reached


@pytest.mark.anyio
async def test_a_log_that_is_listed_newest_first_is_read_back_to_the_cursor() -> None:
    """Records come oldest first, no more are read than needed, and a wrong cursor is an error."""
    read: list[int] = []

    async def newest() -> AsyncGenerator[LogRecord, None]:
        for number in (3, 2, 1):
            read.append(number)
            yield LogRecord(message="", source="event", cursor=f"c{number}")

    async def cursors(after: str | None) -> tuple[list[str], str | None]:
        seen = await Observation.from_newest(state("running"), newest(), after)
        return [record.cursor for record in seen.records], seen.cursor

    assert await cursors(None) == (["c1", "c2", "c3"], "c3")
    read.clear()
    assert await cursors("c2") == (["c3"], "c3")
    assert read == [3, 2]
    assert await cursors("c3") == ([], "c3")
    with pytest.raises(ConfigError, match="'c9' is not a cursor"):
        await cursors("c9")


def test_the_repr_of_a_run_is_one_short_line() -> None:
    """A list of runs can be read in a console."""
    run = make(status="running", step=4, total_steps=10, metrics={"train_loss": 1.5})
    assert repr(run) == "<TrainingRun r-1 local running step 4/10 train_loss=1.5>"


def test_a_notebook_shows_progress_and_metrics() -> None:
    """What one looks for while a run trains."""
    html = make(step=4, total_steps=10, metrics={"train_loss": 1.5})._repr_html_()
    assert '<progress max="10" value="4">' in html
    assert "1.5" in html


def test_a_notebook_shows_the_losses_at_checkpoints_as_a_line() -> None:
    """One point for each checkpoint that has a loss."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    points = tuple(Checkpoint(step=n, at=at, metrics={"train_loss": 3.0 - n}) for n in (1, 2))
    assert "loss from 2 to 1" in make(checkpoints=points)._repr_html_()


def test_a_notebook_executes_nothing_that_a_provider_wrote() -> None:
    """Names and messages of others are text."""
    html = make(
        result_model="<script>alert(1)</script>",
        result_uri="javascript:alert(1)",
        metrics={"<img src=x onerror=alert(1)>": 1.0},
        failure={"kind": "provider", "message": "<b>&"},
    )._repr_html_()
    assert not re.search(r"<(script|img|b>&|a )", html)
