"""Error responses to exceptions, by table: by the provider's code, then by status."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from training_backends.core.errors import (
    AuthenticationFailed,
    BackendRetired,
    BackendUnavailable,
    ConfigError,
    DuplicateRun,
    Issue,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
)

__all__ = ["ErrorDecoder", "ErrorKind", "ErrorTable"]

ErrorDecoder = Callable[[int, Mapping[str, str], bytes], TrainingBackendError]
"""Converts status, headers and body of an error response to an exception."""

ErrorKind = Callable[..., TrainingBackendError]
"""An error class, or a function with the same arguments such as
`partial(RateLimited, retryable=False)`."""

_STATUSES: Final[Mapping[int, ErrorKind]] = MappingProxyType(
    {
        400: ConfigError,
        401: AuthenticationFailed,
        402: PermissionDenied,
        403: PermissionDenied,
        404: RunNotFound,
        408: BackendUnavailable,
        409: DuplicateRun,
        410: BackendRetired,
        413: PayloadTooLarge,
        422: ConfigError,
        425: BackendUnavailable,
        429: RateLimited,
        501: BackendRetired,
    }
)

_TEXTS: Final[Mapping[ErrorKind, str]] = MappingProxyType(
    {
        AuthenticationFailed: "The provider rejected the credentials",
        BackendRetired: "The provider does not offer this service",
        BackendUnavailable: "Provider error",
        DuplicateRun: "It already exists at the provider",
        PayloadTooLarge: "Too large for the provider",
        PermissionDenied: "Permission denied by the provider",
        RateLimited: "Rate limited by the provider",
        RunNotFound: "Not found at the provider",
    }
)
_OTHERWISE: Final = "The provider rejected the request"

_NAMES_OF_IDS: Final = ("id", "job_id", "file_id", "run_id")
_LONGEST_TEXT: Final = 500
_XML: Final = re.compile(r"<(Code|Message)>([^<]{1,500})</\1>")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorTable:
    """An `ErrorDecoder` for the usual forms of error bodies.

    Understands `{"error": {"message", "code", "type", "param"}}`, `{"error": "text"}`,
    `{"message"}`, `{"detail": "text"}`, the field errors of FastAPI, XML of object stores and
    plain text. The defaults are 400 and 422 `ConfigError`, 401 `AuthenticationFailed`, 402 and
    403 `PermissionDenied`, 404 `RunNotFound`, 409 `DuplicateRun`, 410 and 501 `BackendRetired`,
    413 `PayloadTooLarge`, 429 `RateLimited`, 408, 425 and 5xx `BackendUnavailable`, and
    `ProtocolError` for any other.

    Attributes:
        codes: Errors by the provider's code or type; these come first.
        statuses: Errors by status, before the defaults.
        hints: What to do, by error class.
    """

    backend: str | None = None
    codes: Mapping[str, ErrorKind] = field(default_factory=dict)
    statuses: Mapping[int, ErrorKind] = field(default_factory=dict)
    hints: Mapping[type[TrainingBackendError], str] = field(default_factory=dict)

    def __call__(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> TrainingBackendError:
        """Return the exception for an error response."""
        del headers  # the client reads Retry-After
        said = _read(body)
        kind = next((self.codes[code] for code in said.codes if code in self.codes), None)
        if kind is None:
            usual = BackendUnavailable if status >= 500 else None
            kind = self.statuses.get(status, _STATUSES.get(status, usual))
        if kind is None:
            return ProtocolError(
                f"Unexpected status {status} from the provider ({said.message}).",
                excerpt=body[:_LONGEST_TEXT].decode("utf-8", "replace"),
                backend=self.backend,
            )
        text = _TEXTS.get(kind, _OTHERWISE)
        error = kind(f"{text} ({status}: {said.message}).", backend=self.backend)
        if isinstance(error, ConfigError):
            error.issues = said.issues
        if isinstance(error, DuplicateRun):
            error.other = error.other or said.other
        error.hint = error.hint or self.hints.get(type(error))
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class _ErrorBody:
    message: str
    codes: tuple[str, ...] = ()
    issues: tuple[Issue, ...] = ()
    other: str | None = None


def _read(body: bytes) -> _ErrorBody:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return _read_text(body)
    if not isinstance(document, dict):
        return _read_text(body)
    inner = document.get("error")
    values = inner if isinstance(inner, dict) else document
    codes = tuple(
        str(value) for value in (values.get("code"), values.get("type")) if _is_word(value)
    )
    issues = _field_issues(document.get("detail"))
    texts = (
        values.get("message"),
        inner,
        document.get("detail"),
        "; ".join(str(issue) for issue in issues),
        *codes,
    )
    message = next((text for text in texts if isinstance(text, str) and text), None)
    if message is None:
        return _read_text(body)
    if not issues and isinstance(param := values.get("param"), str) and param:
        code = codes[0] if codes else "rejected_by_provider"
        issues = (Issue(code=code, message=message[:_LONGEST_TEXT], field=param),)
    other = next((document[name] for name in _NAMES_OF_IDS if _is_word(document.get(name))), None)
    return _ErrorBody(
        message=message[:_LONGEST_TEXT].strip().rstrip("."),
        codes=codes,
        issues=issues,
        other=None if other is None else str(other),
    )


def _read_text(body: bytes) -> _ErrorBody:
    text = body.decode("utf-8", "replace").strip()
    if text.startswith("<") and (found := dict(_XML.findall(text))):
        code = found.get("Code", "")
        message = ": ".join(part for part in (code, found.get("Message")) if part)
        return _ErrorBody(message=message, codes=(code,) if code else ())
    return _ErrorBody(message=text[:200] or "no explanation")


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _field_issues(detail: Any) -> tuple[Issue, ...]:
    """Return the issues of FastAPI's `detail`."""
    if not isinstance(detail, list):
        return ()
    return tuple(
        Issue(
            code=str(entry.get("type", "rejected_by_provider")),
            message=str(entry.get("msg", "rejected")),
            field=_place(entry.get("loc")),
        )
        for entry in detail
        if isinstance(entry, dict)
    )


def _place(location: Any) -> str | None:
    parts = location if isinstance(location, list) else [location] if location else []
    return ".".join(str(part) for part in parts if part != "body") or None
