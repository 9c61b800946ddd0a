"""Statuses, both directions."""

from hypothesis import given
from hypothesis import strategies as st

from training_backends import TrainingStatus
from training_backends.protocols.mistral.status import JOB_STATUSES, to_status, to_wire


def test_all_ten_words_are_known() -> None:
    """Every word of the specification has a status of ours."""
    assert set(JOB_STATUSES) == {
        "QUEUED",
        "STARTED",
        "VALIDATING",
        "VALIDATED",
        "RUNNING",
        "FAILED_VALIDATION",
        "FAILED",
        "SUCCESS",
        "CANCELLED",
        "CANCELLATION_REQUESTED",
    }
    assert TrainingStatus.UNKNOWN not in {to_status(word) for word in JOB_STATUSES}


@given(st.text())
def test_any_text_has_a_status(word: str) -> None:
    """Whatever word comes, there is a status for it: unknown, unless it is one of the ten."""
    assert (to_status(word) is TrainingStatus.UNKNOWN) == (word not in JOB_STATUSES)


def test_every_status_of_the_protocol_has_a_word() -> None:
    """A server can report any status but unknown; a paused run, which has no word, is RUNNING."""
    for status in TrainingStatus:
        word = to_wire(status)
        if status is TrainingStatus.UNKNOWN:
            assert word is None
        elif status is TrainingStatus.PAUSED:
            assert word == "RUNNING"
        else:
            assert word is not None
            assert to_status(word) is status
