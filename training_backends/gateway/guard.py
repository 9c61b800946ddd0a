"""What holds for every request: an id, a key, a bounded body, an answer in JSON."""

import json
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import anyio
import structlog
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_backends.core.logs import get_logger
from training_backends.gateway.keys import KeyStore

__all__ = ["MAX_JSON_BYTES", "Guard"]

log = get_logger()

MAX_JSON_BYTES = 2**20
"""Largest body of a request that is no upload."""
_PATIENCE = 60.0
"""Seconds of silence before such a body is given up."""
_PROTECTED = "/v1/"
_UPLOADS = "/v1/files"


class Guard:
    """ASGI middleware around the whole application.

    It looks at the key before a byte of the body is read, and puts the id of the caller's
    key into `request.state.caller`.
    """

    def __init__(self, app: ASGIApp, keys: KeyStore) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, str(uuid4()))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        began = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=answer.request_id):
            try:
                await self._serve(scope, receive, answer)
            except ClientDisconnect:
                log.info("client left", method=scope["method"], path=scope["path"])
            except Exception:
                log.exception("request failed", method=scope["method"], path=scope["path"])
                if answer.status is not None:
                    raise
                await answer.json(
                    500,
                    {"message": "Internal server error", "request_id": answer.request_id},
                )
            seconds = round(time.perf_counter() - began, 4)
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=answer.status,
                seconds=seconds,
            )

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        path = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        if path.startswith(_PROTECTED):
            caller = await self._caller(headers.get(b"authorization", b""))
            if caller is None:
                challenge = {"www-authenticate": "Bearer"}
                await answer.json(401, {"detail": "Unauthorized"}, challenge)
                return
            scope["state"]["caller"] = caller
        if path != _UPLOADS:
            if _length(headers) > MAX_JSON_BYTES:
                await answer.json(413, {"detail": _TOO_LARGE})
                return
            receive = _Bounded(receive)
        await self._app(scope, receive, answer)

    async def _caller(self, authorization: bytes) -> str | None:
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return None
        return await to_thread.run_sync(self._keys.identify, key.strip())


_TOO_LARGE = f"The request is too large; at most {MAX_JSON_BYTES} bytes are accepted."


class _Bounded:
    """Passes a request's body on up to a limit, and for as long as it keeps coming."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._size = 0
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()  # waits for the client to leave, however long
        try:
            with anyio.fail_after(_PATIENCE):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"Nothing arrived for {_PATIENCE:g} s.") from None
        self._whole = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > MAX_JSON_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message


class _Answer:
    """Sends an answer, with the request's id in a header."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
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
        """Send a whole answer."""
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
