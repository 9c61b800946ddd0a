"""Map the exception that ended a training process to a `Failure` and an exit code."""

import errno

from training_backends.core.errors import first_line
from training_backends.core.run import Failure, FailureKind
from training_backends.rundir.directory import TrainerExitCode
from training_backends.tokens.encoders import TokenizerError
from training_backends.trainer.control import Stopped

__all__ = [
    "Stopped",
    "TrainerError",
    "exit_code_of",
    "failure_of",
    "is_out_of_memory",
    "quotes_library",
]


class TrainerError(Exception):
    """The run cannot continue; carries a `Failure` and an exit code."""

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind = "validation",
        retryable: bool = False,
        code: TrainerExitCode | None = None,
    ) -> None:
        super().__init__(message)
        self.failure: Failure = Failure(kind=kind, message=message, retryable=retryable)
        default = TrainerExitCode.BAD_INPUT if kind == "validation" else TrainerExitCode.CRASHED
        self.code: TrainerExitCode = code if code is not None else default


def exit_code_of(error: BaseException) -> TrainerExitCode:
    """Return the exit code for a process that ends with this exception."""
    if isinstance(error, TrainerError):
        return error.code
    return (
        TrainerExitCode.BAD_INPUT if isinstance(error, TokenizerError) else TrainerExitCode.CRASHED
    )


def failure_of(error: BaseException) -> Failure:
    """Describe this exception as a `Failure`."""
    if isinstance(error, TrainerError):
        return error.failure
    if isinstance(error, TokenizerError):
        return Failure(kind="validation", message=str(error))
    if is_out_of_memory(error):
        message = (
            f"Out of memory: {first_line(error)} "
            "Reduce batch_size, micro_batch_size or seq_len, or use a smaller model."
        )
        return Failure(kind="out_of_memory", message=message)
    if _is_disk_full(error):
        message = "The disk is full. Free some space, then resume from the last checkpoint."
        return Failure(kind="internal", message=message, retryable=True)
    return Failure(kind="internal", message=f"{type(error).__name__}: {first_line(error)}")


def quotes_library(error: BaseException) -> bool:
    """Return whether the failure's message is the first line of a library's error."""
    if isinstance(error, TrainerError | TokenizerError):
        return error.__cause__ is not None and first_line(error.__cause__) in str(error)
    return failure_of(error).kind == "internal" and not _is_disk_full(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the exception means that GPU or host memory ran out."""
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
    # safetensors writes from Rust and raises its own error type with the system's message.
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "No space left on device" in str(error)
