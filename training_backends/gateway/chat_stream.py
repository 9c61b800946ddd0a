"""Rewrite a streamed answer of an inference server for the client.

A model may send hundreds of chunks a second on each of many streams, so a chunk is not parsed where
replacing some bytes is enough.
"""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Final

from training_backends.core.errors import ProtocolError

__all__ = ["rewritten"]

_DONE: Final = b"[DONE]"
_LONGEST_EVENT: Final = 2**22
_START: Final = b"data: {"
_CHOICE: Final = b'"choices":[{'
_SPACED: Final = b'"choices": [{'

Adapt = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Returns the chunks to send for one of the server's."""


async def rewritten(
    pieces: AsyncIterator[bytes], *, model: str, adapt: Adapt, usage: bytes | None
) -> AsyncGenerator[bytes, None]:
    """Yield the events to send for what a server sends, as they arrive; without an end mark.

    Args:
        model: Name of the model as the client knows it.
        adapt: What the client's protocol requires of a chunk, see `usage`.
        usage: Field that the protocol requires in each chunk without a usage; None: none.

    Raises:
        ProtocolError: The server sent something else than chunks, or an error.
    """
    rewrite = _Rewriter(model, adapt, usage)
    rest = b""
    async for piece in pieces:
        rest += piece
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *complete, rest = rest.split(b"\n\n")
        if len(rest) > _LONGEST_EVENT:
            raise ProtocolError(f"An event of the stream is larger than {_LONGEST_EVENT} bytes.")
        out: list[bytes] = []
        for event in complete:
            if event == b"data: [DONE]":
                if out:
                    yield b"".join(out)
                return
            out.extend(rewrite(event))
        if out:
            yield b"".join(out)


class _Rewriter:
    """Rewrites events: by their bytes if they are like the first, which is parsed."""

    def __init__(self, model: str, adapt: Adapt, usage: bytes | None) -> None:
        self._model = model
        self._adapt = adapt
        self._usage = usage
        self._begin = _START if usage is None else _START + usage
        self._created = int(time.time())
        self._old = b""
        self._new = b""

    def __call__(self, event: bytes) -> Iterator[bytes]:
        if (quick := self._quick(event)) is not None:
            yield quick
            return
        data = b"\n".join(
            line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if not data or data == _DONE:
            return  # a comment
        chunk = self._parsed(data)
        self._learn(event, chunk)
        for choice in chunk["choices"]:
            choice.setdefault("finish_reason", None)
        whole = {"created": self._created, **chunk, "model": self._model}
        for each in self._adapt(whole):
            text = json.dumps(each, ensure_ascii=False, separators=(",", ":"))
            yield f"data: {text}\n\n".encode()

    def _quick(self, event: bytes) -> bytes | None:
        """Return the event with other bytes; None if it has to be parsed."""
        if (
            not self._old
            or not event.startswith(_START)
            or b"\n" in event
            or event.count(self._old) != 1
            or event.count(b'"delta"') != 1
            or b'"usage"' in event
            or b'"created"' not in event
        ):
            return None
        if b'"finish_reason"' not in event:
            choice = _CHOICE if _CHOICE in event else _SPACED
            if event.count(choice) != 1:
                return None
            event = event.replace(choice, choice + b'"finish_reason":null,')
        event = event.replace(self._old, self._new)
        return b"%b%b\n\n" % (self._begin, event[len(_START) :])

    def _learn(self, event: bytes, chunk: dict[str, Any]) -> None:
        """Find the bytes that name the model, which no text can contain unescaped."""
        name = chunk.get("model")
        if not isinstance(name, str):
            return
        for separator in (":", ": "):
            old = f'"model"{separator}{json.dumps(name)}'.encode()
            if event.count(old) == 1:
                self._old = old
                self._new = f'"model":{json.dumps(self._model)}'.encode()

    @staticmethod
    def _parsed(data: bytes) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
            text = data[:500].decode("utf-8", "replace")
            raise ProtocolError(f"The inference server sent: {text}")
        return dict(chunk)
