"""Scripted connection and server faults for `LoopbackServer`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CutAnswer",
    "Disturbance",
    "DropRequest",
    "Fault",
    "HangAnswer",
    "LoseAnswer",
    "OtherAnswer",
    "SlowAnswer",
    "disturbance",
]

Disturbance = Literal["lose", "drop", "html", "hang"] | int
"""A kind of `Subject.disturb`; a number is the status code of an error response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Base of all faults.

    Attributes:
        done: Whether the server carries out the request before the fault occurs.
    """

    done: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseAnswer(Fault):
    """The connection is closed after the request was carried out, before any response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRequest(Fault):
    """The connection is closed after the request was read; it is not carried out."""

    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CutAnswer(Fault):
    """The response is truncated: its headers announce all of it."""

    after: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowAnswer(Fault):
    """The response arrives one byte at a time.

    Attributes:
        pause: Seconds between two bytes.
    """

    pause: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class HangAnswer(Fault):
    """No response, on an open connection, until the server heals or stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherAnswer(Fault):
    """A different response: an error, a web page, half a JSON document.

    Attributes:
        body: Bytes, text, or a value to encode as JSON.
    """

    status: int = 500
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    done: bool = False

    def content(self) -> bytes:
        """Return the body as sent over the wire."""
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


_PAGE = "<!doctype html><title>Welcome</title><p>This is the page of a proxy."


def disturbance(kind: Disturbance, *, echo: str = "") -> Fault:
    """Return the fault for a kind of `Subject.disturb`.

    Args:
        echo: Text that error responses repeat, such as the API key.
    """
    if isinstance(kind, int):
        message = f"This is a scripted error {kind} for the key {echo}."
        return OtherAnswer(status=kind, body={"error": {"message": message}})
    if kind == "lose":
        return LoseAnswer()
    if kind == "drop":
        return DropRequest()
    if kind == "hang":
        return HangAnswer()
    return OtherAnswer(body=_PAGE, status=200, content_type="text/html", done=True)
