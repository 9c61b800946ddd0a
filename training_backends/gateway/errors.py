"""Answers that refuse a request, with the service's own bodies."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from training_backends.mistral.errors import ErrorItem, validation_body

__all__ = ["Refusal", "invalid", "misfit", "not_found", "plain"]


class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        body: JSON body.
        headers: Extra response headers.
    """

    def __init__(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{status}: {body.get('detail')}")
        self.status = status
        self.body = dict(body)
        self.headers = dict(headers or {})


def plain(status: int, sentence: str, **more: Any) -> Refusal:
    """Refuse in one sentence, as the service does for what is no field's fault."""
    return Refusal(status, {"detail": sentence, **more})


def not_found(what: str) -> Refusal:
    """Say in the service's words that there is no such thing."""
    return plain(404, f"No {what} matches the given query.")


def misfit(place: Sequence[str | int], error: ValidationError) -> Refusal:
    """Refuse every field of one part of the request that does not fit its model."""
    items: list[ErrorItem] = [
        {"type": detail["type"], "loc": [*place, *detail["loc"]], "msg": detail["msg"]}
        for detail in error.errors(include_url=False, include_input=False)
    ]
    return Refusal(422, validation_body(items))


def invalid(loc: Sequence[str | int], message: str, kind: str = "value_error") -> Refusal:
    """Refuse one field of the request by its place."""
    item: ErrorItem = {"type": kind, "loc": list(loc), "msg": message}
    return Refusal(422, validation_body([item]))
