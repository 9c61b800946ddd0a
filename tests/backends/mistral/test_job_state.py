"""What a job of the protocol means in our words."""

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import LogRecord, RunState, TrainingStatus
from training_backends.backends.mistral.job_log import LogReader
from training_backends.backends.mistral.job_request import config_of
from training_backends.backends.mistral.job_state import (
    failure_of,
    has_started,
    quote_of,
    sorted_events,
    state_of,
)
from training_backends.protocols.mistral.status import JOB_STATUSES
from training_backends.protocols.mistral.wire import (
    DetailedJob,
    EventOut,
    read_detailed_job,
    read_job,
)

LIFE = ["QUEUED", "VALIDATING", "VALIDATED", "STARTED", "RUNNING", "SUCCESS"]
METADATA = {
    "expected_duration_seconds": 400,
    "cost": 2.62,
    "cost_currency": "USD",
    "train_tokens_per_step": 131_072,
    "train_tokens": 1_310_720,
    "data_tokens": 305_375,
}


def job_document(**fields: Any) -> dict[str, Any]:
    """Return a job as the service shows it."""
    return {
        "id": "j",
        "auto_start": False,
        "model": "open-mistral-7b",
        "status": "RUNNING",
        "created_at": 1000,
        "modified_at": 2000,
        "training_files": ["f"],
        "hyperparameters": {"learning_rate": 1e-4},
        "job_type": "completion",
        "metadata": None,
        **fields,
    }


def job(**fields: Any) -> DetailedJob:
    """Read a job."""
    return read_detailed_job(job_document(**fields))


def event(word: str, at: int, **data: Any) -> dict[str, Any]:
    """Return an event as the service shows it."""
    return {"name": "status-updated", "data": {"status": word, **data}, "created_at": at}


def checkpoint(step: int, at: int, **metrics: float | None) -> dict[str, Any]:
    """Return a checkpoint as the service shows it."""
    return {"step_number": step, "created_at": at, "metrics": metrics}


def test_running_job_is_told_in_full() -> None:
    """Checkpoints, step, metrics, quote and start of a running job are all there."""
    state = state_of(
        job(
            metadata=METADATA,
            validation_files=["v"],
            events=[event("RUNNING", 1500), event("QUEUED", 1000)],
            checkpoints=[
                checkpoint(20, 1700, train_loss=1.0, valid_loss=1.2, valid_mean_token_accuracy=2.3),
                checkpoint(10, 1600, train_loss=2.0, valid_loss=0.0, valid_mean_token_accuracy=0.0),
            ],
        )
    )
    assert (state.status, state.raw_status) == (TrainingStatus.RUNNING, "RUNNING")
    assert (state.step, state.total_steps) == (20, 10)
    assert state.started_at == datetime.fromtimestamp(1500, UTC)
    assert state.finished_at is None
    assert state.checkpoints is not None
    assert [point.step for point in state.checkpoints] == [10, 20]
    assert state.checkpoints[0].metrics == {"train_loss": 2.0}  # zeros: nothing was measured
    assert state.metrics == {
        "train_loss": 1.0,
        "valid_loss": 1.2,
        "valid_mean_token_accuracy": 2.3,  # not bounded by 1 at the hosted service
    }
    assert state.cost is None


def test_completed_job_has_result_cost_and_end() -> None:
    """A completed job names its model, what it cost, and when the event says it ended."""
    state = state_of(
        job(
            status="SUCCESS",
            fine_tuned_model="ft:x",
            metadata=METADATA,
            events=[event("SUCCESS", 1900)],
        )
    )
    assert state.status is TrainingStatus.COMPLETED
    assert state.result_model == "ft:x"
    assert state.cost is not None
    assert (state.cost.amount, state.cost.currency) == (Decimal("2.62"), "USD")
    assert state.finished_at == datetime.fromtimestamp(1900, UTC)


@given(st.text(max_size=30))
def test_any_word_gives_a_state(word: str) -> None:
    """A job with any status word is read; one never heard of is unknown and kept."""
    state = state_of(job(status=word))
    assert state.raw_status == word
    assert (state.status is TrainingStatus.UNKNOWN) == (word not in JOB_STATUSES)


def test_unknown_is_not_pending() -> None:
    """An invented word is not taken for pending, nor SUCCEEDED for SUCCESS."""
    for word in ("PAUSED", "SUCCEEDED", "success", ""):
        assert state_of(job(status=word)).status is TrainingStatus.UNKNOWN


@pytest.mark.parametrize("step", [1, -1])
@given(st.lists(st.integers(0, 3), min_size=len(LIFE), max_size=len(LIFE)))
def test_events_are_put_in_order(step: int, gaps: list[int]) -> None:
    """Listed either way, with equal times or not, a life's events come out in its order."""
    at = 0
    told = []
    for word, gap in zip(LIFE, gaps, strict=True):
        at += gap
        told.append(EventOut.model_validate(event(word, at)))
    words = [entry.data["status"] for entry in sorted_events(told[::step]) if entry.data]
    assert words == LIFE


@pytest.mark.parametrize(
    ("status", "words", "metadata", "started"),
    [
        ("QUEUED", ["QUEUED"], None, False),
        ("QUEUED", [], None, False),
        ("VALIDATING", ["QUEUED", "VALIDATING"], None, False),
        ("VALIDATED", ["QUEUED", "VALIDATING", "VALIDATED"], METADATA, False),
        ("QUEUED", ["QUEUED", "VALIDATING", "VALIDATED"], METADATA, True),
        ("QUEUED", [], METADATA, True),
        ("QUEUED", ["VALIDATED", "VALIDATING", "QUEUED"], None, True),
        ("STARTED", [], None, True),
        ("RUNNING", [], None, True),
        ("SUCCESS", [], None, True),
        ("PAUSED", ["VALIDATED"], METADATA, False),
    ],
)
def test_queued_again_is_told_from_queued(
    status: str, words: list[str], metadata: dict[str, Any] | None, started: bool
) -> None:
    """QUEUED counts as started only where validation is behind it."""
    events = [event(word, 1000 + n) for n, word in enumerate(words)]
    assert has_started(job(status=status, events=events, metadata=metadata)) is started


def test_quote_is_read() -> None:
    """The quote holds tokens, steps, cost and duration, and says that it is one."""
    quote = quote_of(job(metadata=METADATA), hosted=True)
    assert quote is not None
    assert (quote.basis, quote.steps, quote.data_tokens) == ("quote", 10, 305_375)
    assert quote.duration == timedelta(seconds=400)
    assert quote.epochs is not None
    assert quote.epochs * 305_375 == pytest.approx(quote.train_tokens, rel=1e-3)


def test_fees_are_beside_the_hosted_services_quote() -> None:
    """The service's word leaves its fees out; another server's quote is all there is."""
    hosted = quote_of(job(metadata={**METADATA, "cost": 1.5}), hosted=True)
    assert hosted is not None
    assert [str(item.amount) for item in hosted.costs] == ["1.50 USD", "2.50 USD", "2.00 USD"]
    assert str(hosted.cost) == "6.00 USD"
    own = quote_of(job(metadata={**METADATA, "cost": 1.5}))
    assert own is not None
    assert str(own.cost) == "1.50 USD"


@pytest.mark.parametrize("metadata", [None, {"cost": 0.0}, {"cost": None, "train_tokens": None}])
def test_no_quote_before_validation(metadata: dict[str, Any] | None) -> None:
    """Null, or a cost of zero without tokens, is no quote."""
    assert quote_of(job(status="QUEUED", metadata=metadata)) is None


def test_a_quote_has_the_hyperparameters_that_the_server_shows() -> None:
    """And none that it does not: the specification's defaults are not the server's word."""
    shown = {"learning_rate": 0.002, "training_steps": 7, "fim_ratio": None}
    quote = quote_of(job(metadata=METADATA, hyperparameters=shown))
    assert quote is not None
    assert quote.hyperparameters == {"learning_rate": 0.002, "training_steps": 7}


def test_cost_alone_is_a_quote() -> None:
    """A price without token counts is not lost."""
    quote = quote_of(job(metadata={"cost": 5, "cost_currency": "EUR"}))
    assert quote is not None
    assert str(quote.cost) == "5.00 EUR"
    assert quote.train_tokens is None


@pytest.mark.parametrize("currency", [None, "", "credits"])
def test_cost_without_a_currency_is_unknown(currency: str | None) -> None:
    """A cost without a currency is no amount of money, and that is said."""
    quote = quote_of(job(metadata={**METADATA, "cost_currency": currency}))
    assert quote is not None
    assert quote.cost is None
    assert quote.notes


@pytest.mark.parametrize(
    ("status", "data", "kind", "message"),
    [
        ("FAILED_VALIDATION", {"error": "line 3"}, "validation", "line 3"),
        ("FAILED", {"message": "CUDA out of memory"}, "out_of_memory", "CUDA out of memory"),
        ("FAILED", {"reason": {"message": "quota exceeded"}}, "quota", "quota exceeded"),
        ("FAILED", {"errors": ["a", {"msg": "b"}]}, "provider", "a; b"),
        ("FAILED", {}, "provider", "the server gave no reason"),
    ],
)
def test_failure_has_kind_and_reason(
    status: str, data: dict[str, Any], kind: str, message: str
) -> None:
    """Why a job failed is taken from its events, and sorted by what they mention."""
    failure = failure_of(job(status=status, events=[event(status, 1500, **data)]))
    assert (failure.kind, failure.message) == (kind, message)


def test_last_change_is_told_alone_and_in_lists() -> None:
    """When the server last changed a job is told the same way whoever shows it."""
    at = datetime.fromtimestamp(2000, UTC)
    assert state_of(job()).changed_at == state_of(read_job(job_document())).changed_at == at


STRANGE = st.sampled_from(["", "x", "half a pair: \ud800", "ft:\udfff", "\x00"])
TIMES = st.sampled_from([0, -1, 1500, 2**40, 10**30, -(10**30)])
NUMBERS = st.sampled_from([0, -1, 1, 10**9, 10**400])
AMOUNTS = st.sampled_from([0.0, -1.0, 2.5, 1e300, math.nan, math.inf, None])


@given(
    st.fixed_dictionaries(
        {
            "status": st.one_of(STRANGE, st.sampled_from(JOB_STATUSES)),
            "model": STRANGE,
            "suffix": STRANGE,
            "fine_tuned_model": STRANGE,
            "created_at": TIMES,
            "modified_at": TIMES,
            "training_files": st.lists(STRANGE, max_size=2),
            "job_type": st.sampled_from(["completion", "classifier", "dpo"]),
            "hyperparameters": st.fixed_dictionaries(
                {}, optional={"epochs": AMOUNTS, "training_steps": NUMBERS, "seq_len": NUMBERS}
            ),
            "metadata": st.fixed_dictionaries(
                {},
                optional={
                    "cost": AMOUNTS,
                    "cost_currency": st.sampled_from(["USD", "ÄÖÜ", "", "euro"]),
                    "train_tokens": NUMBERS,
                    "data_tokens": NUMBERS,
                    "train_tokens_per_step": NUMBERS,
                    "expected_duration_seconds": NUMBERS,
                },
            ),
            "events": st.lists(
                st.fixed_dictionaries(
                    {
                        "name": STRANGE,
                        "created_at": TIMES,
                        "data": st.dictionaries(STRANGE, st.one_of(STRANGE, AMOUNTS)),
                    }
                ),
                max_size=3,
            ),
            "checkpoints": st.lists(
                st.builds(checkpoint, NUMBERS, TIMES, train_loss=AMOUNTS), max_size=3
            ),
        }
    )
)
def test_strange_jobs_are_told_and_can_be_kept(fields: dict[str, Any]) -> None:
    """Whatever values a job has, its state, log and configuration survive a store."""
    strange = job(**fields)
    state = state_of(strange)
    assert RunState.model_validate_json(state.model_dump_json()) == state
    for record in LogReader().read(strange):
        assert LogRecord.model_validate_json(record.model_dump_json()) == record
    config = config_of(strange)
    if config is not None:
        assert type(config).model_validate_json(config.model_dump_json()) == config


def test_configuration_is_read_back() -> None:
    """What a job shows of its making is a configuration whose files are named by their ids."""
    config = config_of(
        job(
            training_files=["a", "b"],
            validation_files=["c"],
            suffix="mine",
            hyperparameters={"learning_rate": 1e-5, "training_steps": 10, "epochs": 2.5},
            integrations=[{"type": "wandb", "project": "p", "name": None, "run_name": "r"}],
            repositories=[{"name": "n", "owner": "o", "commit_id": "0", "weight": 2.0}],
        )
    )
    assert config is not None
    assert [source.remote_id for source in config.data.train] == ["a", "b"]
    assert [source.remote_id for source in config.data.validation] == ["c"]
    assert (config.model, config.method, config.suffix) == ("open-mistral-7b", "sft", "mine")
    assert config.hyperparameters.training_steps == 10
    assert config.hyperparameters.epochs is None  # only one of both can have been asked for
    assert config.hyperparameters.learning_rate == 1e-5
    assert [entry.run_name for entry in config.wandb] == ["r"]
    assert config.options["repositories"][0]["owner"] == "o"


def test_targets_of_a_classifier_are_read_back() -> None:
    """A classifier's targets are part of its configuration where the job shows them."""
    target = {"name": "tone", "labels": ["kind", "rude"], "weight": 1.0}
    shown = {**target, "loss_function": "single_class"}
    config = config_of(job(job_type="classifier", classifier_targets=[shown]))
    assert config is not None
    assert config.method == "classifier"
    assert [entry.labels for entry in config.classifier_targets] == [("kind", "rude")]


@pytest.mark.parametrize("fields", [{"model": ""}, {"job_type": "dpo"}])
def test_job_that_makes_no_configuration_has_none(fields: dict[str, Any]) -> None:
    """What cannot be a configuration of ours is none, and no error."""
    assert config_of(job(**fields)) is None


def test_listed_job_says_nothing_of_what_lists_leave_out() -> None:
    """A job from a list leaves checkpoints and metrics as they are known."""
    state = state_of(read_job(job_document()))
    assert (state.checkpoints, state.metrics, state.step) == (None, None, None)
