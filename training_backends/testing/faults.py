"""What can go wrong between a client and a server, as scripts for `LoopbackServer`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CutAnswer", "DropRequest", "Fault", "LoseAnswer", "OtherAnswer", "SlowAnswer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Base of all faults.

    Attributes:
        done: Whether the server does what it was asked to before the fault shows.
    """

    done: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseAnswer(Fault):
    """The connection is cut after the request was carried out, before any answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRequest(Fault):
    """The connection is cut after the request was read; nothing was carried out."""

    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CutAnswer(Fault):
    """The answer is announced in full and ends early."""

    after: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowAnswer(Fault):
    """The answer comes one byte at a time.

    Attributes:
        pause: Seconds between two bytes.
    """

    pause: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherAnswer(Fault):
    """Something else is answered: an error, a web page, half a JSON document.

    Attributes:
        body: Bytes, text, or what is to be written as JSON.
    """

    status: int = 500
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    done: bool = False

    def content(self) -> bytes:
        """Return the body as it goes over the wire."""
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()
