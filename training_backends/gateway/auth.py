"""Middleware for every request: request id, authentication, body limits and JSON errors."""

import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import anyio
import structlog
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_backends.core.errors import StoreError
from training_backends.core.logging import get_logger, json_log, redact
from training_backends.core.tracing import Span, server_span
from training_backends.gateway.console_sessions import ConsoleSessions
from training_backends.gateway.errors import (
    OPENAI_PREFIX,
    HTTPProblem,
    failure_answer,
    plain,
    wire_error,
)
from training_backends.gateway.keys import KeyStore, Principal, unauthorized
from training_backends.gateway.metrics import GatewayMetrics
from training_backends.gateway.projects import RateLimiter
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore
from training_backends.store.version import StoreVersion

__all__ = ["METRICS", "Guard"]

log = get_logger()

METRICS = "/metrics"
_NEEDS_NO_KEY = frozenset({"/health", "/healthz", "/readyz", "/", "/console/session"})
"""`/console/session` signs in, and answers who has signed in."""
_LINKS = "/files/"
"""Signed URLs, which authenticate themselves."""
_ASSETS = "/console/assets/"
_CHATS = "/chat/completions"
"""End of the routes that change nothing, although they are POST requests."""
_UPLOADS = re.compile(
    rf"/v1/files|/console/files|{OPENAI_PREFIX}/files|{OPENAI_PREFIX}/uploads/[^/]+/parts"
)
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
        self,
        app: ASGIApp,
        *,
        keys: KeyStore,
        sessions: ConsoleSessions,
        store: GatewayStore,
        versions: StoreVersion,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions
        self._store = store
        self._versions = versions
        self._metrics = metrics
        self._metrics_token = settings.metrics_token
        self._access_log = json_log() if settings.access_log else log
        self._rates = RateLimiter()
        self._max_bytes = settings.max_request_bytes
        self._timeout = settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, str(uuid4()), scope["path"])
        state = scope.setdefault("state", {})
        state.update(request_id=answer.request_id, address=_address(scope))
        began = time.perf_counter()
        path = scope["path"]
        if len(path) > _LONGEST_PATH:
            # Redact before truncating, or part of a secret could remain.
            path = redact(path[: 10 * _LONGEST_PATH])[:_LONGEST_PATH]
        headers = {name.lower(): value for name, value in scope["headers"]}
        with (
            structlog.contextvars.bound_contextvars(request_id=answer.request_id),
            server_span(headers) as span,
        ):
            try:
                await self._serve(scope, headers, receive, answer)
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
            await self._record_failure(scope, answer.status or 0)
            _describe(span, scope, answer.status)
            self._report(scope, answer, path, time.perf_counter() - began)

    async def _serve(
        self,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        answer: "_Answer",
    ) -> None:
        path = scope["path"]
        admit = partial(self._admit, path, scope["method"], headers)
        if path not in _NEEDS_NO_KEY and not path.startswith((_LINKS, _ASSETS)):
            version = None
            if scope["method"] in _READS:
                version = scope["state"]["version"] = await self._versions.current()
            try:
                caller = await admit(version)
                self._rates.check(caller)
                scope["state"]["caller"] = replace(
                    caller, address=scope["state"]["address"], request_id=answer.request_id
                )
            except HTTPProblem as refusal:
                await answer.json(refusal.status, refusal.body, refusal.headers)
                return
        receive = _Counted(receive, scope["state"])
        if _UPLOADS.fullmatch(path):
            receive = _Confirmed(receive, admit)
        elif _length(headers) > self._max_bytes:
            await answer.json(413, {"detail": _too_large(self._max_bytes)})
            return
        else:
            receive = _Bounded(receive, self._max_bytes, self._timeout)
        await self._app(scope, receive, answer)

    def _report(self, scope: Scope, answer: "_Answer", path: str, seconds: float) -> None:
        """Count a request and log it, without its query, which may hold a signature."""
        route, method, state = _route(scope), scope["method"], scope["state"]
        caller, received = state.get("caller"), state.get("received", 0)
        code = answer.status or 499
        self._metrics.count(method, route, code, seconds, received=received, sent=answer.size)
        self._access_log.info(
            "request",
            method=method,
            route=route,
            path=path,
            status=answer.status,
            seconds=round(seconds, 4),
            received=received,
            sent=answer.size,
            key_id=caller and caller.key_id,
            project=caller and caller.project,
            address=state["address"],
        )

    async def _record_failure(self, scope: Scope, status: int) -> None:
        """Record a rejected or failed change in the audit log, if the caller is known."""
        caller = scope["state"].get("caller")
        if status < 400 or caller is None or scope["method"] in _READS:
            return
        route = _route(scope)
        if route.endswith(_CHATS):
            return
        try:
            target, outcome = f"{scope['method']} {route}", str(status)
            await self._store.awrite(lambda c: caller.record(c, "request", target, outcome=outcome))
        except StoreError as error:
            log.error("failed request not in the audit log", reason=error.message)  # noqa: TRY400

    async def _admit(
        self,
        path: str,
        method: str,
        headers: Mapping[bytes, bytes],
        version: Hashable = None,
    ) -> Principal:
        authorization = headers.get(b"authorization", b"")
        caller = None if authorization else await self._sessions.admit_request(method, headers)
        if caller is None:
            scheme, _, key = authorization.decode("latin-1").partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                raise unauthorized()
            if path == METRICS and self._opens_metrics(key.strip()):
                return Principal("metrics", "")
            if version is not None:
                caller = self._keys.recall(key.strip(), version)
        if caller is None:
            writes = method not in _READS
            check = partial(self._keys.admit, key.strip(), writes=writes, version=version)
            caller = await to_thread.run_sync(check)
        if path == METRICS and not caller.admin:
            raise plain(403, "This needs an API key of scope admin, or gateway.metrics_token.")
        return caller

    def _opens_metrics(self, presented: str) -> bool:
        token = self._metrics_token
        return token is not None and hmac.compare_digest(
            token.get_secret_value().encode(), presented.encode("latin-1")
        )


def _too_large(limit: int) -> str:
    return f"Request body too large; the limit is {limit} bytes."


class _Counted:
    """Passes a request's body through and counts its bytes."""

    def __init__(self, receive: Receive, state: dict[str, Any]) -> None:
        self._receive = receive
        self._state = state

    async def __call__(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self._state["received"] = self._state.get("received", 0) + size
        return message


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
        self.size = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", ()), own]}
        self.size += len(message.get("body", b""))
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


def _describe(span: Span, scope: Scope, status: int | None) -> None:
    route, method = _route(scope), scope["method"]
    span.rename(f"{method} {route}")
    span.set(
        **{
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
        }
    )


def _route(scope: Scope) -> str:
    """Return the path of a request's route, with the names of its parameters."""
    path: str = getattr(scope.get("route"), "path", "unknown")
    return path


def _address(scope: Scope) -> str:
    """Return the client's address; behind a trusted proxy, the one that the proxy reports."""
    try:
        return str(ipaddress.ip_address(scope["client"][0]))
    except (KeyError, TypeError, ValueError):  # a UNIX socket, or nonsense from the proxy
        return ""


def _length(headers: Mapping[bytes, bytes]) -> int:
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
