"""Answers to reads, used again while nothing in the store has changed."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_backends.gateway.errors import OPENAI_PREFIX

__all__ = ["ReadCache"]

_CACHED: Final = tuple(
    f"{prefix}/{name}"
    for prefix in ("/v1", OPENAI_PREFIX)
    for name in ("fine_tuning/jobs", "models", "files")
)
"""What is computed from the store, for the project of the caller."""
_LONGEST_AGE: Final = 1.0
"""Seconds; what also depends on the time, such as the end of a file, is that old at most."""
_LARGEST: Final = 64 * 1024
"""Bytes of an answer."""
_MOST: Final = 1024
"""Answers that are kept."""


@dataclass(slots=True)
class _Kept:
    """An answer, or one that is being computed.

    Attributes:
        version: That of the store before it was computed.
        route: What the framework found for the path, to count requests by.
        done: Set when it is there, or cannot be kept.
    """

    version: Hashable
    since: float
    done: anyio.Event = field(default_factory=anyio.Event)
    start: Message | None = None
    body: Message | None = None
    route: Any = None


class ReadCache:
    """ASGI middleware behind the authentication, which has set `caller` and `version`.

    An answer is used again only if the store has the version that it had before the answer was
    computed, so a client reads its own writes and those of other gateways. Equal requests that
    arrive while an answer is computed wait for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        state = scope.get("state", {})
        version, caller = state.get("version"), state.get("caller")
        if version is None or caller is None or not scope["path"].startswith(_CACHED):
            await self._app(scope, receive, send)
            return
        asked = (scope["path"], scope["query_string"])
        key = (caller.key_id, caller.project, caller.admin, *asked)
        known = self._fresh(key, version)
        if known is not None:
            if not known.done.is_set():
                await known.done.wait()
            if known.start is not None and known.body is not None:
                scope["route"] = known.route
                await send(known.start)
                await send(known.body)
                return
        await self._computed(key, version, scope, receive, send)

    def _fresh(self, key: Hashable, version: Hashable) -> _Kept | None:
        known = self._kept.get(key)
        if known is None or known.version != version:
            return None
        if anyio.current_time() - known.since > _LONGEST_AGE:
            return None
        self._kept.move_to_end(key)
        return known

    async def _computed(
        self, key: Hashable, version: Hashable, scope: Scope, receive: Receive, send: Send
    ) -> None:
        entry = self._kept[key] = _Kept(version, anyio.current_time())
        while len(self._kept) > _MOST:
            self._kept.popitem(last=False)

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.start = message if _is_kept(message) else None
            elif entry.body is None and not message.get("more_body", False):
                entry.body = message if len(message.get("body", b"")) <= _LARGEST else None
            else:  # sent in parts
                entry.start = None
            if entry.start is None:
                entry.done.set()  # no request waits for what is not kept, such as a download
            await send(message)

        try:
            await self._app(scope, receive, keep)
            entry.route = scope.get("route")
        except BaseException:
            entry.start = None
            raise
        finally:
            if entry.start is None or entry.body is None:
                entry.start = None
                if self._kept.get(key) is entry:
                    del self._kept[key]
            entry.done.set()


def _is_kept(start: Message) -> bool:
    return start["status"] == 200 and any(
        name.lower() == b"content-type" and value == b"application/json"
        for name, value in start.get("headers", ())
    )
