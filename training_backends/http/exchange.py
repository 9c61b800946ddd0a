"""Requests to one server: its pool, key or signature, rate limits, retries and errors."""

import hashlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import timedelta
from typing import Final, TypeVar
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
import httpx
from pydantic import SecretStr

from training_backends.core.errors import (
    AuthenticationFailed,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
)
from training_backends.core.logging import REDACTED, get_logger, redact, register_secret
from training_backends.core.tracing import Span, span, trace_headers
from training_backends.http.answer import (
    LARGEST_BODY,
    Answer,
    is_too_deep,
    read_capped,
    request_line,
)
from training_backends.http.auth import KeyHeader, KeySource, Signer, UnsignedRequest, read_key
from training_backends.http.call import Call
from training_backends.http.error_table import ErrorDecoder, ErrorTable
from training_backends.http.errors import error_from_transport
from training_backends.http.limits import Limiter, limiter_of
from training_backends.http.policy import HttpPolicy, make_pool, timeouts
from training_backends.http.retry import read_date_ahead
from training_backends.http.urls import path_template, require_private_transport

__all__ = ["SUCCESS", "HttpExchange", "Query", "merged"]

Query = Sequence[tuple[str, str]]
"""Query parameters; a key may occur several times."""

_Parameters = list[tuple[str, str | int | float | bool | None]]

SUCCESS: Final[Container[int]] = range(200, 300)
"""The statuses that are no errors, unless a call expects others."""

_T = TypeVar("_T")

_LARGEST_ERROR: Final = 64 * 2**10
"""Maximum bytes of an error response; all of it is searched for secrets."""


def merged(*headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return headers under lower-case names; later ones replace earlier ones."""
    return {name.lower(): value for each in headers if each for name, value in each.items()}


class HttpExchange:
    """The part of `HttpClient` that sends a request and receives its response.

    Args:
        base_url: As returned by `normalize_base_url`.
        key: None sends no key.
        key_header: The header that carries the key.
        sign: Adds headers to each request, instead of a key.
        account: Whose rate limits these are, if requests are signed.
        headers: Sent with every request to this server.
        query: Sent with every request to this server, unless a call sets the same parameter.
        decode_error: Converts error responses to exceptions; by default an `ErrorTable`.
        transport: Replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: KeySource | None = None,
        key_header: KeyHeader = KeyHeader(),  # noqa: B008  # it is frozen
        sign: Signer | None = None,
        account: str = "",
        headers: Mapping[str, str] | None = None,
        query: Query = (),
        decode_error: ErrorDecoder | None = None,
        policy: HttpPolicy | None = None,
        backend: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if key is not None and sign is not None:
            raise ValueError("pass either a key or a signer")
        if key is not None or sign is not None:
            require_private_transport(base_url, backend=backend)
        self.base_url: str = base_url
        self.clock_offset: timedelta | None = None
        """How far the server's clock was ahead at the last response; None if unknown."""
        self._key = key
        self._key_header = key_header
        self._sign = sign
        self._account = account
        self._headers = dict(headers or {})
        self._query = tuple(query)
        self._decode_error = decode_error or ErrorTable(backend=backend)
        self._policy = policy or HttpPolicy()
        self._backend = backend
        self._transport = transport
        self._secret: SecretStr | None = None
        self._hidden: tuple[str, ...] = ()
        """Secrets of the URL that this client was made for."""
        self._limiter: Limiter | None = None
        self._client: httpx.AsyncClient | None = None
        self._opening = anyio.Lock()
        self._log = get_logger()

    async def aclose(self) -> None:
        """Close all connections; safe to repeat."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _call(self, name: str, *, repeatable: bool, seconds: float | None = None) -> Call:
        return Call(
            name, self._policy, repeatable=repeatable, seconds=seconds, backend=self._backend
        )

    async def _execute(self, call: Call, attempt: Callable[[Call], Awaitable[_T]]) -> _T:
        with call.within_its_time():
            await self._current_limiter()
            async for turn in call.attempts():
                with turn:
                    call.begin()
                    try:
                        with self._span(call) as call.span:
                            return await self._with_current_key(attempt, call)
                    except TrainingBackendError as error:
                        call.failed(error)
                        raise
        raise AssertionError("attempts end with a response or an error")

    def _span(self, call: Call) -> AbstractContextManager[Span]:
        method, _, path = call.name.partition(" ")
        route = path_template(path)
        server = httpx.URL(self.base_url)
        attributes = {
            "http.request.method": method,
            "url.template": route,
            "server.address": server.raw_host.decode(),
            "server.port": server.port,
        }
        return span(f"{method} {route}", outgoing=True, **attributes)

    async def _current_limiter(self) -> Limiter:
        if self._limiter is None:
            if self._key is not None:
                self._secret = await read_key(self._key, self._backend)
            account = SecretStr(self._account) if self._account else None
            self._limiter = limiter_of(self.base_url, self._secret or account)
        return self._limiter

    async def _with_current_key(self, attempt: Callable[[Call], Awaitable[_T]], call: Call) -> _T:
        """Make one attempt; after a 401, repeat it if the key has changed."""
        used = self._secret
        try:
            return await attempt(call)
        except AuthenticationFailed:
            if self._key is None:
                raise
            self._limiter = None
            await self._current_limiter()
            if self._secret == used:
                raise
        call.begin()
        return await attempt(call)

    async def _request(
        self,
        method: str,
        path: str,
        call: Call,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        sha256: str | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> httpx.Request:
        """Build a request with the key, or sign it.

        Args:
            sha256: Digest of a streamed body, if known.
        """
        place, parameters = self._place(path, query)
        client = await self._opened()
        try:
            own = {}
            if self._secret is not None:
                own[self._key_header.name] = self._key_header.value(self._secret)
            request = client.build_request(
                method,
                self.base_url + place,
                params=parameters,
                headers=merged(self._headers, trace_headers(), headers, own),
                content=content,
                timeout=timeouts(self._policy, read_timeout, write_timeout),
                extensions={"trace": call.trace},
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise error_from_transport(
                error, call=call.name, sent=False, backend=self._backend
            ) from None
        call.hidden = self._hidden
        if self._sign is not None:
            if content is None or isinstance(content, bytes):
                sha256 = hashlib.sha256(content or b"").hexdigest()
            unsigned = UnsignedRequest(
                method=method, url=str(request.url), headers=dict(request.headers), sha256=sha256
            )
            signed = await self._sign(unsigned)
            request.headers.update(signed)
            call.hidden = tuple(signed.values())
        return request

    def _place(self, path: str, query: Query) -> tuple[str, _Parameters | None]:
        """Return a path and its query parameters; None: those in the path, exactly as written.

        Raises:
            ValueError: The path is relative: appended to the base URL, it could name another host.
        """
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is no path: it must start with /")
        place, _, own = path.partition("?")
        given = [*parse_qsl(own, keep_blank_values=True), *query]
        named = {name for name, _ in given}
        fixed = [each for each in self._query if each[0] not in named]
        return (place, [*fixed, *given]) if fixed or query else (path, None)

    async def _opened(self) -> httpx.AsyncClient:
        async with self._opening:
            if self._client is None:
                # In a thread: reads certificates and package metadata from disk.
                self._client = await anyio.to_thread.run_sync(
                    make_pool, self.base_url, self._policy, self._transport
                )
            return self._client

    @asynccontextmanager
    async def _answer(
        self,
        request: httpx.Request,
        call: Call,
        secrets: Sequence[SecretStr] = (),
        expect: Container[int] = SUCCESS,
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send a request; yield the response, or raise an exception for an unexpected status."""
        client = await self._opened()
        limiter = await self._current_limiter()
        await call.admitted(limiter)
        began = time.monotonic()
        try:
            response = await client.send(request, stream=True)
            call.answered(response.status_code, response.headers, limiter)
            call.span.set(**{"http.response.status_code": response.status_code})
            self.clock_offset = read_date_ahead(response.headers.get("date"))
            self._log.debug(
                "http.answered",
                call=request_line(request),
                status=response.status_code,
                seconds=round(time.monotonic() - began, 3),
                **call.identity,
            )
            try:
                if response.status_code in expect:
                    yield response
                    return
                body = await read_capped(response, _LARGEST_ERROR)
            finally:
                await response.aclose()
        except (httpx.HTTPError, UnicodeError) as error:
            raise error_from_transport(
                error, call=request_line(request), sent=call.sent, backend=self._backend
            ) from error
        said = self._without_secrets(body, secrets, call.hidden)
        raise self._refusal(response, said, call.retry_after)

    def _refusal(
        self, response: httpx.Response, body: bytes, retry_after: float | None
    ) -> TrainingBackendError:
        if response.is_redirect:
            # Without the query, which may be a signature.
            location = response.headers.get("location", "an unknown location")[:2000]
            target = location.partition("?")[0]
            return ProtocolError(
                f"{request_line(response.request)}: the server redirects to {redact(target)}.",
                hint="Redirects are not followed, to protect the key; use that base URL instead.",
                backend=self._backend,
            )
        said = b"" if is_too_deep(body) else body
        error = self._decode_error(response.status_code, response.headers, said)
        if isinstance(error, RateLimited):
            error.retry_after = retry_after
        return error

    async def _whole(self, response: httpx.Response) -> Answer:
        call = request_line(response.request)
        body = await read_capped(response, LARGEST_BODY)
        if len(body) > LARGEST_BODY:
            raise ProtocolError(
                f"{call}: the response is larger than {LARGEST_BODY >> 20} MiB.",
                backend=self._backend,
            )
        if self._secret is not None:
            # Others may have displaced it, and the caller may quote the body.
            register_secret(self._secret)
        return Answer(
            status=response.status_code,
            headers=response.headers,
            body=body,
            request=call,
            backend=self._backend,
        )

    def _without_secrets(
        self, body: bytes, secrets: Sequence[SecretStr], hidden: Sequence[str]
    ) -> bytes:
        """Remove secrets that a server repeats in its response."""
        for each in hidden:
            body = body.replace(each.encode(), REDACTED.encode())
        for secret in (self._secret, *secrets):
            if secret is not None and secret.get_secret_value():
                register_secret(secret)
                body = body.replace(secret.get_secret_value().encode(), REDACTED.encode())
        return redact(body.decode("utf-8", "replace")).encode()
