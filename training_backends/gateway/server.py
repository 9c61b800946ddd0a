"""Serve a gateway over HTTP within the running event loop."""

import errno
import ipaddress
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import anyio
import uvicorn
from anyio import to_thread
from pydantic import SecretStr

from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import ConfigError
from training_backends.core.logging import get_logger
from training_backends.gateway.app import create_app
from training_backends.gateway.blobs import BlobStore
from training_backends.gateway.gateway import Gateway, open_gateway
from training_backends.gateway.protocol import Bounds, bounded_protocol
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.tasks import beside
from training_backends.gateway.tls import server_options

__all__ = ["RunningGateway", "running"]

log = get_logger()

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
