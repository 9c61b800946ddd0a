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
from training_backends.gateway.app import create_app
from training_backends.gateway.gateway import Gateway, beside, open_gateway
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.uploads import BlobStore

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["Bounds", "RunningGateway", "bounded_protocol", "running", "server_options"]


def server_options(settings: GatewaySettings) -> dict[str, Any]:
    """Return what uvicorn is told of TLS; nothing without a certificate. Blocking.

    Raises:
        ConfigError: A file cannot be read, holds something else, or does not fit the others.
    """
    certificate, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if certificate is None:
        if key or ca:
            raise ConfigError(
                "TLS needs a certificate.", hint="Give --tls-cert, or set gateway.tls_cert."
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
        raise ConfigError("The gateway cannot serve https with these files.", issues=issues)
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
    """Load the files as the server will, and say which of them is to blame; OpenSSL does not."""
    issues = [
        _issue(name, path, "holds no certificate in PEM form")
        for name, path in (("tls_cert", certificate), ("tls_client_ca", ca))
        if path and not _holds_certificates(path)
    ]
    if issues:
        return issues
    asked = False

    def tell() -> str:
        nonlocal asked
        asked = True
        return password or ""  # never a prompt

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, tell)
    except (ssl.SSLError, ValueError) as error:
        field, path = ("tls_key", key) if key else ("tls_cert", certificate)
        return [_issue(field, path, _why_no_key(error, asked=asked, given=password is not None))]
    return []


def _why_no_key(error: Exception, *, asked: bool, given: bool) -> str:
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return "holds the private key of another certificate"
    if asked:
        if given:
            return "the password in gateway.tls_key_password does not open its private key"
        return "its private key is encrypted and gateway.tls_key_password is not set"
    return "holds no private key in PEM form"


def _holds_certificates(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True


def _issue(name: str, path: Path, message: str) -> Issue:
    return Issue(code="tls", message=message, path=str(path), field=f"gateway.{name}")


log = get_logger()

_LINGER = 5.0
"""Seconds for which a refused client may go on sending, so that it reads why."""

_Stage = Literal["between", "head", "body"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one connection may ask of the server.

    Attributes:
        headers: Most headers of a request.
        header_bytes: Largest head, and largest part of a message that is no body.
        header_timeout: Seconds in which a head must be here.
        body_timeout: Seconds for which the rest of a body is taken in that nobody waits for,
            so that the client gets to read why.
        answer_timeout: Seconds for which a client may leave an answer unread.
    """

    headers: int
    header_bytes: int
    header_timeout: float
    body_timeout: float
    answer_timeout: float


def bounded_protocol(bounds: Bounds) -> type[HttpToolsProtocol]:
    """Return the protocol class that keeps these bounds, as uvicorn takes it."""

    class Protocol(_BoundedProtocol):
        _bounds = bounds

    return Protocol


class _TooLarge(Exception):
    """Ends the parser; what it raises instead ends in `send_400_response`."""


class _Timer:
    """Calls once, some time after it was set; setting it again while it runs changes nothing."""

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
    """One connection, with timers for what the application cannot time.

    - until a head is whole, from the connection or from the first byte after a request;
    - the rest of a body whose request was answered already;
    - an answer that the client does not take.

    Between requests uvicorn's own keep-alive applies, and while a body is read the
    application has its deadlines.
    """

    _bounds: ClassVar[Bounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage: _Stage = "between"
        self._headers = 0
        self._head_bytes = 0
        self._beside_body = 0
        self._too_large = False
        self._refused = False
        self._head_timer = _Timer(self.loop.call_later, self._head_is_late)
        self._rest_timer = _Timer(self.loop.call_later, self._close)
        self._answer_timer = _Timer(self.loop.call_later, self._abort)

    def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]  # so is its base
        super().connection_made(transport)
        # Every byte that the client has not taken counts, not only those above a mark.
        transport.set_write_buffer_limits(high=1, low=0)
        self._head_timer.set(self._bounds.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._rest_timer, self._answer_timer):
            timer.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._beside_body += len(data)
        super().data_received(data)
        # What is neither a whole head nor a body: a header, a trailer or a chunk's
        # extension without end.
        if self._beside_body > self._bounds.header_bytes and not self._refused:
            self._refuse_size()
        self._watch()

    def _watch(self) -> None:
        """Set the timer of what is waited for."""
        if self._refused:
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
        """Whether no answer is under way; before the first request there is no cycle."""
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
        # Trailers come here too, after the body, and count with the headers.
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stage = "body"
        self._beside_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = "between"
        self._beside_body = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._bounds.header_bytes or self._headers > self._bounds.headers:
            self._too_large = True
            raise _TooLarge

    # Refusals, in the form of all others.

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_size()
        else:
            self._refuse(400, msg)

    def _refuse_size(self) -> None:
        self._refuse(
            431,
            f"The request's head is too large; at most {self._bounds.headers} headers and "
            f"{self._bounds.header_bytes} bytes are accepted.",
        )

    def _head_is_late(self) -> None:
        if self.flow.read_paused:
            # It is us who do not read on: earlier requests come first.
            self._head_timer.set(self._bounds.header_timeout)
        elif self._stage == "head":
            seconds = self._bounds.header_timeout
            self._refuse(408, f"The request's head was not here within {seconds:g} s.")
        else:
            self._close()

    def _refuse(self, status: int, sentence: str) -> None:
        if not self._answered():
            # Within another answer nothing can be said.
            self._close()
            return
        log.info("request refused", status=status, reason=sentence)
        body = json.dumps({"detail": sentence}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # To close at once would take the answer from a client that is still sending.
        self._refused = True
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
        log.info("client left an answer unread")
        self.transport.abort()


_PATIENCE = 5
"""Seconds that requests under way are given when the server ends."""
_BACKLOG = 64
"""Connections that wait to be accepted."""
_LOG_EVERY = 60.0
"""Seconds between two lines about too many connections."""
_MOST_CONNECTIONS = 4096
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    """A gateway that answers.

    Attributes:
        url: Where, without `/v1`.
        api_key: The static key from the settings, if there is one.
    """

    url: str
    api_key: SecretStr | None
    gateway: Gateway


class _Listener(socket.socket):
    """A listening socket that closes connections above a limit as soon as they are made.

    The limit holds before TLS and before HTTP, so no client can use up the file descriptors
    that jobs and their databases need.
    """

    def __init__(self, family: int, kind: int, protocol: int, *, limit: int) -> None:
        super().__init__(family, kind, protocol)
        self._limit = limit
        self._open: WeakSet[socket.socket] = WeakSet()
        self._short_since = self._logged_at = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: There is none, or it was closed.
            OSError: No descriptor is left; at most once a second, because asyncio goes on to
                accept as often as its backlog says and schedules a retry for each failure.
        """
        try:
            connection, address = super().accept()
        except OSError as error:
            now = time.monotonic()
            if error.errno not in _OUT_OF_DESCRIPTORS or now - self._short_since >= 1:
                self._short_since = now
                raise
            raise BlockingIOError(errno.EAGAIN, "no descriptor left") from error
        if sum(each.fileno() >= 0 for each in self._open) < self._limit:
            self._open.add(connection)
            return connection, address
        connection.close()
        if time.monotonic() - self._logged_at >= _LOG_EVERY:
            self._logged_at = time.monotonic()
            log.warning("connections closed: too many are open", limit=self._limit)
        raise BlockingIOError(errno.EAGAIN, "too many connections")


class _Server(uvicorn.Server):
    """A server that leaves signals to the program it is a part of."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@asynccontextmanager
async def running(
    settings: GatewaySettings,
    *,
    home: Path,
    backend: str,
    host: str | None = None,
    port: int | None = None,
    backends: Mapping[str, TrainingBackend] | None = None,
    blobs: BlobStore | None = None,
) -> AsyncIterator[RunningGateway]:
    """Serve for as long as the block lasts; jobs under way go on at the next start.

    Args:
        home: Directory of all state; the gateway's lies in `<home>/gateway`.
        backend: Name of the backend that trains.
        host: Address to listen on; default that of the settings. Beyond loopback
            everybody on the network can reach the gateway.
        port: 0 for any free one; default that of the settings.

    Raises:
        ConfigError: The port is taken, the address is not this machine's, the files for TLS
            cannot be used, or keys would cross the network in the clear.
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
            _mind_plain_http(settings, url)
        async with (
            open_gateway(
                settings, home=home, url=url, backend=backend, backends=backends, blobs=blobs
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
    config = uvicorn.Config(
        create_app(gateway),
        http=bounded_protocol(_bounds(gateway.settings)),
        ws="none",
        log_config=None,
        access_log=False,
        # Nothing here depends on the client's address or scheme, which these could forge.
        proxy_headers=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_PATIENCE,
        backlog=_BACKLOG,
        # A client's pool must not find its connection closed under its next request.
        timeout_keep_alive=75,
        **tls,
    )
    server = _Server(config)
    async with beside() as tasks:
        tasks.start_soon(server.serve, [listener])
        while not server.started:  # noqa: ASYNC110  # uvicorn sets no event
            await anyio.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = True


def _bounds(settings: GatewaySettings) -> Bounds:
    return Bounds(
        headers=settings.max_headers,
        header_bytes=settings.max_header_bytes,
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        answer_timeout=settings.answer_timeout,
    )


def _mind_plain_http(settings: GatewaySettings, url: str) -> None:
    """Let keys cross a network in the clear only where somebody has said so.

    An https address for clients says that a proxy in front of the gateway does TLS.
    """
    if settings.public_url is not None and settings.public_url.scheme == "https":
        return
    if not settings.plain_http:
        raise ConfigError(
            f"At {url} everybody on the way could read API keys and training data: it is "
            "beyond this machine and without TLS.",
            hint="Give --tls-cert and --tls-key; or, behind a proxy with TLS, set "
            "TRAINING_BACKENDS_GATEWAY__PUBLIC_URL to its https address; or accept it with "
            "--plain-http.",
        )
    log.warning("serving plain http beyond this machine", url=url)


def _connections() -> int:
    """Return how many connections fit below the limit of file descriptors.

    Each may have a file open besides, and a quarter is for databases, jobs and all else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(max(soft - soft // 4, 2) // 2, _MOST_CONNECTIONS)


def _bind(host: str, port: int, limit: int) -> socket.socket:
    """Listen on an address, before anything else is begun."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"{host!r} is no address of this machine: {error.strerror}.",
            hint="Use 127.0.0.1, or 0.0.0.0 to be reached from the network.",
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
            f"Port {port} on {host} is taken by another program.",
            hint="Choose another with --port, or --port 0 for any free one.",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"Port {port} on {host} needs more rights than this program has.",
            hint="Choose a --port above 1023.",
        )
    return ConfigError(
        f"Cannot listen on {host}, port {port}: {error.strerror}.",
        hint="Use 127.0.0.1, or 0.0.0.0 to be reached from the network.",
    )


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
