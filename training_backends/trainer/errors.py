"""Why a training process ended early, in the words of a run's `Failure`."""

import errno
from typing import Final

from training_backends.core.run import Failure, FailureKind
from training_backends.rundir.directory import ExitCode
from training_backends.trainer.control import Stopped

__all__ = ["EngineError", "Stopped", "TeamLost", "failure_of", "first_line", "is_out_of_memory"]

_LONGEST: Final = 500


class EngineError(Exception):
    """The run cannot go on; says why in a `Failure` and with which exit code."""

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind = "validation",
        retryable: bool = False,
        code: ExitCode | None = None,
    ) -> None:
        super().__init__(message)
        self.failure = Failure(kind=kind, message=message, retryable=retryable)
        default = ExitCode.BAD_INPUT if kind == "validation" else ExitCode.CRASHED
        self.code = code if code is not None else default


class TeamLost(Exception):
    """Another process that trains with this one is gone, or does not answer."""


def failure_of(error: BaseException) -> Failure:
    """Say in a `Failure` what an unexpected exception means."""
    if isinstance(error, TeamLost):
        message = f"A process that trains with this one does not answer: {first_line(error)}"
        return Failure(kind="lost", message=message, retryable=True)
    if is_out_of_memory(error):
        message = (
            f"Out of memory: {first_line(error)} "
            "Lower batch_size, micro_batch_size or seq_len, or train a smaller model."
        )
        return Failure(kind="out_of_memory", message=message)
    if _is_disk_full(error):
        message = "The disk is full. Free some space and resume from the last checkpoint."
        return Failure(kind="internal", message=message, retryable=True)
    return Failure(kind="internal", message=f"{type(error).__name__}: {first_line(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, of the GPU or of the machine."""
    # torch raises OutOfMemoryError on a GPU, but a plain RuntimeError for the CPU allocator.
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "not enough memory" in text
        or "CUDA out of memory" in text
    )


def _is_disk_full(error: BaseException) -> bool:
    # safetensors writes in Rust and raises an error of its own, with the system's words.
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "No space left on device" in str(error)


def first_line(error: BaseException) -> str:
    """Return what a library's error says first, 500 characters at most; some say thousands."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:_LONGEST] if lines else "no message"
