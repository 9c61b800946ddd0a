"""How patient a client is, and the pool of connections that it talks over."""

import ssl
from dataclasses import dataclass
from importlib.metadata import version

import httpx

from training_backends.http.environment import proxy_for, tls_context

__all__ = ["HttpPolicy", "make_pool", "timeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPolicy:
    """How patient a client is. All times in seconds.

    Attributes:
        connect_timeout: For one connection, TLS included.
        read_timeout: Silence while an answer is awaited or read.
        write_timeout: Silence while a request is sent; a file's may last as long as
            `call_timeout`, for a slow line takes large buffers in large gulps.
        pool_timeout: For a free connection.
        call_timeout: For a whole call with all its attempts. Uploads and downloads may take
            longer: there it is for each mebibyte, so they end below about 9 kB/s, and for all
            pauses between attempts.
        upload_timeout: From a file's last byte to the end of the answer, while the server
            looks into it.
        attempts: How often a request is sent at most.
        max_connections: httpx's cost a request triples beyond about five in flight.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    pool_timeout: float = 60.0
    call_timeout: float = 120.0
    upload_timeout: float = 600.0
    attempts: int = 5
    max_connections: int = 5


def timeouts(
    policy: HttpPolicy, read_timeout: float | None = None, write_timeout: float | None = None
) -> httpx.Timeout:
    """Return the policy's timeouts, with others for reading and writing where they are given."""
    return httpx.Timeout(
        connect=policy.connect_timeout,
        read=read_timeout or policy.read_timeout,
        write=write_timeout or policy.write_timeout,
        pool=policy.pool_timeout,
    )


def make_pool(
    base_url: str, policy: HttpPolicy, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Make the pool for one server.

    Reads certificates and package metadata from the disk: not for the event loop.

    Raises:
        ConfigError: A network variable, such as HTTPS_PROXY, cannot be used.
        BackendNotInstalled: It names a SOCKS proxy, and what speaks that is not installed.
    """
    encrypted = base_url.startswith("https://")
    return httpx.AsyncClient(
        timeout=timeouts(policy),
        limits=httpx.Limits(
            max_connections=policy.max_connections,
            max_keepalive_connections=policy.max_connections,
            keepalive_expiry=60.0,
        ),
        headers={
            "User-Agent": f"training-backends/{version('training-backends')}",
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
        },
        follow_redirects=False,
        trust_env=False,
        proxy=None if transport else proxy_for(base_url),
        # Without TLS the certificates need not be read; an empty context trusts nobody.
        verify=tls_context() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        transport=transport,
    )
