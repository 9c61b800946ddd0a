"""Where a server is, and whether a key may travel there."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from training_backends.core.errors import ConfigError, Issue

__all__ = ["is_loopback", "normalize_base_url", "require_private_transport"]


def normalize_base_url(text: str, *, drop_suffix: str = "") -> str:
    """Return `scheme://host[:port][/path]` without a trailing slash.

    Args:
        drop_suffix: A last path segment that people add and that is not part of it.

    Raises:
        ConfigError: Not an absolute http(s) URL, or one that holds a password.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        # What was wrong with it may be a key that was pasted into it.
        raise _bad_url("its host or port is none") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _bad_url("give it as https://host, with a port where it has one")
    if parts.username or parts.password:
        raise _bad_url("it holds a user name or password; keys come from the vault")
    if parts.query or parts.fragment:
        raise _bad_url("it holds a query or fragment")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    if drop_suffix:
        path = path.removesuffix("/" + drop_suffix.strip("/")).rstrip("/")
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{path}"


def _bad_url(why: str) -> ConfigError:
    issue = Issue(code="bad_base_url", message=why, field="base_url")
    return ConfigError(f"The base URL cannot be used: {why}.", issues=[issue])


def is_loopback(url: str) -> bool:
    """Tell whether a URL leads to this machine only."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def require_private_transport(url: str, *, backend: str | None = None) -> None:
    """Refuse to send a key where others can read it.

    Raises:
        ConfigError: Plain http to another host.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" or is_loopback(url):
        return
    issue = Issue(
        code="key_over_http",
        message=f"{parts.scheme}://{parts.hostname} is not encrypted",
        field="base_url",
        fix=f"use https://{parts.hostname}, or a tunnel that ends on this machine",
    )
    raise ConfigError(
        "The key is not sent over plain http to another host.",
        issues=[issue],
        hint="Only https and the loopback address carry a key. "
        + str(issue.fix).capitalize()
        + ".",
        backend=backend,
    )
