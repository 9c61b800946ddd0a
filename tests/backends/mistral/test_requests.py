"""Which jobs are taken for the same, by what a server shows of them."""

from typing import Any

import pytest

from training_backends.backends.mistral.job_request import same_job
from training_backends.protocols.mistral.wire import Job, read_job


def job(**hyperparameters: Any) -> Job:
    """Return a job with these hyperparameters."""
    return read_job(
        {
            "id": "j",
            "model": "m",
            "status": "QUEUED",
            "created_at": 1,
            "modified_at": 1,
            "training_files": ["f"],
            "job_type": "completion",
            "hyperparameters": hyperparameters,
        }
    )


@pytest.mark.parametrize(
    "other",
    [
        {"training_steps": 10, "epochs": None},
        {"training_steps": 10, "epochs": 2.5, "seq_len": 1024, "learning_rate": 0.002},
    ],
)
def test_a_validated_job_is_the_same_as_before(other: dict[str, Any]) -> None:
    """Values that the server fills in after validation do not make it a different job."""
    assert same_job(job(training_steps=10), job(**other))
    assert same_job(job(**other), job(training_steps=10))


@pytest.mark.parametrize("other", [{"training_steps": 11}, {"training_steps": 10, "seq_len": 200}])
def test_jobs_that_differ_in_what_both_show_are_not_the_same(other: dict[str, Any]) -> None:
    """A different length or sequence length means a different job."""
    assert not same_job(job(training_steps=10, seq_len=100), job(**other))
