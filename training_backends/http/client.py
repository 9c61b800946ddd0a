"""A pooled HTTP client with timeouts, safe retries and protection of the API key."""

import json
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

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
from training_backends.core.tracing import span
from training_backends.http.auth import KeyHeader, KeySource
from training_backends.http.call import Call, pacing
from training_backends.http.errors import error_from_transport
from training_backends.http.limits import Limiter, limiter_of
from training_backends.http.policy import HttpPolicy, make_pool, timeouts
from training_backends.http.retry import read_date_ahead
from training_backends.http.upload import FileUpload
from training_backends.http.urls import require_private_transport

__all__ = ["ErrorDecoder", "HttpClient", "KeySource", "Query"]

ErrorDecoder = Callable[[int, Mapping[str, str], bytes], TrainingBackendError]
"""Converts status, headers and body of an error response to an exception."""

Query = Sequence[tuple[str, str]]
"""Query parameters; a key may occur several times."""

_T = TypeVar("_T")

_LARGEST_JSON: Final = 64 * 2**20
_LARGEST_ERROR: Final = 64 * 2**10
"""Maximum bytes of an error response; all of it is searched for secrets."""
_DEEPEST_JSON: Final = 64
"""Maximum nesting of a response; far more would raise RecursionError, now or when serialized."""
_PIECE: Final = 2**18
"""Bytes to decompress at a time."""


class HttpClient:
    """A client for one server with one key and one connection pool.

    Safe requests are retried when the server is unavailable or busy. Others are not once they
    may have arrived, which `BackendUnavailable.sent` reports. All clients of a process with the
    same key and server share its rate limits. Redirects are never followed, so the key is sent to
    no other host.

    Args:
        base_url: As returned by `normalize_base_url`.
        key: None sends no key.
        key_header: The header that carries the key.
        query: Sent with every request, unless a call sets the same parameter.
        transport: Replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: KeySource | None,
        key_header: KeyHeader = KeyHeader(),  # noqa: B008  # it is frozen
        query: Query = (),
        decode_error: ErrorDecoder,
        policy: HttpPolicy | None = None,
        backend: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if key is not None:
            require_private_transport(base_url, backend=backend)
        self.base_url = base_url
        self.clock_offset: timedelta | None = None
        """How far the server's clock was ahead at the last response; None if unknown."""
        self._key = key
        self._key_header = key_header
        self._query = tuple(query)
        self._decode_error = decode_error
        self._policy = policy or HttpPolicy()
        self._backend = backend
        self._transport = transport
        self._secret: SecretStr | None = None
        self._limiter: Limiter | None = None
        self._client: httpx.AsyncClient | None = None
        self._opening = anyio.Lock()
        self._log = get_logger()

    async def aclose(self) -> None:
        """Close all connections; safe to repeat."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def json(
        self,
        method: str,
        path: str,
        *,
        query: Query = (),
        body: Any = None,
        repeatable: bool | None = None,
        secrets: Sequence[SecretStr] = (),
    ) -> dict[str, Any]:
        """Send a request and return the JSON object of the response.

        Args:
            repeatable: Whether the request is safe to repeat; None: only GET.
            secrets: Secrets in the body, which errors must not show.

        Raises:
            BackendUnavailable: No usable response in time; `sent` tells if it may have arrived.
            RateLimited: The server requires a longer pause than the call may take.
            ProtocolError: The response is not a JSON object.
            TrainingBackendError: The result of `decode_error` for an error response.
        """
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}

        async def attempt(call: Call) -> dict[str, Any]:
            request = await self._request(
                method, path, call, query=query, headers=headers, content=content
            )
            async with self._answer(request, call, secrets) as response:
                return await self._object(response, _request_line(request), secrets)

        repeat = method == "GET" if repeatable is None else repeatable
        call = self._call(f"{method} {path}", repeatable=repeat, seconds=self._policy.call_timeout)
        return await self._execute(call, attempt)

    async def upload(
        self, path: str, upload: FileUpload, *, repeatable: bool = False
    ) -> dict[str, Any]:
        """POST a file and return the JSON object of the response.

        Args:
            repeatable: Whether the server deduplicates files by name and content. If so, a
                failed attempt is repeated from the start; otherwise only if the request cannot
                have arrived.

        Raises:
            DatasetError: The file cannot be read, or changed during the upload.
        """

        async def attempt(call: Call) -> dict[str, Any]:
            headers = await upload.headers()
            length = int(headers["Content-Length"])
            with pacing(self._policy.call_timeout, call.late) as pace:
                async with (
                    aclosing(upload.stream(length)) as stream,
                    aclosing(pace.over(stream, then=self._policy.upload_timeout)) as body,
                ):
                    request = await self._request(
                        "POST",
                        path,
                        call,
                        headers=headers,
                        content=body,
                        read_timeout=self._policy.upload_timeout,
                        write_timeout=max(self._policy.write_timeout, self._policy.call_timeout),
                    )
                    async with self._answer(request, call) as response:
                        return await self._object(response, _request_line(request))

        return await self._execute(self._call(f"POST {path}", repeatable=repeatable), attempt)

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
                        with span(call.name, outgoing=True, **{"server.address": self.base_url}):
                            return await self._with_current_key(attempt, call)
                    except TrainingBackendError as error:
                        call.failed(error)
                        raise
        raise AssertionError("attempts end with a response or an error")

    async def _current_limiter(self) -> Limiter:
        if self._limiter is None:
            if self._key is not None:
                self._secret = await self._read_key(self._key)
            self._limiter = limiter_of(self.base_url, self._secret)
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
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> httpx.Request:
        sent_headers = dict(headers or {})
        if self._secret is not None:
            sent_headers[self._key_header.name] = self._key_header.value(self._secret)
        named = {name for name, _ in query}
        parameters: list[tuple[str, str | int | float | bool | None]]
        parameters = [*(each for each in self._query if each[0] not in named), *query]
        client = await self._opened()
        try:
            return client.build_request(
                method,
                self.base_url + path,
                params=parameters or None,
                headers=sent_headers,
                content=content,
                timeout=timeouts(self._policy, read_timeout, write_timeout),
                extensions={"trace": call.trace},
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise error_from_transport(
                error, call=call.name, sent=False, backend=self._backend
            ) from None

    async def _read_key(self, source: KeySource) -> SecretStr:
        """Read the key; reject one that is invalid in a header without quoting it."""
        key = (await source()).get_secret_value().strip()
        if key and key.isascii() and key.isprintable() and " " not in key:
            register_secret(key)
            return SecretStr(key)
        raise AuthenticationFailed(
            "The stored API key is invalid: it is empty or contains unsupported characters.",
            hint="Store the key again, without other text.",
            backend=self._backend,
        )

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
        self, request: httpx.Request, call: Call, secrets: Sequence[SecretStr] = ()
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send a request; yield the response, or raise an exception for an error response."""
        client = await self._opened()
        limiter = await self._current_limiter()
        await call.admitted(limiter)
        began = time.monotonic()
        try:
            response = await client.send(request, stream=True)
            call.answered(response.status_code, response.headers, limiter)
            self.clock_offset = read_date_ahead(response.headers.get("date"))
            self._log.debug(
                "http.answered",
                call=_request_line(request),
                status=response.status_code,
                seconds=round(time.monotonic() - began, 3),
                **call.identity,
            )
            try:
                if response.is_success:
                    yield response
                    return
                body = await _read_capped(response, _LARGEST_ERROR)
            finally:
                await response.aclose()
        except (httpx.HTTPError, UnicodeError) as error:
            raise error_from_transport(
                error, call=_request_line(request), sent=call.sent, backend=self._backend
            ) from error
        raise self._refusal(response, self._without_secrets(body, secrets), call.retry_after)

    def _refusal(
        self, response: httpx.Response, body: bytes, retry_after: float | None
    ) -> TrainingBackendError:
        if response.is_redirect:
            target = response.headers.get("location", "an unknown location")[:2000]
            return ProtocolError(
                f"{_request_line(response.request)}: the server redirects to {redact(target)}.",
                hint="Redirects are not followed, to protect the key; use that base URL instead.",
                backend=self._backend,
            )
        said = b"" if _is_too_deep(body) else body
        error = self._decode_error(response.status_code, response.headers, said)
        if isinstance(error, RateLimited):
            error.retry_after = retry_after
        return error

    async def _object(
        self, response: httpx.Response, call: str, secrets: Sequence[SecretStr] = ()
    ) -> dict[str, Any]:
        body = await _read_capped(response)
        if len(body) > _LARGEST_JSON:
            raise ProtocolError(
                f"{call}: the response is larger than {_LARGEST_JSON >> 20} MiB.",
                backend=self._backend,
            )
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict) and not _is_deep(document):
            return document
        found = response.headers.get("content-type", "no content type")
        raise ProtocolError(
            f"{call}: the response is not a JSON object of at most {_DEEPEST_JSON} levels "
            f"({response.status_code}, {found[:200]}).",
            # Scrub before truncating, or part of a secret could remain at the end.
            excerpt=self._without_secrets(body[:_LARGEST_ERROR], secrets)[:2000].decode(
                "utf-8", "replace"
            ),
            hint="Check that the base URL is that of an API, not of a web page or proxy.",
            backend=self._backend,
        )

    def _without_secrets(self, body: bytes, secrets: Sequence[SecretStr]) -> bytes:
        """Remove secrets that a server repeats in its response."""
        for secret in (self._secret, *secrets):
            if secret is not None and secret.get_secret_value():
                register_secret(secret)
                body = body.replace(secret.get_secret_value().encode(), REDACTED.encode())
        return redact(body.decode("utf-8", "replace")).encode()


def _request_line(request: httpx.Request) -> str:
    return f"{request.method} {request.url.copy_with(query=None)}"


async def _read_capped(response: httpx.Response, most: int = _LARGEST_JSON) -> bytes:
    """Read a body, at most `most` + 1 bytes."""
    body = bytearray()
    async with aclosing(_decoded(response)) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > most:
                break
    return bytes(body[: most + 1])


async def _decoded(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield a body in small pieces, decompressed at most once.

    httpx decodes every layer of encoding, each piece at once: a few kilobytes, compressed twice,
    could expand to gigabytes.

    Raises:
        ProtocolError: The encoding is not gzip, or the data is corrupt.
    """
    call = _request_line(response.request)
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding in {"", "identity"}:
        async for piece in response.aiter_raw():
            yield piece
        return
    if coding not in {"gzip", "x-gzip"}:
        raise ProtocolError(
            f"{call}: unsupported content encoding in the response ({coding[:100]})."
        )
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        async for piece in response.aiter_raw():
            rest, unpacked = piece, b""
            while rest or len(unpacked) == _PIECE:
                unpacked = unpacker.decompress(rest, _PIECE)
                rest = unpacker.unconsumed_tail
                yield unpacked
    except zlib.error:
        raise ProtocolError(f"{call}: the compressed response is corrupt.") from None
    if not unpacker.eof and response.num_bytes_downloaded:
        raise ProtocolError(f"{call}: the compressed response is truncated.")


def _is_too_deep(body: bytes) -> bool:
    try:
        return _is_deep(json.loads(body))
    except RecursionError:
        return True
    except ValueError:
        return False


def _is_deep(document: Any) -> bool:
    level = [document]
    for _ in range(_DEEPEST_JSON):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [each for nodes in inner for each in nodes if isinstance(each, dict | list)]
        if not level:
            return False
    return True
