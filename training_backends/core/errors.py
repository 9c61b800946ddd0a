"""All errors raised by this package (standard library only).

TrainingBackendError
├── ConfigError                 invalid configuration                  (.issues)
├── DatasetError                invalid training data                  (.issues)
├── CredentialNotFound          no key in any source
├── VaultLocked                 the keyring was not unlocked in time
├── AuthenticationFailed        401
├── PermissionDenied            403
├── RunNotFound                 404                                    (.candidates)
├── DuplicateRun                409                                    (.other)
├── BackendRetired              410, 501
├── PayloadTooLarge             413
├── RateLimited                 429                                    (.retry_after)
├── BackendUnavailable          network, 5xx
├── ProtocolError               a response that violates the protocol  (.excerpt)
├── BudgetExceeded              estimate or quote above the budget     (.limit, .found)
├── UnsupportedOperation        a method that this backend lacks
├── AmbiguousLaunch             unknown whether a step took effect
├── BackendNotInstalled         an extra or plugin is missing          (.install)
├── BackendBroken               an unexpected exception in a backend   (.package)
├── StoreError                  the run store cannot be read or written
├── RunFailed                   `run`: the run failed; in `core.run`   (.run, .failure)
└── WaitTimeout                 `wait` timed out; the run keeps running

Errors take one positional message and keyword-only context, so they can be pickled. Issues and
hint are also exposed as notes (PEP 678), so tracebacks show them. Messages, hints and reprs never
contain secrets.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypedDict, Unpack

from training_backends.core.redaction import redact

if TYPE_CHECKING:
    from pydantic import ValidationError

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
    "may_have_happened",
    "nearest",
    "suggest",
    "validation_issues",
]

_MOST_NOTES: Final = 20
"""Maximum number of issues shown in a traceback; `issues` contains all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """A problem in a configuration or a data file.

    Attributes:
        code: Stable identifier, for example `unknown_field`.
        message: Description of the problem.
        path: The file, if any.
        line: Line in the file, starting at 1.
        field: Dotted path to the value, for example `hyperparameters.epochs`.
        fix: How to fix it.
        severity: Only errors prevent a launch.
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
    """Keyword arguments accepted by every error."""

    hint: str | None
    backend: str | None
    run_id: str | None
    retryable: bool


class TrainingBackendError(Exception):
    """Base class of all errors of this package.

    Attributes:
        message: What failed and why.
        hint: How to resolve it, or None.
        backend: Name of the backend involved, or None.
        run_id: Id of the run involved, or None.
        retryable: Whether the same call may succeed later.
        http_status: The HTTP status for a service that answers its own callers with this error.
        issues: The individual problems, for errors that list them.
        install: The command that installs what is missing, for errors of that kind.
    """

    retryable_by_default: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    issues: tuple[Issue, ...] = ()
    install: str | None = None
    _added_notes: tuple[str, ...] = ()

    def __init__(self, message: str, **context: Unpack[ErrorContext]) -> None:
        super().__init__(message)
        self.message: str = message
        self.hint: str | None = context.get("hint")
        self.backend: str | None = context.get("backend")
        self.run_id: str | None = context.get("run_id")
        self.retryable: bool = context.get("retryable", self.retryable_by_default)

    @property
    def __notes__(self) -> list[str]:
        """Issues, hint and added notes, redacted; printed in tracebacks.

        Computed on access, because hints may be extended and secrets registered after
        construction.
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
        self.issues: tuple[Issue, ...] = tuple(issues)


class ConfigError(_IssuesError):
    """The configuration is invalid; `issues` lists the fields."""

    http_status = 422


class DatasetError(_IssuesError):
    """The training data is invalid; `issues` lists the lines."""

    http_status = 422


class CredentialNotFound(TrainingBackendError, LookupError):
    """No key was found in any source."""

    http_status = 502


class VaultLocked(TrainingBackendError):
    """The keyring was not unlocked within the timeout."""

    http_status = 503
    retryable_by_default = True


class AuthenticationFailed(TrainingBackendError):
    """The provider rejected the key (401)."""

    http_status = 502


class PermissionDenied(TrainingBackendError):
    """The key is valid but lacks permission (403)."""

    http_status = 502


class RunNotFound(TrainingBackendError, LookupError):
    """There is no such run, job, file or model (404).

    Attributes:
        candidates: Up to six run ids that start with the given one; ids must match exactly, so
            none of them was used.
    """

    http_status = 404

    def __init__(
        self, message: str, *, candidates: Sequence[str] = (), **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.candidates: tuple[str, ...] = tuple(candidates)


class DuplicateRun(TrainingBackendError):
    """The same run or object already exists (409).

    Attributes:
        other: Id of the existing one, or None if the provider did not return it.
    """

    http_status = 409

    def __init__(
        self, message: str, *, other: str | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.other = other


class BackendRetired(TrainingBackendError):
    """The provider has discontinued this service (410, 501)."""

    http_status = 502


class PayloadTooLarge(TrainingBackendError):
    """A file or request exceeds the provider's size limit (413)."""

    http_status = 413


class RateLimited(TrainingBackendError):
    """The provider's rate limit was exceeded (429).

    Attributes:
        retry_after: Seconds to wait, as given by the provider, or None.
    """

    http_status = 429
    retryable_by_default = True

    def __init__(
        self, message: str, *, retry_after: float | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.retry_after = retry_after


class BackendUnavailable(TrainingBackendError, ConnectionError):
    """No usable response after retries: network error or 5xx.

    Attributes:
        sent: Whether the request may have reached the provider and taken effect.
    """

    http_status = 503
    retryable_by_default = True

    def __init__(self, message: str, *, sent: bool = True, **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.sent = sent


class ProtocolError(TrainingBackendError):
    """The provider's response violates the protocol.

    Attributes:
        excerpt: The beginning of the response, at most 500 characters.
    """

    http_status = 502

    def __init__(self, message: str, *, excerpt: str = "", **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.excerpt: str = excerpt[:500]


class BudgetExceeded(TrainingBackendError):
    """The run would exceed its budget, so it was not started.

    Attributes:
        limit: The budget's limit, as text.
        found: The value of the estimate or quote, as text.
    """

    http_status = 402

    def __init__(
        self, message: str, *, limit: str = "", found: str = "", **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.limit = limit
        self.found = found


class UnsupportedOperation(TrainingBackendError, NotImplementedError):
    """The backend does not support the operation; see `Capabilities`."""

    http_status = 409


class AmbiguousLaunch(TrainingBackendError):
    """It is unknown whether an interrupted step took effect; the hint says what to check."""

    http_status = 409


class BackendNotInstalled(TrainingBackendError, ImportError):
    """A backend or one of its dependencies is not installed; see `install`."""

    def __init__(
        self, message: str, *, install: str | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.install = install


class BackendBroken(TrainingBackendError):
    """A backend raised an exception from outside this package, which is the `__cause__`.

    Attributes:
        package: The distribution that provides the backend.
    """

    def __init__(self, message: str, *, package: str = "", **context: Unpack[ErrorContext]) -> None:
        super().__init__(message, **context)
        self.package = package


class StoreError(TrainingBackendError):
    """The run store cannot be read or written."""

    http_status = 503


class WaitTimeout(TrainingBackendError, TimeoutError):
    """`wait` timed out before the runs finished; they keep running."""

    http_status = 504
    retryable_by_default = True


_REFUSALS: Final = (
    AuthenticationFailed,
    BackendNotInstalled,
    BackendRetired,
    BudgetExceeded,
    ConfigError,
    CredentialNotFound,
    DatasetError,
    DuplicateRun,
    PayloadTooLarge,
    PermissionDenied,
    RateLimited,
    RunNotFound,
    UnsupportedOperation,
    VaultLocked,
)
"""Responses that mean that nothing was done (4xx), and errors raised before any request."""


def may_have_happened(error: BaseException) -> bool:
    """Return whether what ended in this error may have taken effect.

    False only for a clear refusal: nothing was sent (`BackendUnavailable.sent` is False, or the
    error precedes any request), the rate limit, or a class of the 4xx responses. Anything else,
    such as a timeout, an unreadable response or an exception from outside this package, may have
    happened.
    """
    if isinstance(error, BackendUnavailable):
        return error.sent
    return not isinstance(error, _REFUSALS)


_LONGEST_LINE: Final = 500


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 500 characters."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:_LONGEST_LINE] if lines else "no message"


def nearest(word: str, known: Collection[str], *, cutoff: float = 0.65) -> str | None:
    """Return the known word that was probably meant.

    Args:
        cutoff: Least similarity, 0 to 1, see `difflib.get_close_matches`.
    """
    if len(word) > 100 or len(known) > 1000:
        return None  # too slow to compare
    return next(iter(get_close_matches(word, sorted(known), n=1, cutoff=cutoff)), None)


def suggest(word: str, known: Collection[str], otherwise: str, *, cutoff: float = 0.65) -> str:
    """Return a fix for an unknown word: the nearest known one, or else what is known."""
    meant = nearest(word, known, cutoff=cutoff)
    return f"did you mean {meant!r}?" if meant else otherwise


def validation_issues(
    error: "ValidationError", place: Sequence[str | int] = (), *, unknown: str = "unknown field"
) -> list[Issue]:
    """Return the problems that pydantic found, without the input, which may be secret.

    Args:
        place: Location of the validated document, the start of each field's name.
        unknown: Message for a field that the model does not have.
    """
    issues = []
    for detail in error.errors(include_input=False, include_url=False, include_context=False):
        extra = detail["type"] == "extra_forbidden"
        issues.append(
            Issue(
                code="unknown_field" if extra else detail["type"],
                message=unknown if extra else detail["msg"].removeprefix("Value error, "),
                field=".".join(str(part) for part in (*place, *detail["loc"])) or None,
            )
        )
    return issues
