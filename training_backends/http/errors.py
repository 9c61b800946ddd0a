"""Transport errors of httpx, turned into ours by one table."""

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
        httpx.ConnectTimeout: "no connection within the time limit",
        httpx.ReadTimeout: "no answer within the time limit",
        httpx.WriteTimeout: "the request could not be sent within the time limit",
        httpx.PoolTimeout: "all connections were busy for too long",
        httpx.ConnectError: "no connection",
        httpx.ReadError: "the connection broke before the answer was complete",
        httpx.WriteError: "the connection broke while the request was sent",
        httpx.CloseError: "the connection broke",
        httpx.RemoteProtocolError: "the connection ended before the answer was complete",
        httpx.LocalProtocolError: "the request could not be written",
        httpx.ProxyError: "the proxy did not let the request through",
    }
)  # most specific class first where they overlap; the first match counts


def error_from_transport(
    error: httpx.HTTPError | httpx.InvalidURL | UnicodeError,
    *,
    call: str,
    sent: bool,
    backend: str | None = None,
) -> TrainingBackendError:
    """Say what became of a call that got no answer.

    Args:
        call: What was asked, for example `GET https://host/v1/models`.
        sent: Whether the request's first byte had left.
    """
    if isinstance(error, httpx.InvalidURL | UnicodeError):
        # Its text quotes what it chokes on, and a host name is looked up in IDNA.
        return ConfigError(
            f"{call}: the base URL cannot be used.",
            hint="Its host name or port is not valid.",
            backend=backend,
        )
    if isinstance(error, httpx.UnsupportedProtocol):
        return ConfigError(f"{call}: only http and https URLs can be used.", backend=backend)
    if isinstance(error, httpx.DecodingError):
        return ProtocolError(f"{call}: the answer's encoding is broken.", backend=backend)
    text = str(error)
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return BackendUnavailable(
            f"{call}: the server's certificate cannot be trusted.",
            hint="Behind a proxy that reads TLS, name its certificate in SSL_CERT_FILE.",
            sent=False,
            retryable=False,
            backend=backend,
        )
    what = next((w for kind, w in _WHAT_HAPPENED.items() if isinstance(error, kind)), "it failed")
    return BackendUnavailable(
        f"{call}: {what}{f' ({text})' if text else ''}.",
        hint=None if sent else "Is the server running, and the base URL right?",
        sent=sent,
        backend=backend,
    )
