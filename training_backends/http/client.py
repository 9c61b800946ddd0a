"""A pooled HTTP client with timeouts, safe retries and protection of the API key."""

import json
import math
from collections.abc import (
    AsyncGenerator,
    Container,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack, overload
from urllib.parse import unquote, unquote_plus, urlencode, urljoin, urlsplit

import anyio
import anyio.to_thread
import httpx
from pydantic import BaseModel, SecretStr

from training_backends.core.errors import (
    PermissionDenied,
    ProtocolError,
    RunNotFound,
)
from training_backends.core.logging import register_secret
from training_backends.http.answer import (
    Answer,
    Model,
    ServerEvent,
    Shape,
    decoded,
    lines_of,
    server_events,
)
from training_backends.http.call import Call, pacing
from training_backends.http.download import partial_file
from training_backends.http.error_table import ErrorTable
from training_backends.http.exchange import SUCCESS, HttpExchange, Query, merged
from training_backends.http.upload import CHUNK_BYTES, FileBody, FileUpload, Progress
from training_backends.http.urls import is_loopback, require_private_transport

__all__ = ["HttpClient", "JsonRequest", "OpenedUrl"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_FOUND: Final = frozenset({200})
_MOST_REDIRECTS: Final = 5
_SHORTEST_SIGNATURE: Final = 8


class OpenedUrl(NamedTuple):
    """The response of `HttpClient.open_url`.

    Attributes:
        pieces: The body, decompressed if it was compressed for the transfer.
    """

    status: int
    headers: Mapping[str, str]
    pieces: AsyncGenerator[bytes, None]


class JsonRequest(TypedDict, total=False):
    """Arguments of `HttpClient.json`, see `HttpClient.send`."""

    query: Query
    headers: Mapping[str, str] | None
    body: Any
    repeatable: bool | None
    secrets: Sequence[SecretStr]


class HttpClient(HttpExchange):
    """A client for one server with one key and one connection pool.

    Safe requests are retried when the server is unavailable or busy. Others are not once they
    may have arrived, which `BackendUnavailable.sent` reports. All clients of a process with the
    same key and server share its rate limits. The key is sent to no other host: redirects are
    errors, unless a call expects them or follows them without the key.

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

    # -- documents ---------------------------------------------------------------------

    @overload
    async def json(
        self,
        method: str,
        path: str,
        *,
        shape: Literal["object"] = "object",
        **request: Unpack[JsonRequest],
    ) -> dict[str, Any]: ...

    @overload
    async def json(
        self, method: str, path: str, *, shape: Literal["array"], **request: Unpack[JsonRequest]
    ) -> list[Any]: ...

    @overload
    async def json(
        self, method: str, path: str, *, shape: type[Model], **request: Unpack[JsonRequest]
    ) -> Model: ...

    @overload
    async def json(
        self, method: str, path: str, *, shape: Shape, **request: Unpack[JsonRequest]
    ) -> Any: ...

    async def json(
        self,
        method: str,
        path: str,
        *,
        shape: Shape | type[BaseModel] = "object",
        **request: Unpack[JsonRequest],
    ) -> Any:
        """Send a request and return the JSON document of the response.

        Args:
            shape: What the document must be, or a model to parse it, see `Answer.json`.
            request: See `send`.

        Raises:
            BackendUnavailable: No usable response in time; `sent` tells if it may have arrived.
            RateLimited: The server requires a longer pause than the call may take.
            ProtocolError: The response is not JSON of that shape.
            TrainingBackendError: The result of `decode_error` for an error response.
        """
        answer = await self.send(method, path, **request)
        return answer.json(shape)

    async def exists(self, path: str) -> bool:
        """Return whether a GET finds something, that is, does not raise `RunNotFound`."""
        try:
            await self.send("GET", path)
        except RunNotFound:
            return False
        return True

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        form: Mapping[str, str] | None = None,
        content: bytes | None = None,
        expect: Container[int] = SUCCESS,
        repeatable: bool | None = None,
        secrets: Sequence[SecretStr] = (),
    ) -> Answer:
        """Send a request and return the response as it is.

        Args:
            body: To be sent as JSON.
            form: To be sent URL-encoded, instead of `body`.
            content: To be sent as it is, instead of `body`; set its Content-Type in `headers`.
            expect: Statuses to return, for example `{302, 409}`; all others are errors. A
                redirect that is expected is returned, not followed.
            repeatable: Whether the request is safe to repeat; None: only GET.
            secrets: Secrets in the request, which errors must not show.

        Raises:
            TrainingBackendError: See `json`.
        """
        sent, kind = _encoded(body, form, content)
        given = merged(kind, headers)

        async def attempt(call: Call) -> Answer:
            request = await self._request(
                method, path, call, query=query, headers=given, content=sent
            )
            async with self._answer(request, call, secrets, expect) as response:
                return await self._whole(response)

        for secret in secrets:
            register_secret(secret)
        repeat = method in {"GET", "HEAD"} if repeatable is None else repeatable
        call = self._call(f"{method} {path}", repeatable=repeat, seconds=self._policy.call_timeout)
        return await self._execute(call, attempt)

    # -- streams -----------------------------------------------------------------------

    async def lines(
        self,
        path: str,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        silence: float | None = None,
    ) -> AsyncGenerator[str, None]:
        """Yield the lines of a response as they arrive; consume it under `aclosing`.

        Opening the stream is retried. A stream that ends is not reopened: only the caller knows
        where to continue.

        Args:
            body: See `events`.
            silence: Maximum seconds between two pieces; None: `HttpPolicy.read_timeout`.

        Raises:
            BackendUnavailable: The connection was lost, or silent for too long.
        """
        pieces = self.pieces(path, query=query, headers=headers, body=body, silence=silence)
        async with aclosing(pieces), aclosing(lines_of(pieces)) as lines:
            async for line in lines:
                yield line

    async def pieces(
        self,
        path: str,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        silence: float | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a response as they arrive; see `lines`."""
        stack, response = await self._open_stream(path, query, headers or {}, body, silence)
        async with stack, aclosing(decoded(response)) as pieces:
            async for piece in pieces:
                yield piece

    async def events(
        self,
        path: str,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        last_id: str | None = None,
        silence: float | None = None,
    ) -> AsyncGenerator[ServerEvent, None]:
        """Yield Server-Sent Events as they arrive; see `lines`.

        Args:
            body: To be sent as JSON in a POST, which is only retried if it cannot have arrived.
            last_id: Id of the last event received, if the server can continue after it.
            silence: Comments that a server sends to keep the connection open count as data.
        """
        usual = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        since = {} if last_id is None else {"Last-Event-ID": last_id}
        asked = merged(usual, since, headers)
        async with (
            aclosing(
                self.lines(path, query=query, headers=asked, body=body, silence=silence)
            ) as lines,
            aclosing(server_events(lines)) as events,
        ):
            async for event in events:
                yield event

    @asynccontextmanager
    async def open_url(
        self, url: str, headers: Mapping[str, str], *, expect: frozenset[int] = _FOUND
    ) -> AsyncGenerator[OpenedUrl, None]:
        """Open a file at any URL for reading, following redirects.

        Neither key nor fixed headers of this client are sent. Opening is retried; a stream that
        is lost is not reopened.

        Args:
            url: Its query is a secret that no error shows.
            headers: Sent to every server on the way.
            expect: Statuses that are no errors.

        Raises:
            ConfigError: The URL is plain http to another host.
            ProtocolError: A URL is invalid, or leads from another host to this one.
        """
        given = merged({"Accept": "*/*", "Accept-Encoding": "identity"}, headers)
        async with AsyncExitStack() as stack:
            client: HttpClient = self
            for _ in range(_MOST_REDIRECTS + 1):
                client, path = await stack.enter_async_context(client._elsewhere(url))
                opened, response = await client._open_stream(  # noqa: SLF001
                    path, (), given, None, None, expect=_REDIRECTS | expect
                )
                await stack.enter_async_context(opened)
                if response.status_code not in _REDIRECTS:
                    pieces = await stack.enter_async_context(aclosing(decoded(response)))
                    yield OpenedUrl(response.status_code, response.headers, pieces)
                    return
                url = str(urljoin(str(response.request.url), response.headers.get("location", "")))
        raise ProtocolError("Too many redirects.", backend=self._backend)

    async def _open_stream(
        self,
        path: str,
        query: Query,
        headers: Mapping[str, str],
        body: Any,
        silence: float | None,
        *,
        expect: Container[int] = SUCCESS,
    ) -> tuple[AsyncExitStack, httpx.Response]:
        content, kind = _encoded(body, None, None)
        method = "GET" if content is None else "POST"
        given = merged(kind, headers)

        async def attempt(call: Call) -> tuple[AsyncExitStack, httpx.Response]:
            request = await self._request(
                method,
                path,
                call,
                query=query,
                headers=given,
                content=content,
                read_timeout=silence,
            )
            async with AsyncExitStack() as stack:
                response = await stack.enter_async_context(
                    self._answer(request, call, expect=expect)
                )
                return stack.pop_all(), response

        call = self._call(
            f"{method} {path}", repeatable=content is None, seconds=self._policy.call_timeout
        )
        return await self._execute(call, attempt)

    # -- files -------------------------------------------------------------------------

    @overload
    async def upload(
        self,
        path: str,
        upload: FileUpload,
        *,
        shape: Literal["object"] = "object",
        repeatable: bool = False,
    ) -> dict[str, Any]: ...

    @overload
    async def upload(
        self, path: str, upload: FileUpload, *, shape: type[Model], repeatable: bool = False
    ) -> Model: ...

    async def upload(
        self,
        path: str,
        upload: FileUpload,
        *,
        shape: Literal["object"] | type[BaseModel] = "object",
        repeatable: bool = False,
    ) -> Any:
        """POST a file as a form and return the JSON document of the response.

        Args:
            shape: See `json`.
            repeatable: Whether the server deduplicates files by name and content. If so, a
                failed attempt is repeated from the start; otherwise only if the request cannot
                have arrived.

        Raises:
            DatasetError: The file cannot be read, or changed during the upload.
        """
        answer = await self.send_file("POST", path, upload, repeatable=repeatable)
        return answer.json(shape)

    async def send_file(
        self,
        method: str,
        path: str,
        body: FileBody,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        expect: Container[int] = SUCCESS,
        repeatable: bool | None = None,
    ) -> Answer:
        """Send a file to this server, streamed, and return the response as it is.

        Args:
            expect: See `send`.
            repeatable: Whether the request is safe to repeat; None: only PUT.

        Raises:
            DatasetError: The file cannot be read, or changed during the upload.
        """

        async def attempt(call: Call) -> Answer:
            own = await body.headers()
            length = int(own["Content-Length"])
            with pacing(self._policy.call_timeout, call.late) as pace:
                async with (
                    aclosing(body.stream(length)) as stream,
                    aclosing(pace.over(stream, then=self._policy.upload_timeout)) as pieces,
                ):
                    request = await self._request(
                        method,
                        path,
                        call,
                        query=query,
                        headers=merged(own, headers),
                        content=pieces,
                        sha256=body.sha256,
                        read_timeout=self._policy.upload_timeout,
                        write_timeout=max(self._policy.write_timeout, self._policy.call_timeout),
                    )
                    async with self._answer(request, call, expect=expect) as response:
                        return await self._whole(response)

        repeat = method == "PUT" if repeatable is None else repeatable
        return await self._execute(self._call(f"{method} {path}", repeatable=repeat), attempt)

    async def put_file(
        self, url: str, body: FileBody, *, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """PUT a file to a presigned URL, streamed; neither key nor fixed headers are sent there.

        Args:
            url: As given by the server; its query is a secret that no error shows.
            headers: Those that the URL was signed with, if any.

        Raises:
            ConfigError: The URL is plain http to another host.
            ProtocolError: The URL is invalid, or leads from another host to this one.
            PermissionDenied: The URL has expired; ask the server for another one.
            DatasetError: The file cannot be read, or changed during the upload.
        """
        async with self._elsewhere(url) as (client, path):
            return await client.send_file("PUT", path, body, headers=headers)

    async def download(
        self,
        path: str,
        target: Path,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        follow: bool = False,
        on_progress: Progress | None = None,
    ) -> Path:
        """Download a response body to `target`, atomically.

        A download that is cut is continued, if the server has strong entity tags and byte ranges.

        Args:
            follow: Follow redirects, without key and fixed headers, for files kept elsewhere.
        """
        plain = {"Accept": "*/*", "Accept-Encoding": "identity"}
        given = merged(plain, headers)
        url = await self._save(path, target, query, given, on_progress, follow=follow)
        for _ in range(_MOST_REDIRECTS):
            if url is None:
                return target
            async with self._elsewhere(url) as (client, place):
                url = await client._save(  # noqa: SLF001  # it is one of these
                    place, target, (), plain, on_progress, follow=True
                )
        raise ProtocolError(f"GET {path}: too many redirects.", backend=self._backend)

    async def _save(
        self,
        path: str,
        target: Path,
        query: Query,
        headers: Mapping[str, str],
        on_progress: Progress | None,
        *,
        follow: bool,
    ) -> str | None:
        """Download to `target`; return None, or the URL of a redirect."""
        expect = {200, 206, *_REDIRECTS} if follow else SUCCESS

        async with partial_file(target) as part:

            async def attempt(call: Call) -> str | None:
                with pacing(self._policy.call_timeout, call.late) as pace:
                    given = merged(headers, part.request_headers)
                    request = await self._request("GET", path, call, query=query, headers=given)
                    async with self._answer(request, call, expect=expect) as response:
                        if response.status_code in _REDIRECTS:
                            location = response.headers.get("location", "")
                            return str(urljoin(str(request.url), location))
                        # Data already received may take longer to reach the disk.
                        arriving = pace.over(decoded(response), then=math.inf)
                        before = part.done
                        try:
                            async with aclosing(arriving) as pieces:
                                await part.receive(
                                    response.status_code, response.headers, pieces, on_progress
                                )
                        finally:
                            if part.request_headers and part.done - before >= CHUNK_BYTES:
                                call.progressed()
                    await part.publish()
                return None

            return await self._execute(self._call(f"GET {path}", repeatable=True), attempt)

    @asynccontextmanager
    async def _elsewhere(self, url: str) -> AsyncGenerator[tuple["HttpClient", str], None]:
        """Yield a client without a key for the server of a URL, and the URL's path and query."""
        origin, path, query = self._read_url(url)
        client = HttpClient(
            origin,
            decode_error=_URL_ERRORS,
            policy=self._policy,
            backend=self._backend,
            transport=self._transport,
        )
        client._hidden = _values_of(query)
        try:
            yield client, f"{path}?{query}" if query else path
        finally:
            with anyio.CancelScope(shield=True):
                await client.aclose()

    def _read_url(self, url: str) -> tuple[str, str, str]:
        """Return origin, path and query of a URL given by the server.

        Raises:
            ConfigError: It is plain http to another host.
            ProtocolError: It is invalid, or leads from another host to this one.
        """
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            raise self._bad_url("it is malformed") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise self._bad_url("it is not an http(s) URL")
        if "@" in parts.netloc:
            raise self._bad_url("it contains a user name")
        if is_loopback(url) and not is_loopback(self.base_url):
            # Otherwise a server could reach services that only this machine can.
            raise self._bad_url("it leads to this machine")
        require_private_transport(url, backend=self._backend, what="data")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return f"{parts.scheme}://{host}{port}", parts.path or "/", parts.query

    def _bad_url(self, why: str) -> ProtocolError:
        return ProtocolError(f"The server returned an invalid URL: {why}.", backend=self._backend)


_URL_ERRORS: Final = ErrorTable(
    statuses={401: PermissionDenied},
    hints={PermissionDenied: "The presigned URL may have expired; start again to get another."},
)


def _values_of(query: str) -> tuple[str, ...]:
    """Return the values of a query that may be signatures, as written and decoded."""
    written = (part.partition("=")[2] for part in query.split("&"))
    values = {form for value in written for form in (value, unquote(value), unquote_plus(value))}
    return tuple(
        sorted((v for v in values if len(v) >= _SHORTEST_SIGNATURE), key=len, reverse=True)
    )


def _encoded(
    body: Any, form: Mapping[str, str] | None, content: bytes | None
) -> tuple[bytes | None, dict[str, str]]:
    """Return the bytes to send, and their Content-Type."""
    if sum(each is not None for each in (body, form, content)) > 1:
        raise ValueError("pass only one of body, form and content")
    if form is not None:
        kind = "application/x-www-form-urlencoded"
        return urlencode(form).encode(), {"Content-Type": kind}
    if body is not None:
        return json.dumps(body, ensure_ascii=False).encode(), {"Content-Type": "application/json"}
    return content, {}
