"""Timeouts, retries and the connection pool of a client."""

import ssl
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import httpx

from training_backends.http.environment import proxy_for, tls_context

__all__ = ["HttpPolicy", "make_pool", "timeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPolicy:
    """Timeouts and retries of a client. All times in seconds.

    Attributes:
        connect_timeout: To connect, including TLS.
        read_timeout: Without data while waiting for or reading a response.
        write_timeout: Without progress while sending a request. For files it is `call_timeout`,
            because a slow connection drains large buffers rarely.
        pool_timeout: To get a free connection.
        call_timeout: For a call with all its attempts. Uploads and downloads may take longer:
            for them it applies to each MiB, so they fail below about 9 kB/s, and to the sum of
            the pauses between attempts.
        upload_timeout: From the last byte of a file to the end of the response, while the server
            checks the file.
        attempts: Maximum attempts per request.
        retry_pause: Longest pause before the second attempt; it doubles with each further one, up
            to 20.
        max_connections: Pool size; httpx's cost per request triples beyond about five in flight.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    pool_timeout: float = 60.0
    call_timeout: float = 120.0
    upload_timeout: float = 600.0
    attempts: int = 5
    retry_pause: float = 0.5
    max_connections: int = 5


def timeouts(
    policy: HttpPolicy, read_timeout: float | None = None, write_timeout: float | None = None
) -> httpx.Timeout:
    """Return the policy's timeouts, with optional overrides for reading and writing."""
    return httpx.Timeout(
        connect=policy.connect_timeout,
        read=read_timeout or policy.read_timeout,
        write=write_timeout or policy.write_timeout,
        pool=policy.pool_timeout,
    )


def make_pool(
    base_url: str, policy: HttpPolicy, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Create the connection pool for one server.

    Reads certificates and package metadata from disk; do not call it in the event loop.

    Raises:
        ConfigError: A network variable such as HTTPS_PROXY is invalid.
        BackendNotInstalled: The variable names a SOCKS proxy and socksio is not installed.
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
            "User-Agent": _user_agent(),
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
        },
        follow_redirects=False,
        trust_env=False,
        proxy=None if transport else proxy_for(base_url),
        # Without TLS, skip reading certificates; an empty context trusts no server.
        verify=tls_context() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        transport=transport,
    )


@cache
def _user_agent() -> str:
    return f"training-backends/{version('training-backends')}"
