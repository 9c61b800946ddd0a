"""The files with which the gateway serves https, checked before anything is begun."""

import ssl
from pathlib import Path
from typing import Any

from training_backends.core.errors import ConfigError, Issue
from training_backends.gateway.settings import GatewaySettings

__all__ = ["server_options"]


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
