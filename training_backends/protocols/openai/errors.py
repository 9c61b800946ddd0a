"""Errors of the protocol, parsed by clients and built by servers.

The body is `{"error": {"message", "type", "param", "code"}}`; Azure sends code and message, with
target, details and innererror (specification 2024-10-21); servers on FastAPI, such as Nebius', send
`{"detail": …}`. The official clients (openai-python 3.57.0, openai-node 7.59.0) repeat 408, 409,
429 and 5xx by themselves unless `x-should-retry: false` is sent, and do not treat a 422 as a
BadRequestError; hence a server answers 400, and says when repeating is useless.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from training_backends.core.errors import (
    AuthenticationFailed,
    BackendRetired,
    BackendUnavailable,
    ConfigError,
    DatasetError,
    DuplicateRun,
    Issue,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
    UnsupportedOperation,
)
from training_backends.core.redaction import redact

__all__ = [
    "ErrorAnswer",
    "answer_for",
    "error_from_answer",
    "invalid_key",
    "invalid_training_file",
    "model_not_available",
    "no_file",
    "no_job",
    "no_model",
    "no_upload",
    "not_jsonl",
    "not_supported",
    "wrong_state",
]

_CLOSES: Final = "2027-01-06"
"""Day from which OpenAI accepts no fine-tuning job from anybody (documentation of 2026-11-10)."""

_DATA_CODES: Final = frozenset({"jsonlValidationFailed", "fileImportFailed", "invalid_file_format"})
_DATA_TEXT: Final = "Expected file to have JSONL format"
# What waiting for some seconds does not change: money, and the jobs of a day.
_SPENT: Final = frozenset({"insufficient_quota", "quotaExceeded", "daily_rate_limit_exceeded"})
_NO_RETRY: Final = {"x-should-retry": "false"}


# -- servers ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """An error response.

    Attributes:
        param: The parameter at fault.
        code: Stable identifier, for programs.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        names = ("message", "type", "param", "code")
        return {"error": {name: getattr(self, name) for name in names}}


def invalid_key() -> ErrorAnswer:
    """Return the response to a missing or wrong key, without repeating the key."""
    return ErrorAnswer(status=401, message="Incorrect API key provided.", code="invalid_api_key")


def no_job(job_id: str) -> ErrorAnswer:
    """Return the response for an unknown job (recorded 2023-11)."""
    return ErrorAnswer(
        status=404,
        message=f"Could not find fine tune: {job_id}",
        param="fine_tune_id",
        code="fine_tune_not_found",
    )


def no_file(file_id: str) -> ErrorAnswer:
    """Return the response for an unknown file; it has no code (recorded)."""
    return ErrorAnswer(status=404, message=f"No such File object: {file_id}", param="id")


def no_upload(upload_id: str) -> ErrorAnswer:
    """Return the response for an unknown upload, like that for a file."""
    return ErrorAnswer(status=404, message=f"No such Upload object: {upload_id}", param="id")


def no_model(name: str) -> ErrorAnswer:
    """Return the response for an unknown model (recorded 2025-03)."""
    return ErrorAnswer(
        status=404,
        message=f"The model '{name}' does not exist",
        param="model",
        code="model_not_found",
    )


def not_jsonl(line: int) -> ErrorAnswer:
    """Return the response to a training file with a line that is not a JSON object.

    Programs match its beginning (a handler of n8n, 2026).
    """
    message = f"{_DATA_TEXT}, where every line is a valid JSON dictionary. Line {line} is not."
    return ErrorAnswer(status=400, message=message, param="file")


def invalid_training_file(file_id: str, param: str = "training_file") -> ErrorAnswer:
    """Return the response to a job with an unknown file (recorded)."""
    return ErrorAnswer(status=400, message=f"invalid {param}: {file_id}", param=param)


def model_not_available(name: str) -> ErrorAnswer:
    """Return the response to a job with a model that cannot be trained (reports of 2026)."""
    return ErrorAnswer(
        status=400,
        message=f"Model {name} is not available for fine-tuning",
        param="model",
        code="model_not_available",
    )


def wrong_state(message: str) -> ErrorAnswer:
    """Return the response to a request that does not fit the job's status.

    What the service answers is not documented; a 409 would be sent three times by the clients.
    """
    return ErrorAnswer(status=400, message=message, code="invalid_state")


def not_supported(message: str) -> ErrorAnswer:
    """Return the response to a request that the server can never fulfil."""
    return ErrorAnswer(status=400, message=message, code="unsupported_operation")


def answer_for(error: TrainingBackendError) -> ErrorAnswer:
    """Convert an exception to an error response that `error_from_answer` reads as the same class.

    Errors that are not about the request, such as StoreError, become a 500 without their message.
    """
    message = error.message
    issue = error.issues[0] if error.issues else None
    if issue is not None:
        message = f"{message} {issue.message}"
    for kind, answer in _ANSWERS:
        if isinstance(error, kind):
            headers = dict(answer.headers)
            if isinstance(error, RateLimited):
                if error.retry_after is not None:
                    headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
                if not error.retryable:
                    headers |= _NO_RETRY
            return ErrorAnswer(
                status=answer.status,
                message=redact(message),
                type=answer.type,
                param=issue.field if issue and issue.field else answer.param,
                code=answer.code,
                headers=headers,
            )
    return ErrorAnswer(status=500, message="The server had an error.", type="server_error")


def _kind(
    status: int, code: str | None = None, kind: str = "invalid_request_error", **headers: str
) -> ErrorAnswer:
    return ErrorAnswer(
        status=status,
        message="",
        type=kind,
        code=code,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


_ANSWERS: Final[tuple[tuple[type[TrainingBackendError], ErrorAnswer], ...]] = (
    (AuthenticationFailed, _kind(401, "invalid_api_key")),
    (PermissionDenied, _kind(403)),
    (RunNotFound, _kind(404, "not_found")),
    (DuplicateRun, _kind(409, "conflict", x_should_retry="false")),
    (BackendRetired, _kind(410)),
    (PayloadTooLarge, _kind(413)),
    (RateLimited, _kind(429, "rate_limit_exceeded")),
    (DatasetError, _kind(400, "invalid_file_format")),
    (ConfigError, _kind(400)),
    (UnsupportedOperation, _kind(400, "unsupported_operation")),
    (BackendUnavailable, _kind(503, kind="server_error")),
)


# -- clients ---------------------------------------------------------------------------


def error_from_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, backend: str | None = None
) -> TrainingBackendError:
    """Convert an error response to an exception that includes the provider's message.

    Args:
        headers: Names in lower case.
    """
    said = _read(body)
    text = f"({status}: {said.message})"
    if status in {410, 501}:
        return _retired(text, backend)
    if status in {400, 409, 422}:
        return _rejected(status, said, text, backend)
    if status == 401:
        return AuthenticationFailed(
            f"The provider rejected the API key {text}.",
            hint="Store a valid key with "
            f"`training-backends credentials set {backend or 'openai'}`.",
            backend=backend,
        )
    if status == 403:
        return PermissionDenied(f"The API key lacks permission {text}.", backend=backend)
    if status == 404:
        return RunNotFound(f"Not found at the provider {text}.", backend=backend)
    if status == 413:
        return PayloadTooLarge(
            f"Too large for the provider {text}.", hint="Use a smaller file.", backend=backend
        )
    if status == 429:
        spent = said.code in _SPENT or headers.get("x-should-retry") == "false"
        return RateLimited(
            f"Rate limited by the provider {text}.",
            retry_after=_retry_after(headers),
            retryable=not spent,
            backend=backend,
        )
    if status >= 500 or status == 408:
        return BackendUnavailable(f"Provider error {text}.", backend=backend)
    return ProtocolError(
        f"Unexpected status {status} from the provider.",
        excerpt=body[:500].decode("utf-8", "replace"),
        backend=backend,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What an error body says, whichever form it has."""

    message: str
    code: str | None = None
    param: str | None = None
    issues: tuple[Issue, ...] = ()


def _read(body: bytes) -> _Said:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        inner = document.get("error")
        if isinstance(inner, str) and inner:
            return _Said(message=inner)
        values = inner if isinstance(inner, dict) else document
        if (issues := _field_issues(document.get("detail"))) and inner is None:
            return _Said(message="; ".join(str(issue) for issue in issues), issues=issues)
        message = next(
            (values[k] for k in ("message", "detail") if isinstance(values.get(k), str)), None
        )
        code = _text(values.get("code"))
        if message or code:
            return _Said(
                message=str(message or code),
                code=code,
                param=_text(values.get("param")) or _text(values.get("target")),
                issues=_detail_issues(values.get("details")),
            )
    return _Said(message=body[:200].decode("utf-8", "replace").strip() or "no explanation")


def _rejected(status: int, said: _Said, text: str, backend: str | None) -> TrainingBackendError:
    if said.code == "unsupported_operation":
        return UnsupportedOperation(f"The provider does not support this {text}.", backend=backend)
    # Azure answers 409 also to what a job's status does not allow; that is not a duplicate.
    if status == 409 and said.code != "unexpectedEntityState":
        return DuplicateRun(f"It already exists at the provider {text}.", backend=backend)
    if said.code in _DATA_CODES or said.message.startswith(_DATA_TEXT):
        return DatasetError(
            f"The provider rejected the file {text}.", issues=said.issues, backend=backend
        )
    issues = said.issues
    if not issues and said.param:
        code = said.code or "rejected_by_provider"
        issues = (Issue(code=code, message=said.message, field=said.param),)
    return ConfigError(f"The provider rejected the request {text}.", issues=issues, backend=backend)


def _retired(text: str, backend: str | None) -> BackendRetired:
    return BackendRetired(
        f"The provider does not offer fine-tuning {text}.",
        hint=f"OpenAI accepts no fine-tuning jobs from {_CLOSES} on. Other servers of the same "
        "protocol may; `launch --backend local` runs this configuration on this machine.",
        backend=backend,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _detail_issues(details: Any) -> tuple[Issue, ...]:
    """Return the entries of Azure's `details`."""
    if not isinstance(details, list):
        return ()
    return tuple(
        Issue(
            code=_text(entry.get("code")) or "rejected_by_provider",
            message=_text(entry.get("message")) or "rejected",
            field=_text(entry.get("target")),
        )
        for entry in details
        if isinstance(entry, dict)
    )


def _field_issues(detail: Any) -> tuple[Issue, ...]:
    """Return the fields of FastAPI's `detail`."""
    if not isinstance(detail, list):
        return ()
    return tuple(
        Issue(
            code=_text(entry.get("type")) or "rejected_by_provider",
            message=_text(entry.get("msg")) or "rejected",
            field=_place(entry.get("loc")),
        )
        for entry in detail
        if isinstance(entry, dict)
    )


def _place(location: Any) -> str | None:
    parts = location if isinstance(location, list) else [location] if location else []
    return ".".join(str(part) for part in parts if part != "body") or None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait: milliseconds win; a date counts from now."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        at = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
