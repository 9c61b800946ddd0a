"""The protocol's error bodies: read by clients, written by the gateway."""

import json
import math
from collections.abc import Mapping
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
    "NO_MODEL",
    "ErrorItem",
    "error_from_answer",
    "no_model_message",
    "retired",
    "validation_body",
]

NO_MODEL = "Model not available for this type of fine-tuning"
"""How the service begins its refusal of a model; with an empty list it means: retired."""

RETIRED_SINCE = "2026-07-13"
"""First day on which the job routes were seen to answer 410."""


class ErrorItem(TypedDict):
    """One entry of a 422 body's `detail`."""

    type: str
    loc: list[str | int]
    msg: str
    ctx: NotRequired[dict[str, Any]]


def retired(how: str, backend: str | None) -> BackendRetired:
    """Return the error for a service that trains no more.

    Args:
        how: How that is known.
    """
    return BackendRetired(
        f"The provider has ended its fine-tuning API ({how}).",
        hint="Hosted fine-tuning jobs at Mistral have answered 410 since "
        f"{RETIRED_SINCE}. `training-backends serve` offers the same protocol on your own "
        "compute, and `launch --backend local` runs this configuration without a server.",
        backend=backend,
    )


def no_model_message(job_type: str, available: list[str]) -> str:
    """Say in the service's words that a model is not offered."""
    return f"{NO_MODEL} ({job_type}). Available model(s): {', '.join(available)}"


def validation_body(items: list[ErrorItem]) -> dict[str, Any]:
    """Return the body of a 422 that names fields."""
    return {"detail": items}


def error_from_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, backend: str | None = None
) -> TrainingBackendError:
    """Turn an answer that is no success into our error, keeping what the service said."""
    document = _document(body)
    said = _message(document) or body[:200].decode("utf-8", "replace").strip() or "no explanation"
    if status in {410, 501} or (status == 422 and _offers_no_model(said)):
        return retired(f"{status}: {said}", backend)
    if status in {400, 422}:
        return _refusal(status, document, said, backend)
    if status == 401:
        return AuthenticationFailed(
            f"The provider did not accept the API key (401: {said}).",
            hint="`training-backends credentials set mistral` stores another one.",
            backend=backend,
        )
    if status == 403:
        return PermissionDenied(f"The API key may not do this (403: {said}).", backend=backend)
    if status == 404:
        return RunNotFound(f"The provider does not know it (404: {said}).", backend=backend)
    if status == 409:
        other = document.get("job_id") if isinstance(document, dict) else None
        return DuplicateRun(
            f"The provider has this already (409: {said}).",
            other=other if isinstance(other, str) else None,
            backend=backend,
        )
    if status == 413:
        return PayloadTooLarge(
            f"The provider finds this too large (413: {said}).",
            hint="Split the file; any number of files can be trained on.",
            backend=backend,
        )
    if status == 429:
        return RateLimited(
            f"The provider asks for a pause (429: {said}).",
            retry_after=_seconds(headers.get("retry-after")),
            backend=backend,
        )
    if status >= 500 or status == 408:
        return BackendUnavailable(f"The provider failed ({status}: {said}).", backend=backend)
    return ProtocolError(
        f"The provider answered {status}, which the protocol does not know.",
        excerpt=body[:500].decode("utf-8", "replace"),
        backend=backend,
    )


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _message(document: Any) -> str | None:
    """Find the sentence in any of the service's error bodies."""
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
    return said.startswith(NO_MODEL) and said.rstrip().endswith("Available model(s):")


def _refusal(
    status: int, document: Any, said: str, backend: str | None
) -> ConfigError | DatasetError:
    """Tell a refused file (with line numbers) from a refused request (with fields)."""
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
            f"The provider refused the file ({status}: {said}).", issues=issues, backend=backend
        )
    detail = document.get("detail") if isinstance(document, dict) else None
    issues = _field_issues(detail) if isinstance(detail, list) else []
    return ConfigError(
        f"The provider refused the request ({status}: {said}).", issues=issues, backend=backend
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
    """Read a Retry-After given in seconds; a date is not used by this service."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
