"""Exit codes of the command line; scripts depend on these numbers."""

from enum import IntEnum

from training_backends.core import errors
from training_backends.core.status import TrainingStatus

__all__ = [
    "ExitCode",
    "Interrupted",
    "PipeClosed",
    "UsageError",
    "exit_code_of",
    "exit_code_of_status",
]


class ExitCode(IntEnum):
    """Every exit code of the command line."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    INVALID = 3
    CREDENTIALS = 4
    NOT_FOUND = 5
    CONFLICT = 6
    BUDGET = 7
    UNAVAILABLE = 8
    UNSUPPORTED = 9
    RUN_FAILED = 10
    RUN_CANCELLED = 11
    TIMEOUT = 124
    INTERRUPTED = 130


class UsageError(errors.TrainingBackendError):
    """The command-line arguments are invalid."""


class Interrupted(errors.TrainingBackendError):
    """Ctrl-C ended the command; jobs at the provider keep running."""


class PipeClosed(Exception):
    """The reader of standard output, such as `head`, has all it wants."""


_CODES: tuple[tuple[type[errors.TrainingBackendError], ExitCode], ...] = (
    (errors.ConfigError, ExitCode.INVALID),
    (errors.DatasetError, ExitCode.INVALID),
    (errors.PayloadTooLarge, ExitCode.INVALID),
    (errors.CredentialNotFound, ExitCode.CREDENTIALS),
    (errors.VaultLocked, ExitCode.CREDENTIALS),
    (errors.AuthenticationFailed, ExitCode.CREDENTIALS),
    (errors.PermissionDenied, ExitCode.CREDENTIALS),
    (errors.RunNotFound, ExitCode.NOT_FOUND),
    (errors.DuplicateRun, ExitCode.CONFLICT),
    (errors.AmbiguousLaunch, ExitCode.CONFLICT),
    (errors.BudgetExceeded, ExitCode.BUDGET),
    (errors.BackendRetired, ExitCode.UNAVAILABLE),
    (errors.BackendUnavailable, ExitCode.UNAVAILABLE),
    (errors.BackendNotInstalled, ExitCode.UNAVAILABLE),
    (errors.BackendBroken, ExitCode.UNAVAILABLE),
    (errors.RateLimited, ExitCode.UNAVAILABLE),
    (errors.ProtocolError, ExitCode.UNAVAILABLE),
    (errors.UnsupportedOperation, ExitCode.UNSUPPORTED),
    (errors.WaitTimeout, ExitCode.TIMEOUT),
    (UsageError, ExitCode.USAGE),
    (Interrupted, ExitCode.INTERRUPTED),
)


def exit_code_of(error: errors.TrainingBackendError) -> ExitCode:
    """Return the exit code of an error: that of the first matching class."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)


def exit_code_of_status(status: TrainingStatus) -> ExitCode:
    """Return the exit code of `wait` and `--follow` for a run with this status."""
    if status is TrainingStatus.FAILED:
        return ExitCode.RUN_FAILED
    return ExitCode.RUN_CANCELLED if status is TrainingStatus.CANCELLED else ExitCode.DONE
