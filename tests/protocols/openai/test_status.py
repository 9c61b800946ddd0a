"""The protocol's words and ours, both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import TrainingStatus
from training_backends.protocols.openai.status import (
    FILE_STATUSES,
    JOB_STATUSES,
    TERMINAL_JOB_STATUSES,
    is_file_settled,
    to_method,
    to_method_type,
    to_status,
    to_wire,
)


def test_every_known_word_has_a_status() -> None:
    """OpenAI's eight words and Azure's two are known, and three of them are final."""
    assert set(JOB_STATUSES) == {
        "validating_files",
        "queued",
        "running",
        "pausing",
        "paused",
        "succeeded",
        "failed",
        "cancelled",
        "created",
        "pending",
    }
    assert TrainingStatus.UNKNOWN not in {to_status(word) for word in JOB_STATUSES}
    assert {w for w in JOB_STATUSES if to_status(w).is_terminal} == TERMINAL_JOB_STATUSES


@given(st.text(max_size=20))
def test_any_other_word_is_unknown(word: str) -> None:
    """Any text has a status, and an unrecognized one is never taken for a known one."""
    assert (to_status(word) is TrainingStatus.UNKNOWN) == (word not in JOB_STATUSES)


def test_status_is_written_as_a_word_that_is_read() -> None:
    """Every status but unknown has a word, and reading it back never ends or revives a run."""
    assert to_wire(TrainingStatus.UNKNOWN) is None
    for status in set(TrainingStatus) - {TrainingStatus.UNKNOWN}:
        word = to_wire(status)
        assert word in JOB_STATUSES
        assert to_status(word).is_terminal == status.is_terminal
    exact = {s for s in TrainingStatus if to_status(to_wire(s) or "") is s}
    assert set(TrainingStatus) - exact == {
        TrainingStatus.READY,
        TrainingStatus.INITIALIZING,
        TrainingStatus.STOPPING,
    }


@pytest.mark.parametrize("word", FILE_STATUSES)
def test_waiting_for_a_file_ends(word: str) -> None:
    """A file that is still processed is waited for, one that is ready, broken or gone is not."""
    assert is_file_settled(word) == (word not in {"uploaded", "pending", "running"})
    assert is_file_settled(None)


def test_methods_have_our_names() -> None:
    """A method is translated both ways; an unknown one is kept, a missing one is supervised."""
    for word in ("supervised", "dpo", "reinforcement"):
        assert to_method_type(to_method(word)) == word
    assert (to_method(None), to_method("new"), to_method_type("classifier")) == ("sft", "new", None)
