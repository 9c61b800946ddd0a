"""Messages of events, written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends.protocols.openai import events
from training_backends.protocols.openai.wire import FineTuningJobEvent, StepMetrics

LOSSES = st.floats(0, 1e6)
METRICS = st.builds(
    StepMetrics,
    step=st.integers(1, 10**6),
    total_steps=st.none() | st.integers(1, 10**6),
    train_loss=LOSSES,
    train_mean_token_accuracy=st.none() | st.floats(0, 1),
    valid_loss=st.none() | LOSSES,
    full_valid_loss=st.none() | LOSSES,
)


def event(message: str, **fields: object) -> FineTuningJobEvent:
    """Make an event."""
    return FineTuningJobEvent.model_validate(
        {"id": "e", "created_at": 1, "message": message, **fields}
    )


def test_metrics_message_is_the_recorded_one() -> None:
    """The text is that of the live service, including the losses that were not measured."""
    full = StepMetrics(
        step=300, total_steps=300, train_loss=0.0, valid_loss=0.001, full_valid_loss=0.05
    )
    assert events.metrics_message(full) == (
        "Step 300/300: training loss=0.00, validation loss=0.00, full validation loss=0.05"
    )
    assert events.metrics_message(StepMetrics(step=1, train_loss=2.5)) == (
        "Step 1: training loss=2.50"
    )


@given(METRICS)
def test_metrics_are_read_as_they_were_written(metrics: StepMetrics) -> None:
    """`data` is exact; the message alone has the losses with two decimals."""
    message, data = events.metrics_message(metrics), events.metrics_data(metrics)
    assert events.read_metrics(event(message, type="metrics", data=data)) == metrics
    found = events.read_metrics(event(message, type="message", data={}))
    assert found is not None
    assert (found.step, found.total_steps) == (metrics.step, metrics.total_steps)
    for name in ("train_loss", "valid_loss", "full_valid_loss"):
        value = getattr(metrics, name)
        assert getattr(found, name) == (None if value is None else pytest.approx(value, abs=0.006))


@given(st.text(max_size=40))
def test_any_other_message_has_no_metrics(message: str) -> None:
    """Any text can be a message."""
    assert events.read_metrics(event(message)) is None
    assert events.read_metrics(event(f"Step 5/9: {message}", data={"step": "x"})) is None


def test_names_are_found_in_messages() -> None:
    """The names of models are read from the messages that announce them."""
    name = "ft:m:org::abc12345"
    assert events.read_model_message(events.model_message(name)) == name
    point = f"{name}:ckpt-step-100"
    assert events.read_checkpoint_message(events.checkpoint_message(100, point)) == (100, point)
    assert events.read_checkpoint_message("Checkpoint created at step 100") == (100, None)
    for message in (events.STARTED, events.VALIDATED, events.COMPLETED, "New"):
        assert events.read_model_message(message) is None
        assert events.read_checkpoint_message(message) is None


def test_first_messages_name_the_job_and_its_files() -> None:
    """A validation file is named only if there is one."""
    assert events.created_message("ftjob-1") == "Created fine-tuning job: ftjob-1"
    assert events.validating_message("f") == "Validating training file: f"
    assert events.validating_message("f", "v").endswith("f and validation file: v")
