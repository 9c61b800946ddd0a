"""Serve a gateway over HTTP within the running event loop."""

import errno
import ipaddress
import json
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast
from weakref import WeakSet

import anyio
import uvicorn
from anyio import to_thread
from pydantic import SecretStr
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import ConfigError, Issue
from training_backends.core.logging import get_logger
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway.app import create_app
from training_backends.gateway.gateway import Gateway, beside, open_gateway
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.uploads import BlobStore

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["Bounds", "RunningGateway", "bounded_protocol", "running", "server_options"]


def server_options(settings: GatewaySettings) -> dict[str, Any]:
    """Return uvicorn's TLS options; empty without a certificate. Blocking.

    Raises:
        ConfigError: A file cannot be read, is not valid PEM, or does not match the others.
    """
    certificate, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if certificate is None:
        if key or ca:
            raise ConfigError(
                "TLS needs a certificate.", hint="Pass --tls-cert, or set gateway.tls_cert."
            )
        return {}
    password = settings.tls_key_password
    secret = password.get_secret_value() if password else None
    issues = [
        issue
        for name, path in (("tls_cert", certificate), ("tls_key", key), ("tls_client_ca", ca))
        if path is not None and (issue := _unreadable(name, path))
    ]
    issues = issues or _unusable(certificate, key, ca, secret)
    if issues:
        raise ConfigError("Invalid TLS configuration.", issues=issues)
    return {
        "ssl_certfile": certificate,
        "ssl_keyfile": key,
        "ssl_keyfile_password": secret,
        "ssl_ca_certs": ca,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if ca else ssl.CERT_NONE,
    }


def _unreadable(name: str, path: Path) -> Issue | None:
    try:
        path.read_bytes()
    except OSError as error:
        return _issue(name, path, f"cannot be read: {error.strerror}")
    return None


def _unusable(
    certificate: Path, key: Path | None, ca: Path | None, password: str | None
) -> list[Issue]:
    """Load the files as the server will and report which one is invalid; OpenSSL does not."""
    issues = [
        _issue(name, path, "contains no PEM certificate")
        for name, path in (("tls_cert", certificate), ("tls_client_ca", ca))
        if path and not _has_certificates(path)
    ]
    if issues:
        return issues
    asked = False

    def get_password() -> str:
        nonlocal asked
        asked = True
        return password or ""  # never a prompt

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, get_password)
    except (ssl.SSLError, ValueError) as error:
        field, path = ("tls_key", key) if key else ("tls_cert", certificate)
        return [_issue(field, path, _key_problem(error, asked=asked, given=password is not None))]
    return []


def _key_problem(error: Exception, *, asked: bool, given: bool) -> str:
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return "the private key does not match the certificate"
    if asked:
        if given:
            return "cannot decrypt the private key with gateway.tls_key_password"
        return "the private key is encrypted and gateway.tls_key_password is not set"
    return "contains no PEM private key"


def _has_certificates(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True


def _issue(name: str, path: Path, message: str) -> Issue:
    return Issue(code="tls", message=message, path=str(path), field=f"gateway.{name}")


log = get_logger()

_LINGER = 5.0
"""Seconds a rejected client may keep sending, so that it gets to read the response."""

_Stage = Literal["between", "head", "body"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits of one connection.

    Attributes:
        headers: Maximum number of request headers.
        header_bytes: Maximum size of the request head, and of any other non-body data.
        header_timeout: Seconds to receive the complete head.
        body_timeout: Seconds to keep reading a body after the response, so that the client gets
            to read the response.
        answer_timeout: Seconds a client may take to read a response.
    """

    headers: int
    header_bytes: int
    header_timeout: float
    body_timeout: float
    answer_timeout: float


def bounded_protocol(bounds: Bounds) -> type[HttpToolsProtocol]:
    """Return a uvicorn protocol class that enforces these bounds."""

    class Protocol(_BoundedProtocol):
        _bounds = bounds

    return Protocol


class _TooLarge(Exception):
    """Stops the parser, which turns it into a call of `send_400_response`."""


class _Timer:
    """A one-shot timer; setting it while it runs has no effect."""

    def __init__(self, later: Callable[..., "TimerHandle"], call: Callable[[], None]) -> None:
        self._later = later
        self._call = call
        self._handle: TimerHandle | None = None

    def set(self, seconds: float) -> None:
        if self._handle is None:
            self._handle = self._later(seconds, self._fire)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._call()


class _BoundedProtocol(HttpToolsProtocol):
    """One connection, with timeouts for what the application cannot time.

    - receiving the head, from the connection or the first byte after a request;
    - reading the rest of a body after the response;
    - sending a response that the client does not read.

    uvicorn's keep-alive applies between requests; the application times the body.
    """

    _bounds: ClassVar[Bounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage: _Stage = "between"
        self._headers = 0
        self._head_bytes = 0
        self._non_body_bytes = 0
        self._too_large = False
        self._rejected = False
        self._head_timer = _Timer(self.loop.call_later, self._head_timed_out)
        self._rest_timer = _Timer(self.loop.call_later, self._close)
        self._answer_timer = _Timer(self.loop.call_later, self._abort)

    def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]  # so is its base
        super().connection_made(transport)
        # Pause on any unread byte, not only above a high-water mark.
        transport.set_write_buffer_limits(high=1, low=0)
        self._head_timer.set(self._bounds.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._rest_timer, self._answer_timer):
            timer.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._rejected or self.transport.is_closing():
            return
        self._non_body_bytes += len(data)
        super().data_received(data)
        # Neither a complete head nor a body: an endless header, trailer or chunk extension.
        if self._non_body_bytes > self._bounds.header_bytes and not self._rejected:
            self._reject_size()
        self._watch()

    def _watch(self) -> None:
        """Start and stop timers for the current stage."""
        if self._rejected:
            self._head_timer.clear()
            return
        answered = self._answered()
        if self._stage == "head" or (self._stage == "between" and answered):
            self._head_timer.set(self._bounds.header_timeout)
        else:
            self._head_timer.clear()
        if self._stage == "body" and answered:
            self._rest_timer.set(self._bounds.body_timeout)
        else:
            self._rest_timer.clear()

    def _answered(self) -> bool:
        """Whether no response is in progress; there is no cycle before the first request."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is None or cycle.response_complete

    # Called by the parser, in this order.

    def on_message_begin(self) -> None:
        self._stage = "head"
        self._headers = self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers arrive here too and count as headers.
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stage = "body"
        self._non_body_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._non_body_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = "between"
        self._non_body_bytes = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._bounds.header_bytes or self._headers > self._bounds.headers:
            self._too_large = True
            raise _TooLarge

    # Error responses, in the application's format.

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._reject_size()
        else:
            self._reject(400, msg)

    def _reject_size(self) -> None:
        self._reject(
            431,
            f"Request head too large; the limits are {self._bounds.headers} headers and "
            f"{self._bounds.header_bytes} bytes.",
        )

    def _head_timed_out(self) -> None:
        if self.flow.read_paused:
            # Reading is paused on our side: earlier requests come first.
            self._head_timer.set(self._bounds.header_timeout)
        elif self._stage == "head":
            seconds = self._bounds.header_timeout
            self._reject(408, f"Timed out: the request head did not arrive within {seconds:g} s.")
        else:
            self._close()

    def _reject(self, status: int, sentence: str) -> None:
        if not self._answered():
            # Another response is in progress, so none can be sent.
            self._close()
            return
        log.info("request rejected", status=status, reason=sentence)
        body = json.dumps({"detail": sentence}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing now would lose the response for a client that is still sending.
        self._rejected = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._rest_timer.set(_LINGER)

    def _close(self) -> None:
        self.transport.close()

    # Called by the transport.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer.set(self._bounds.answer_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_timer.clear()

    def _abort(self) -> None:
        log.info("client did not read a response")
        self.transport.abort()


_BACKLOG = 64
"""Maximum length of the queue of connections to accept."""
_LOG_EVERY = 60.0
"""Seconds between two log lines about too many connections."""
_MOST_CONNECTIONS = 4096
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    """A gateway that serves requests.

    Attributes:
        url: Base URL, without `/v1`.
        api_key: Static key from the settings, if any.
    """

    url: str
    api_key: SecretStr | None
    gateway: Gateway


class _Listener(socket.socket):
    """A listening socket that closes connections above a limit immediately.

    The limit applies before TLS and HTTP, so clients cannot exhaust the file descriptors that
    jobs and databases need.
    """

    def __init__(self, family: int, kind: int, protocol: int, *, limit: int) -> None:
        super().__init__(family, kind, protocol)
        self._limit = limit
        self._open: WeakSet[socket.socket] = WeakSet()
        self._short_since = self._logged_at = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: No connection is pending, or it was closed.
            OSError: Out of file descriptors; raised at most once a second, because asyncio calls
                accept as often as its backlog says and schedules a retry for each failure.
        """
        try:
            connection, address = super().accept()
        except OSError as error:
            now = time.monotonic()
            if error.errno not in _OUT_OF_DESCRIPTORS or now - self._short_since >= 1:
                self._short_since = now
                raise
            raise BlockingIOError(errno.EAGAIN, "out of file descriptors") from error
        if sum(each.fileno() >= 0 for each in self._open) < self._limit:
            self._open.add(connection)
            return connection, address
        connection.close()
        if time.monotonic() - self._logged_at >= _LOG_EVERY:
            self._logged_at = time.monotonic()
            log.warning("connections rejected: too many open", limit=self._limit)
        raise BlockingIOError(errno.EAGAIN, "too many connections")


class _Server(uvicorn.Server):
    """A server that the embedding program stops, not a signal."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()
        self._stop_requested = anyio.Event()

    def request_stop(self) -> None:
        """Stop accepting connections and finish the requests in progress."""
        self.should_exit = True
        self._stop_requested.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not capture signals."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            # Without this, a cancelled server leaves its socket registered in the event loop, and a
            # later socket with the same number would never be served.
            for server in getattr(self, "servers", ()):
                server.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        """Update the date header once a second until asked to stop.

        uvicorn's own looks ten times a second whether it should stop.
        """
        while not await self.on_tick(0):
            with anyio.move_on_after(1):
                await self._stop_requested.wait()


@asynccontextmanager
async def running(
    settings: GatewaySettings,
    *,
    home: Path,
    backend: str,
    host: str | None = None,
    port: int | None = None,
    backends: Mapping[str, TrainingBackend] | None = None,
    vault: CredentialVault | None = None,
    blobs: BlobStore | None = None,
) -> AsyncIterator[RunningGateway]:
    """Serve while the block runs; unfinished jobs resume at the next start.

    Args:
        home: Directory of all state; the gateway's is stored in `<home>/gateway`.
        backend: Name of the training backend.
        host: Address to listen on; default: from the settings. Any other than loopback makes
            the gateway reachable from the network.
        port: Port to listen on, 0 for any free one; default: from the settings.

    Raises:
        ConfigError: The port is in use, the address does not belong to this machine, the TLS
            files are invalid, or keys would cross the network unencrypted.
        DuplicateRun: Another gateway is using this home.
    """
    host = host or settings.host
    tls = await to_thread.run_sync(server_options, settings)
    limit = settings.max_connections or _connections()
    port = settings.port if port is None else port
    listener = await to_thread.run_sync(_bind, host, port, limit)
    try:
        url = _url(listener, "https" if tls else "http")
        if not tls and not _is_loopback(listener):
            _require_tls(settings, url)
        async with (
            open_gateway(
                settings,
                home=home,
                url=url,
                backend=backend,
                backends=backends,
                vault=vault,
                blobs=blobs,
            ) as gateway,
            _serving(gateway, listener, tls),
        ):
            yield RunningGateway(url=url, api_key=settings.api_key, gateway=gateway)
    finally:
        listener.close()


@asynccontextmanager
async def _serving(
    gateway: Gateway, listener: socket.socket, tls: Mapping[str, Any]
) -> AsyncIterator[None]:
    app = create_app(gateway)
    settings = gateway.settings
    config = uvicorn.Config(
        app,
        http=bounded_protocol(_bounds(settings)),
        ws="none",
        log_config=None,
        access_log=False,
        # Only for logs, and from these proxies only: clients could forge them.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=[str(each) for each in settings.trusted_proxies],
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,  # type: ignore[arg-type]  # seconds
        backlog=_BACKLOG,
        # Longer than common client pools, so that none reuses a closing connection.
        timeout_keep_alive=75,
        **tls,
    )
    server = _Server(config)
    async with beside() as tasks:
        tasks.start_soon(server.serve, [listener])
        await server.listening.wait()
        try:
            yield
        finally:
            app.state.is_stopping = True
            if settings.shutdown_delay:
                await anyio.sleep(settings.shutdown_delay)
            gateway.feed.close()  # or shutdown would wait for the open pages
            server.request_stop()


def _bounds(settings: GatewaySettings) -> Bounds:
    return Bounds(
        headers=settings.max_headers,
        header_bytes=settings.max_header_bytes,
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        answer_timeout=settings.answer_timeout,
    )


def _require_tls(settings: GatewaySettings, url: str) -> None:
    """Require TLS beyond loopback unless plain HTTP was allowed explicitly.

    An https `public_url` means that a proxy in front of the gateway terminates TLS.
    """
    if settings.public_url is not None and settings.public_url.scheme == "https":
        return
    if not settings.plain_http:
        raise ConfigError(
            f"Refusing to serve plain HTTP on a non-loopback address ({url}): API keys and "
            "training data would be sent unencrypted.",
            hint="Pass --tls-cert and --tls-key; or, behind a TLS proxy, set "
            "TRAINING_BACKENDS_GATEWAY__PUBLIC_URL to its https URL; or pass --plain-http to "
            "accept the risk.",
        )
    log.warning("serving plain HTTP on a non-loopback address", url=url)


def _connections() -> int:
    """Return how many connections fit within the limit of file descriptors.

    Each connection may have a file open as well; a quarter is reserved for everything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(max(soft - soft // 4, 2) // 2, _MOST_CONNECTIONS)


def _bind(host: str, port: int, limit: int) -> socket.socket:
    """Return a socket that listens on an address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"{host!r} is not an address of this machine: {error.strerror}.",
            hint="Use 127.0.0.1, or 0.0.0.0 to be reachable from the network.",
        ) from error
    listener = _Listener(family, kind, protocol, limit=limit)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    listener.setblocking(False)  # noqa: FBT003  # its only argument
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"Port {port} on {host} is already in use.",
            hint="Choose another port with --port, or --port 0 for any free one.",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"No permission to listen on port {port} of {host}.",
            hint="Choose a --port above 1023.",
        )
    return ConfigError(
        f"Cannot listen on {host}, port {port}: {error.strerror}.",
        hint="Use 127.0.0.1, or 0.0.0.0 to be reachable from the network.",
    )


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
