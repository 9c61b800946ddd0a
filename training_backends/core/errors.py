"""Every error that this package raises (standard library only).

TrainingBackendError
├── ConfigError                 a configuration that cannot be run     (.issues)
├── DatasetError                training data that cannot be used      (.issues)
├── CredentialNotFound          no key in any source
├── VaultLocked                 the keyring did not open in time
├── AuthenticationFailed        401
├── PermissionDenied            403
├── RunNotFound                 404                                    (.candidates)
├── DuplicateRun                409                                    (.other)
├── BackendRetired              410, 501
├── PayloadTooLarge             413
├── RateLimited                 429                                    (.retry_after)
├── BackendUnavailable          network, 5xx
├── ProtocolError               an answer that breaks the protocol     (.excerpt)
├── BudgetExceeded              estimate or quote above the budget     (.limit, .found)
├── UnsupportedOperation        a verb that this backend does not have
├── AmbiguousLaunch             nobody can tell whether a step happened
├── BackendNotInstalled         an extra or plugin is missing          (.install)
├── BackendBroken               a backend raised what it must not      (.package)
├── StoreError                  the run store cannot be read or written
└── WaitTimeout                 `wait` ran out of time; the run goes on

An error takes one positional message and keyword-only context, so each survives
pickling. Its issues and hint are also its notes (PEP 678), so tracebacks show them. No message,
hint or repr ever holds a secret.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, TypedDict, Unpack

from training_backends.core.redaction import redact

__all__ = [
    "AmbiguousLaunch",
    "AuthenticationFailed",
    "BackendBroken",
    "BackendNotInstalled",
    "BackendRetired",
    "BackendUnavailable",
    "BudgetExceeded",
    "ConfigError",
    "CredentialNotFound",
    "DatasetError",
    "DuplicateRun",
    "ErrorContext",
    "Issue",
    "PayloadTooLarge",
    "PermissionDenied",
    "ProtocolError",
    "RateLimited",
    "RunNotFound",
    "StoreError",
    "TrainingBackendError",
    "UnsupportedOperation",
    "VaultLocked",
    "WaitTimeout",
    "first_line",
]

_MOST_NOTES: Final = 20
"""Issues shown in a traceback; `issues` has all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One thing wrong with a configuration or a data file.

    Attributes:
        code: Stable machine word, for example `unknown_field`.
        message: What was found.
        path: The file it was found in, if any.
        line: Line in that file, counted from 1.
        field: Dotted path to the value, for example `hyperparameters.epochs`.
        fix: What to do about it.
        severity: A warning does not stop a launch.
    """

    code: str
    message: str
    path: str | None = None
    line: int | None = None
    field: str | None = None
    fix: str | None = None
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line) if part is not None)
        head = ": ".join(part for part in (place, self.field) if part)
        text = f"{head}: {self.message}" if head else self.message
        return f"{text} ({self.fix})" if self.fix else text


class ErrorContext(TypedDict, total=False):
    """Keyword arguments that every error takes."""

    hint: str | None
    backend: str | None
    run_id: str | None
    retryable: bool


class TrainingBackendError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: What was asked and what came instead.
        hint: What to do next, or None.
        backend: Name of the backend concerned, or None.
        run_id: Our id of the run concerned, or None.
        retryable: Whether the same call may succeed later without a change.
        issues: What is wrong in detail, of errors that list it.
        install: The command that installs what is missing, of errors about that.
    """

    retryable_by_default: ClassVar[bool] = False
    issues: tuple[Issue, ...] = ()
    install: str | None = None
    _added_notes: tuple[str, ...] = ()

    def __init__(self, message: str, **context: Unpack[ErrorContext]) -> None:
        super().__init__(message)
        self.message = message
        self.hint = context.get("hint")
        self.backend = context.get("backend")
        self.run_id = context.get("run_id")
        self.retryable = context.get("retryable", self.retryable_by_default)

    @property
    def __notes__(self) -> list[str]:
        """The issues, the hint and what `add_note` added, redacted; tracebacks print them.

        Made when asked for, because a hint may be extended after construction, and a secret
        registered.
        """
        notes = [f"- {issue}" for issue in self.issues[:_MOST_NOTES]]
        if len(self.issues) > _MOST_NOTES:
            notes.append(f"- and {len(self.issues) - _MOST_NOTES} more")
        if hint := self.hint or self.install:
            notes.append(f"Hint: {hint}")
        return [redact(note) for note in (*notes, *self._added_notes)]

    @__notes__.setter
    def __notes__(self, notes: list[str]) -> None:
        self._added_notes = tuple(notes)

    def add_note(self, note: str, /) -> None:
        """See `BaseException.add_note`."""
        self._added_notes = (*self._added_notes, note)


class _IssuesError(TrainingBackendError, ValueError):
    """An error that carries a list of issues."""

    def __init__(
        self, message: str, *, issues: Sequence[Issue] = (), **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.issues = tuple(issues)


class ConfigError(_IssuesError):
    """The configuration cannot be run; `issues` says why, field by field."""


class DatasetError(_IssuesError):
    """The training data cannot be used; `issues` says why, line by line."""


class CredentialNotFound(TrainingBackendError, LookupError):
    """No key was found in any source."""


class VaultLocked(TrainingBackendError):
    """The keyring stayed locked for as long as we were ready to wait."""

    retryable_by_default = True


class AuthenticationFailed(TrainingBackendError):
    """The provider did not accept the key (401)."""


class PermissionDenied(TrainingBackendError):
    """The key is valid but may not do this (403)."""


class RunNotFound(TrainingBackendError, LookupError):
    """There is no such run, job, file or model (404).

    Attributes:
        candidates: Ids of runs that begin with the one given, six at most; ids are matched
            exactly, so none of them was taken.
    """

    def __init__(
        self, message: str, *, candidates: Sequence[str] = (), **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.candidates = tuple(candidates)


class DuplicateRun(TrainingBackendError):
    """The same thing exists already (409).

    Attributes:
        other: Id of what is in the way, or None when the provider did not say.
    """

    def __init__(
        self, message: str, *, other: str | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.other = other


class BackendRetired(TrainingBackendError):
    """The provider has ended this service (410, 501)."""


class PayloadTooLarge(TrainingBackendError):
    """A file or request is larger than the provider takes (413)."""


class RateLimited(TrainingBackendError):
    """The provider asked for a pause (429).

    Attributes:
        retry_after: Seconds to wait as the provider gave them, or None.
    """

    retryable_by_default = True

    def __init__(
        self, message: str, *, retry_after: float | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.retry_after = retry_after


class BackendUnavailable(TrainingBackendError, ConnectionError):
    """No usable answer: network trouble or 5xx, after retries.

    Attributes:
        sent: Whether the request may have reached the provider, so that a step that
            changes something may have happened although no answer came.
    """

    retryable_by_default = True

    def __init__(self, message: str, *, sent: bool = True, **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.sent = sent


class ProtocolError(TrainingBackendError):
    """The provider's answer breaks the protocol.

    Attributes:
        excerpt: The first part of the answer, at most 500 characters.
    """

    def __init__(self, message: str, *, excerpt: str = "", **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.excerpt = excerpt[:500]


class BudgetExceeded(TrainingBackendError):
    """The run would go over its budget, so it was not started.

    Attributes:
        limit: What the budget allows, as text.
        found: What the estimate or quote says, as text.
    """

    def __init__(
        self, message: str, *, limit: str = "", found: str = "", **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.limit = limit
        self.found = found


class UnsupportedOperation(TrainingBackendError, NotImplementedError):
    """This backend has no such verb; `Capabilities` says so beforehand."""


class AmbiguousLaunch(TrainingBackendError):
    """A step was begun and nobody can tell whether it happened; the message says what to check."""


class BackendNotInstalled(TrainingBackendError, ImportError):
    """A backend, or what it needs to work, is not installed; `install` says how to."""

    def __init__(
        self, message: str, *, install: str | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.install = install


class BackendBroken(TrainingBackendError):
    """A backend raised an exception that is not from this package; `__cause__` is that exception.

    Attributes:
        package: The distribution that provides the backend.
    """

    def __init__(self, message: str, *, package: str = "", **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.package = package


class StoreError(TrainingBackendError):
    """The run store cannot be read or written."""


class WaitTimeout(TrainingBackendError, TimeoutError):
    """The wait is over before the run is; the run goes on."""

    retryable_by_default = True


_LONGEST_LINE: Final = 500


def first_line(error: BaseException) -> str:
    """Return what a library's error says first, 500 characters at most; some say thousands."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:_LONGEST_LINE] if lines else "no message"
