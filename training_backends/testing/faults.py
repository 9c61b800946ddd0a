"""Scripted connection and server faults for `LoopbackServer`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CutAnswer", "DropRequest", "Fault", "LoseAnswer", "OtherAnswer", "SlowAnswer"]


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
