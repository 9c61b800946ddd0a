"""One pooled HTTP client: timeouts on everything, lawful retries, a key that stays private."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
import httpx
import stamina
from pydantic import SecretStr

from training_backends.core.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
)
from training_backends.core.logs import REDACTED, get_logger, redact
from training_backends.net.download import save_stream
from training_backends.net.failures import error_from_transport
from training_backends.net.multipart import FileUpload, Progress
from training_backends.net.pool import HttpPolicy, make_pool, timeouts
from training_backends.net.retry import Backoff, read_retry_after
from training_backends.net.urls import require_private_transport

__all__ = ["ErrorDecoder", "HttpClient", "KeySource", "Query"]

KeySource = Callable[[], Awaitable[SecretStr]]
"""Gives the key; asked again after a 401, in case it was changed meanwhile."""

ErrorDecoder = Callable[[int, Mapping[str, str], bytes], TrainingBackendError]
"""Makes our error from status, headers and body of an answer that is no success."""

Query = Sequence[tuple[str, str]]
"""Query parameters; a key may come several times."""

_T = TypeVar("_T")

_LARGEST_JSON: Final = 64 * 2**20


class _Attempt:
    """One request on its way; notices when its first byte leaves."""

    def __init__(self) -> None:
        self.sent = False
        self.retry_after: float | None = None

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        del info
        if event.endswith("send_request_headers.started"):
            self.sent = True


class HttpClient:
    """Talks to one server with one key over one pool of connections.

    A safe request is repeated when the server is away or busy; one that may have changed
    something is not: `BackendUnavailable.sent` then says whether it can have arrived.
    Redirects are never followed, so the key goes to no other host.

    Args:
        base_url: As `normalize_base_url` returns it.
        key: None sends no Authorization header.
        transport: Replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: KeySource | None,
        decode_error: ErrorDecoder,
        policy: HttpPolicy | None = None,
        backend: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if key is not None:
            require_private_transport(base_url, backend=backend)
        self.base_url = base_url
        self._key = key
        self._decode_error = decode_error
        self._policy = policy or HttpPolicy()
        self._backend = backend
        self._transport = transport
        self._secret: SecretStr | None = None
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
        """Send a request and return the JSON object that it is answered with.

        Args:
            repeatable: Whether sending it twice does no harm; None: only for GET.
            secrets: What the body holds and an error must not show.

        Raises:
            BackendUnavailable: No usable answer in time; `sent` says if it may have arrived.
            ProtocolError: The answer is not a JSON object.
            TrainingBackendError: What `decode_error` makes of an error answer.
        """
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}

        async def attempt(note: _Attempt) -> dict[str, Any]:
            request = await self._request(
                method, path, note, query=query, headers=headers, content=content
            )
            async with self._answer(request, note, secrets) as response:
                return await self._object(response, _call(request), secrets)

        repeat = method == "GET" if repeatable is None else repeatable
        return await self._with_retries(
            attempt, f"{method} {path}", repeatable=repeat, deadline=self._policy.call_timeout
        )

    async def upload(self, path: str, upload: FileUpload) -> dict[str, Any]:
        """POST a file and return the JSON object that it is answered with.

        Repeated only if it cannot have arrived.

        Raises:
            DatasetError: The file cannot be read, or changed while it was.
        """

        async def attempt(note: _Attempt) -> dict[str, Any]:
            headers = await upload.headers()
            length = int(headers["Content-Length"])
            async with aclosing(upload.stream(length)) as stream:
                request = await self._request(
                    "POST",
                    path,
                    note,
                    headers=headers,
                    content=stream,
                    read_timeout=self._policy.upload_timeout,
                    write_timeout=max(self._policy.write_timeout, self._policy.call_timeout),
                )
                async with self._answer(request, note) as response:
                    return await self._object(response, _call(request))

        return await self._with_retries(attempt, f"POST {path}", repeatable=False, deadline=None)

    async def download(
        self, path: str, target: Path, *, on_progress: Progress | None = None
    ) -> Path:
        """GET a body into `target`, which appears whole or not at all."""

        async def attempt(note: _Attempt) -> Path:
            request = await self._request(
                "GET", path, note, headers={"Accept": "*/*", "Accept-Encoding": "identity"}
            )
            async with self._answer(request, note) as response:
                length = response.headers.get("content-length")
                plain = "content-encoding" not in response.headers
                expected = int(length) if plain and length and length.isdigit() else None
                return await save_stream(response.aiter_bytes(), target, expected, on_progress)

        return await self._with_retries(attempt, f"GET {path}", repeatable=True, deadline=None)

    async def _with_retries(
        self,
        attempt: Callable[[_Attempt], Awaitable[_T]],
        name: str,
        *,
        repeatable: bool,
        deadline: float | None,
    ) -> _T:
        note = _Attempt()
        backoff = Backoff(
            repeatable=repeatable,
            attempts=self._policy.attempts,
            patience=deadline if deadline is not None else self._policy.call_timeout,
        )
        with anyio.move_on_after(deadline):
            async for turn in stamina.retry_context(on=backoff, attempts=None, timeout=None):
                with turn:
                    note.sent = False
                    note.retry_after = None
                    backoff.retry_after = None
                    try:
                        return await self._with_current_key(attempt, note)
                    except TrainingBackendError as error:
                        backoff.retry_after = note.retry_after
                        self._log.debug(
                            "http.failed", call=name, attempt=turn.num, error=error.message
                        )
                        raise
        raise BackendUnavailable(
            f"{name}: no answer within {deadline:g} s.", sent=note.sent, backend=self._backend
        )

    async def _with_current_key(
        self, attempt: Callable[[_Attempt], Awaitable[_T]], note: _Attempt
    ) -> _T:
        """Try once; after a 401 look whether the key was changed, and if so try with that."""
        try:
            return await attempt(note)
        except AuthenticationFailed:
            if self._key is None:
                raise
            used, self._secret = self._secret, await self._read_key(self._key)
            if used is None or used.get_secret_value() == self._secret.get_secret_value():
                raise
        note.sent = False
        return await attempt(note)

    async def _request(
        self,
        method: str,
        path: str,
        note: _Attempt,
        *,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> httpx.Request:
        if self._key is not None and self._secret is None:
            self._secret = await self._read_key(self._key)
        sent_headers = dict(headers or {})
        if self._secret is not None:
            sent_headers["Authorization"] = f"Bearer {self._secret.get_secret_value()}"
        client = await self._opened()
        return client.build_request(
            method,
            self.base_url + path,
            params=list(query) or None,
            headers=sent_headers,
            content=content,
            timeout=timeouts(self._policy, read_timeout, write_timeout),
            extensions={"trace": note.trace},
        )

    async def _read_key(self, source: KeySource) -> SecretStr:
        """Ask for the key; one that does not fit into a header must not reach an error."""
        key = (await source()).get_secret_value().strip()
        if key and key.isascii() and key.isprintable() and " " not in key:
            return SecretStr(key)
        raise AuthenticationFailed(
            "The stored key cannot be one: it is empty or holds characters that no key has.",
            hint="Store it again; was something else pasted with it?",
            backend=self._backend,
        )

    async def _opened(self) -> httpx.AsyncClient:
        async with self._opening:
            if self._client is None:
                # Reads certificates and package metadata from the disk.
                self._client = await anyio.to_thread.run_sync(
                    make_pool, self.base_url, self._policy, self._transport
                )
            return self._client

    @asynccontextmanager
    async def _answer(
        self, request: httpx.Request, note: _Attempt, secrets: Sequence[SecretStr] = ()
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send; yield the answer if it is a success, raise our error if it is not."""
        client = await self._opened()
        began = time.monotonic()
        try:
            response = await client.send(request, stream=True)
            self._log.debug(
                "http.answered",
                call=_call(request),
                status=response.status_code,
                seconds=round(time.monotonic() - began, 3),
            )
            try:
                if response.is_success:
                    yield response
                    return
                body = await _read_capped(response)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise error_from_transport(
                error, call=_call(request), sent=note.sent, backend=self._backend
            ) from error
        note.retry_after = read_retry_after(response.headers.get("retry-after"))
        raise self._refusal(response, self._scrubbed(body, secrets), note.retry_after)

    def _refusal(
        self, response: httpx.Response, body: bytes, retry_after: float | None
    ) -> TrainingBackendError:
        if response.is_redirect:
            target = response.headers.get("location", "an unknown place")
            return ProtocolError(
                f"{_call(response.request)}: the server sends us on to {redact(target)}.",
                hint="Redirects are not followed with a key; set the base URL to that place.",
                backend=self._backend,
            )
        error = self._decode_error(response.status_code, response.headers, body)
        if isinstance(error, RateLimited) and error.retry_after is None:
            error.retry_after = retry_after
        return error

    async def _object(
        self, response: httpx.Response, call: str, secrets: Sequence[SecretStr] = ()
    ) -> dict[str, Any]:
        body = await _read_capped(response)
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        found = response.headers.get("content-type", "no content type")
        raise ProtocolError(
            f"{call}: the answer is not a JSON object ({response.status_code}, {found}).",
            # Scrubbed before it is cut, or the half of a secret would be left at the end.
            excerpt=redact(self._scrubbed(body, secrets)[:2000].decode("utf-8", "replace")),
            hint="Does the base URL lead to an API, and not to a web page or proxy?",
            backend=self._backend,
        )

    def _scrubbed(self, body: bytes, secrets: Sequence[SecretStr]) -> bytes:
        """Take secrets that a server repeats out of what it said."""
        for secret in (self._secret, *secrets):
            if secret is not None and secret.get_secret_value():
                body = body.replace(secret.get_secret_value().encode(), REDACTED.encode())
        return body


def _call(request: httpx.Request) -> str:
    return f"{request.method} {request.url.copy_with(query=None)}"


async def _read_capped(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _LARGEST_JSON:
            break
    return bytes(body)
