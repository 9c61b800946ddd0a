"""The states of a run."""

import pytest

from training_backends import TrainingStatus
from training_backends.core.status import may_follow

TERMINAL = {TrainingStatus.COMPLETED, TrainingStatus.FAILED, TrainingStatus.CANCELLED}


def test_the_words_are_those_of_the_contract() -> None:
    """Scripts compare these words, so none may change."""
    assert [str(status) for status in TrainingStatus] == [
        "pending",
        "validating",
        "ready",
        "initializing",
        "running",
        "paused",
        "stopping",
        "completed",
        "failed",
        "cancelled",
        "unknown",
    ]


@pytest.mark.parametrize("status", TrainingStatus)
def test_exactly_three_states_are_terminal(status: TrainingStatus) -> None:
    """Stopping is not over yet, and what is unknown may go on."""
    assert status.is_terminal == (status in TERMINAL)


@pytest.mark.parametrize("before", TrainingStatus)
@pytest.mark.parametrize("after", TrainingStatus)
def test_only_a_terminal_state_is_never_left(before: TrainingStatus, after: TrainingStatus) -> None:
    """Everything else is lawful: ready may be followed by pending."""
    assert may_follow(before, after) == (before == after or before not in TERMINAL)
