"""Why a training process ended early, in the words of a run's `Failure`."""

import errno

from training_backends.core.errors import first_line
from training_backends.core.run import Failure, FailureKind
from training_backends.rundir.directory import ExitCode
from training_backends.tokens.encoders import TokenizerError
from training_backends.trainer.control import Stopped

__all__ = ["Stopped", "TeamLost", "TrainerError", "exit_code_of", "failure_of", "is_out_of_memory"]


class TrainerError(Exception):
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


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a process that ends with this exception."""
    if isinstance(error, TrainerError):
        return error.code
    return ExitCode.BAD_INPUT if isinstance(error, TokenizerError) else ExitCode.CRASHED


def failure_of(error: BaseException) -> Failure:
    """Describe in a `Failure` why a run ended with this exception."""
    if isinstance(error, TrainerError):
        return error.failure
    if isinstance(error, TokenizerError):
        return Failure(kind="validation", message=str(error))
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
