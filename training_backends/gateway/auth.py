"""Middleware for every request: request id, authentication, body limits and JSON errors."""

import json
import re
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from functools import partial
from typing import Any
from uuid import uuid4

import anyio
import structlog
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_backends.core.logging import get_logger, redact
from training_backends.gateway.errors import OPENAI_PREFIX, HTTPProblem, failure_answer, wire_error
from training_backends.gateway.keys import KeyStore, Principal, unauthorized
from training_backends.gateway.settings import GatewaySettings
from training_backends.store.version import StoreVersion

__all__ = ["Guard"]

log = get_logger()

_NEEDS_NO_KEY = "/health"
_LINKS = "/files/"
"""Signed URLs, which authenticate themselves."""
_UPLOADS = re.compile(rf"/v1/files|{OPENAI_PREFIX}/files|{OPENAI_PREFIX}/uploads/[^/]+/parts")
"""Paths whose bodies are as large as a file."""
_LONGEST_PATH = 300
"""Characters of a path to log."""
_SHUTTING_DOWN = "The gateway is shutting down; retry the request later."
_READS = frozenset({"GET", "HEAD"})


class Guard:
    """ASGI middleware around the whole application.

    Authenticates before reading the body and sets `request.state.caller`. Uploads can take long,
    so their key is checked again at the end of the body.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyStore, versions: StoreVersion, settings: GatewaySettings
    ) -> None:
        self._app = app
        self._keys = keys
        self._versions = versions
        self._max_bytes = settings.max_request_bytes
        self._timeout = settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, str(uuid4()), scope["path"])
        scope.setdefault("state", {})["request_id"] = answer.request_id
        began = time.perf_counter()
        path = scope["path"]
        if len(path) > _LONGEST_PATH:
            # Redact before truncating, or part of a secret could remain.
            path = redact(path[: 10 * _LONGEST_PATH])[:_LONGEST_PATH]
        with structlog.contextvars.bound_contextvars(request_id=answer.request_id):
            try:
                await self._serve(scope, receive, answer)
            except anyio.get_cancelled_exc_class():
                # Shutdown timed out. Re-raising would make uvicorn answer 500 and log a traceback.
                log.info("request cancelled by shutdown", method=scope["method"], path=path)
                if answer.status is not None:
                    raise
                await answer.json(503, {"detail": _SHUTTING_DOWN}, {"connection": "close"})
            except ClientDisconnect:
                log.info("client disconnected", method=scope["method"], path=path)
            except Exception as error:
                log.exception("request failed", method=scope["method"], path=path)
                if answer.status is not None:
                    raise
                await answer.json(*failure_answer(error, answer.request_id))
            seconds = round(time.perf_counter() - began, 4)
            log.info(
                "request",
                method=scope["method"],
                path=path,
                status=answer.status,
                seconds=seconds,
            )

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        path = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        admit = partial(self._admit, scope["method"], headers.get(b"authorization", b""))
        if path != _NEEDS_NO_KEY and not path.startswith(_LINKS):
            version = None
            if scope["method"] in _READS:
                version = scope["state"]["version"] = await self._versions.current()
            try:
                scope["state"]["caller"] = await admit(version)
            except HTTPProblem as refusal:
                await answer.json(refusal.status, refusal.body, refusal.headers)
                return
        if _UPLOADS.fullmatch(path):
            receive = _Confirmed(receive, admit)
        elif _length(headers) > self._max_bytes:
            await answer.json(413, {"detail": _too_large(self._max_bytes)})
            return
        else:
            receive = _Bounded(receive, self._max_bytes, self._timeout)
        await self._app(scope, receive, answer)

    async def _admit(
        self, method: str, authorization: bytes, version: Hashable = None
    ) -> Principal:
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise unauthorized()
        if version is not None and (known := self._keys.recall(key.strip(), version)):
            return known
        writes = method not in _READS
        check = partial(self._keys.admit, key.strip(), writes=writes, version=version)
        return await to_thread.run_sync(check)


def _too_large(limit: int) -> str:
    return f"Request body too large; the limit is {limit} bytes."


class _Confirmed:
    """Passes a request's body through and checks the key again before the last chunk."""

    def __init__(self, receive: Receive, admit: Callable[[], Awaitable[Principal]]) -> None:
        self._receive = receive
        self._admit = admit

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            await self._admit()
        return message


class _Bounded:
    """Passes a request's body through, bounded in size and time.

    Raises `HTTPException`, which FastAPI does not wrap while it reads a body.
    """

    def __init__(self, receive: Receive, limit: int, patience: float) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = patience
        self._deadline: float | None = None
        self._size = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to disconnect, without a limit
        now = anyio.current_time()
        if self._deadline is None:
            self._deadline = now + self._timeout
        try:
            with anyio.fail_after(self._deadline - now):
                message = await self._receive()
        except TimeoutError:
            sentence = f"Timed out: the request body did not arrive within {self._timeout:g} s."
            raise HTTPException(408, sentence, {"connection": "close"}) from None
        self._complete = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise HTTPException(413, _too_large(self._limit))
        return message


class _Answer:
    """Sends the response and adds the request id header."""

    def __init__(self, send: Send, request_id: str, path: str) -> None:
        self._send = send
        self._path = path
        self.request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), own]}
        await self._send(message)

    async def json(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a complete error."""
        status, body = wire_error(self._path, status, body)
        content = json.dumps(body).encode()
        fields = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            **(headers or {}),
        }
        await self(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            }
        )
        await self({"type": "http.response.body", "body": content})


def _length(headers: Mapping[bytes, bytes]) -> int:
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
