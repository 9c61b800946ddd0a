"""Error bodies of the protocol, parsed by clients and built by the gateway."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

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
)

__all__ = [
    "ErrorItem",
    "error_from_answer",
    "error_items",
    "no_model_message",
    "retired",
    "validation_body",
]

_NO_MODEL = "Model not available for this type of fine-tuning"
"""Start of the service's error for an unknown model; with an empty list it means: retired."""

RETIRED_SINCE = "2026-07-13"
"""First day on which the job routes were observed to return 410."""


class ErrorItem(TypedDict):
    """One entry of a 422 body's `detail`."""

    type: str
    loc: list[str | int]
    msg: str
    ctx: NotRequired[dict[str, Any]]


def retired(how: str, backend: str | None) -> BackendRetired:
    """Return the error for a service that has ended fine-tuning.

    Args:
        how: Evidence, such as the status code and message.
    """
    return BackendRetired(
        f"The provider has shut down its fine-tuning API ({how}).",
        hint="Mistral's hosted fine-tuning API has returned 410 since "
        f"{RETIRED_SINCE}. Use `training-backends serve` for the same protocol on your own "
        "compute, or `launch --backend local` to run this configuration without a server.",
        backend=backend,
    )


def no_model_message(job_type: str, available: list[str]) -> str:
    """Return the service's error message for a model that is not offered."""
    return f"{_NO_MODEL} ({job_type}). Available model(s): {', '.join(available)}"


def error_items(details: Iterable[Any], place: Sequence[str | int] = ()) -> list[ErrorItem]:
    """Return pydantic's errors as entries of a body, without the input, which may hold a key.

    Args:
        place: Location of the validated document in the request, the start of each `loc`.
    """
    items: list[ErrorItem] = []
    for detail in details:
        loc = [*place, *detail["loc"]]
        item: ErrorItem = {"type": detail["type"], "loc": loc, "msg": detail["msg"]}
        if detail.get("ctx"):
            item["ctx"] = detail["ctx"]
        items.append(item)
    return items


def validation_body(items: list[ErrorItem]) -> dict[str, Any]:
    """Return the body of a 422 for invalid fields."""
    return {"detail": items}


def error_from_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, backend: str | None = None
) -> TrainingBackendError:
    """Convert an error response to an exception that includes the provider's message."""
    document = _document(body)
    said = _message(document) or body[:200].decode("utf-8", "replace").strip() or "no explanation"
    if status in {410, 501} or (status == 422 and _offers_no_model(said)):
        return retired(f"{status}: {said}", backend)
    if status in {400, 422}:
        return _refusal(status, document, said, backend)
    if status == 401:
        return AuthenticationFailed(
            f"The provider rejected the API key (401: {said}).",
            hint="Store a valid key with `training-backends credentials set mistral`.",
            backend=backend,
        )
    if status == 403:
        return PermissionDenied(f"The API key lacks permission (403: {said}).", backend=backend)
    if status == 404:
        return RunNotFound(f"Not found at the provider (404: {said}).", backend=backend)
    if status == 409:
        other = document.get("job_id") if isinstance(document, dict) else None
        return DuplicateRun(
            f"It already exists at the provider (409: {said}).",
            other=other if isinstance(other, str) else None,
            backend=backend,
        )
    if status == 413:
        return PayloadTooLarge(
            f"Too large for the provider (413: {said}).",
            hint="Split the file; a run can train on any number of files.",
            backend=backend,
        )
    if status == 429:
        return RateLimited(
            f"Rate limited by the provider (429: {said}).",
            retry_after=_seconds(headers.get("retry-after")),
            backend=backend,
        )
    if status >= 500 or status == 408:
        return BackendUnavailable(f"Provider error ({status}: {said}).", backend=backend)
    return ProtocolError(
        f"Unexpected status {status} from the provider.",
        excerpt=body[:500].decode("utf-8", "replace"),
        backend=backend,
    )


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _message(document: Any) -> str | None:
    """Return the message of any of the service's error bodies."""
    if not isinstance(document, dict):
        return None
    for key in ("detail", "message", "error"):
        value = document.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            return str(value["message"])
        if isinstance(value, list) and (issues := _field_issues(value)):
            return "; ".join(str(issue) for issue in issues)
    return None


def _offers_no_model(said: str) -> bool:
    return said.startswith(_NO_MODEL) and said.rstrip().endswith("Available model(s):")


def _refusal(
    status: int, document: Any, said: str, backend: str | None
) -> ConfigError | DatasetError:
    """Return the error for a rejected file (with lines) or a rejected request (with fields)."""
    entries = document.get("errors") if isinstance(document, dict) else None
    if isinstance(entries, list):
        issues = [
            Issue(
                code="refused_by_provider",
                message=str(entry.get("message", said)),
                line=entry["line_number"] if isinstance(entry.get("line_number"), int) else None,
            )
            for entry in entries
            if isinstance(entry, dict)
        ]
        return DatasetError(
            f"The provider rejected the file ({status}: {said}).", issues=issues, backend=backend
        )
    detail = document.get("detail") if isinstance(document, dict) else None
    issues = _field_issues(detail) if isinstance(detail, list) else []
    return ConfigError(
        f"The provider rejected the request ({status}: {said}).", issues=issues, backend=backend
    )


def _field_issues(detail: list[Any]) -> list[Issue]:
    return [
        Issue(
            code=str(entry.get("type", "refused_by_provider")),
            message=str(entry.get("msg", "refused")),
            field=_place(entry.get("loc")),
        )
        for entry in detail
        if isinstance(entry, dict)
    ]


def _place(location: Any) -> str | None:
    parts = location if isinstance(location, list) else [location] if location else []
    return ".".join(str(part) for part in parts if part != "body") or None


def _seconds(value: str | None) -> float | None:
    """Parse a Retry-After in seconds; the service does not use dates."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
