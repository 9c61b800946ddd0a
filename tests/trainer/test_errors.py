"""What an unexpected end means, in the words of a Failure."""

import errno

import pytest
import torch

from training_backends.core.errors import first_line
from training_backends.core.run import FailureKind
from training_backends.trainer.errors import failure_of


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (MemoryError(), "out_of_memory", False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "out_of_memory",
            False,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", False),
        (OSError(errno.ENOSPC, "No space left on device"), "internal", True),
        (Exception("I/O error: No space left on device (os error 28)"), "internal", True),
        (RuntimeError("anything else"), "internal", False),
    ],
)
def test_an_exception_becomes_a_failure(
    error: Exception, kind: FailureKind, *, retryable: bool
) -> None:
    """Memory and disk are told apart from faults of our own, and each says what to do."""
    failure = failure_of(error)
    assert (failure.kind, failure.retryable) == (kind, retryable)
    assert failure.message


def test_torch_really_runs_out_of_memory_like_this() -> None:
    """The words by which the CPU allocator's error is known are those that it uses."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure_of(raised.value).kind == "out_of_memory"


@pytest.mark.parametrize("text", ["a\nb", "\n a \nb\n", "x" * 4000, ""])
def test_a_library_s_error_is_told_in_one_short_line(text: str) -> None:
    """Some list every class that they know in their message."""
    assert first_line(ValueError(text)) == (
        text.strip().partition("\n")[0].strip()[:500] or "no message"
    )
