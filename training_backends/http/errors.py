"""Translation of httpx transport errors."""

from collections.abc import Mapping
from types import MappingProxyType

import httpx

from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    ProtocolError,
    TrainingBackendError,
)

__all__ = ["error_from_transport"]

_WHAT_HAPPENED: Mapping[type[httpx.HTTPError], str] = MappingProxyType(
    {
        httpx.ConnectTimeout: "connection timed out",
        httpx.ReadTimeout: "timed out waiting for the response",
        httpx.WriteTimeout: "timed out sending the request",
        httpx.PoolTimeout: "timed out waiting for a free connection",
        httpx.ConnectError: "connection failed",
        httpx.ReadError: "connection lost before the response was complete",
        httpx.WriteError: "connection lost while sending the request",
        httpx.CloseError: "connection lost",
        httpx.RemoteProtocolError: "connection closed before the response was complete",
        httpx.LocalProtocolError: "invalid request",
        httpx.ProxyError: "the proxy rejected the request",
    }
)  # subclasses first: the first match counts


def error_from_transport(
    error: httpx.HTTPError | httpx.InvalidURL | UnicodeError,
    *,
    call: str,
    sent: bool,
    backend: str | None = None,
) -> TrainingBackendError:
    """Return the exception for a call without a response.

    Args:
        call: Method and URL, for example `GET https://host/v1/models`.
        sent: Whether the request's first byte was sent.
    """
    if isinstance(error, httpx.InvalidURL | UnicodeError):
        # Raised by IDNA encoding; its text quotes the invalid value.
        return ConfigError(
            f"{call}: invalid base URL.",
            hint="Its host name or port is invalid.",
            backend=backend,
        )
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConfigError(f"{call}: only http and https URLs are supported.", backend=backend)
    if isinstance(error, httpx.DecodingError):
        return ProtocolError(f"{call}: the response's encoding is corrupt.", backend=backend)
    text = str(error)
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return BackendUnavailable(
            f"{call}: the server's certificate is not trusted.",
            hint="Behind a TLS-inspecting proxy, set SSL_CERT_FILE to its CA certificate.",
            sent=False,
            retryable=False,
            backend=backend,
        )
    what = next(
        (w for kind, w in _WHAT_HAPPENED.items() if isinstance(error, kind)), "request failed"
    )
    return BackendUnavailable(
        f"{call}: {what}{f' ({text})' if text else ''}.",
        hint=None if sent else "Check that the server is running and the base URL is correct.",
        sent=sent,
        backend=backend,
    )
