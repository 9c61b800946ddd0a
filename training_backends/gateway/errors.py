"""Error responses in the service's format, and the classification of temporary errors."""

import errno
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    DatasetError,
    StoreError,
    TrainingBackendError,
)
from training_backends.protocols.mistral.errors import ErrorItem, error_items, validation_body
from training_backends.protocols.openai.errors import ErrorAnswer, invalid_key

__all__ = [
    "OPENAI_PREFIX",
    "FileStorageUnavailable",
    "HTTPProblem",
    "failure_answer",
    "field_errors",
    "invalid",
    "is_temporary",
    "misfit",
    "not_found",
    "plain",
    "problem",
    "wire_error",
]

OPENAI_PREFIX: Final = "/openai/v1"
"""Path of the OpenAI API; all other paths answer with errors in Mistral's format."""

_MOST_ERRORS: Final = 20
_LONGEST: Final = 500
"""Characters of a client's value that a response may repeat."""
_RETRY_AFTER: Final = "5"
"""Seconds."""
_SHORTAGES: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOLCK,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EROFS,
        errno.ESTALE,
    }
)
"""Errors of a system short of resources, or of a failing disk."""

_OPENAI_CODES: Final = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class FileStorageUnavailable(BackendUnavailable):
    """The object store with the uploaded files cannot be used."""


class HTTPProblem(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        body: JSON body.
        headers: Extra response headers.
    """

    def __init__(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{status}: {body.get('detail') or body.get('error')}")
        self.status = status
        self.body: dict[str, Any] = dict(body)
        self.headers: dict[str, str] = dict(headers or {})


def plain(status: int, sentence: str, **more: Any) -> HTTPProblem:
    """Return an error with one sentence as its `detail`, for errors not tied to a field."""
    return HTTPProblem(status, {"detail": sentence, **more})


def not_found(what: str) -> HTTPProblem:
    """Return the service's 404."""
    return plain(404, f"No {what} matches the given query.")


def misfit(place: Sequence[str | int], error: ValidationError) -> HTTPProblem:
    """Return a 422 for the fields of one part of the request that fail its model."""
    return HTTPProblem(422, field_errors(error_items(error.errors(include_context=False), place)))


def field_errors(items: Sequence[ErrorItem]) -> dict[str, Any]:
    """Return the body of a 422 with the first errors and the number of the rest."""
    shown: list[ErrorItem] = [_truncated(item) for item in items[:_MOST_ERRORS]]
    if more := len(items) - len(shown):
        message = f"{more} more errors are not shown."
        shown.append({"type": "too_many_errors", "loc": ["body"], "msg": message})
    return validation_body(shown)


def _truncated(item: ErrorItem) -> ErrorItem:
    """Truncate long input that an error repeats, such as the name of an unknown field."""
    cut: ErrorItem = {
        "type": item["type"],
        "loc": [part[:_LONGEST] if isinstance(part, str) else part for part in item["loc"]],
        "msg": item["msg"][:_LONGEST],
    }
    if "ctx" in item:
        cut["ctx"] = {name: str(value)[:_LONGEST] for name, value in item["ctx"].items()}
    return cut


def invalid(loc: Sequence[str | int], message: str, kind: str = "value_error") -> HTTPProblem:
    """Return a 422 for one field of the request."""
    item: ErrorItem = {"type": kind, "loc": list(loc), "msg": message}
    return HTTPProblem(422, field_errors([item]))


def failure_answer(
    error: BaseException, request_id: str
) -> tuple[int, dict[str, str], dict[str, str]]:
    """Return status, body and headers for a failure of the gateway, without details."""
    body = {"message": "Internal server error", "request_id": request_id}
    if not is_temporary(error):
        return 500, body, {}
    what = "file storage" if _is_about_files(error) else "gateway"
    body["message"] = f"The {what} is temporarily unavailable; try again."
    return 503, body, {"retry-after": _RETRY_AFTER}


def _is_about_files(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_about_files, error.exceptions))
    return isinstance(error, FileStorageUnavailable)


def is_temporary(error: BaseException) -> bool:
    """Return whether an error of the system, a store or the network is worth a retry.

    True if any member of an exception group is temporary, or if the cause is a shortage of
    system resources.
    """
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_temporary, error.exceptions))
    if isinstance(error, ConfigError | DatasetError):
        # The gateway stored the file itself: the disk fails, or too many files are open.
        temporary = any(issue.code == "unreadable_file" for issue in error.issues)
    elif isinstance(error, TrainingBackendError):
        temporary = error.retryable or isinstance(error, StoreError)
    else:
        temporary = False
    return temporary or _is_shortage(error)


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, OSError):
        found = error.errno in _SHORTAGES
    else:
        found = isinstance(error, MemoryError) or (
            # CPython has no dedicated exception for this.
            isinstance(error, RuntimeError) and "can't start new thread" in str(error)
        )
    return found or (error.__cause__ is not None and _is_shortage(error.__cause__))


def problem(answer: ErrorAnswer) -> HTTPProblem:
    """Return an error of the OpenAI API."""
    return HTTPProblem(answer.status, answer.body(), answer.headers)


def wire_error(path: str, status: int, body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Return status and body of an error in the format of the API that the path belongs to.

    The OpenAI clients retry a 409 and do not raise BadRequestError for a 422, so both become 400.
    """
    if not f"{path}/".startswith(f"{OPENAI_PREFIX}/") or "error" in body:
        return status, body
    answer = _openai_error(status, body)
    return answer.status, answer.body()


def _openai_error(status: int, body: Mapping[str, Any]) -> ErrorAnswer:
    detail = body.get("detail") or body.get("message") or "The request failed."
    param = None
    if isinstance(detail, list):
        item = detail[0]
        param = ".".join(str(part) for part in item["loc"][1:]) or None
        detail = item["msg"]
        if param and item["type"] == "missing":
            detail = f"'{param}' is a required property"
        elif param:
            detail = f"invalid {param}: {detail}"
    if status == 401 and detail == "Unauthorized":
        return invalid_key()
    code = body.get("code") or _OPENAI_CODES.get(status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "insufficient_quota" if code == "insufficient_quota" else "rate_limit_error"
    return ErrorAnswer(
        status=400 if status in {409, 422} else status,
        message=detail,
        type=kind,
        param=param,
        code=code,
    )
