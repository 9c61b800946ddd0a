"""Proxies and certificates from the environment, with the semantics of curl.

httpx would read these variables itself, but it rejects values that curl accepts, and its errors
quote invalid values, which may contain part of a password. Errors of this module never do.
"""

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies

import httpx

from training_backends.core.errors import BackendNotInstalled, ConfigError
from training_backends.core.redaction import register_proxy
from training_backends.http.urls import is_loopback

__all__ = ["proxy_environment", "proxy_for", "tls_context"]

_SCHEMES: Final = ("http", "https", "socks5", "socks5h")
_PORTS: Final = MappingProxyType({"http": 80, "https": 443})
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::(?P<port>\d{1,5})?)?")


def proxy_for(base_url: str) -> httpx.Proxy | None:
    """Return the proxy for a server, or None.

    Loopback servers are always reached directly: a proxy would see the unencrypted key.

    Raises:
        ConfigError: The proxy variable is invalid.
        BackendNotInstalled: The variable names a SOCKS proxy and socksio is not installed.
    """
    if is_loopback(base_url):
        return None
    found = getproxies()
    scheme = urlsplit(base_url).scheme
    chosen = next((name for name in (scheme, "all") if found.get(name)), None)
    if chosen is None or _is_bypassed(base_url, found.get("no", "")):
        return None
    proxy = _read_proxy(chosen, found[chosen])
    if proxy.scheme.startswith("socks") and find_spec("socksio") is None:
        raise BackendNotInstalled(
            f"{_variable(chosen)} names a SOCKS proxy, which needs the package socksio.",
            install="pip install 'training-backends[socks]'",
            hint="Install it with `pip install 'training-backends[socks]'`, or use an HTTP proxy.",
        )
    try:
        return httpx.Proxy(f"{proxy.scheme}://{proxy.address}", auth=proxy.auth)
    except httpx.InvalidURL:
        raise _unusable(_variable(chosen), "its host name is invalid") from None


def proxy_environment() -> dict[str, str]:
    """Return the proxy variables for a subprocess that uses httpx.

    Raises:
        ConfigError: A proxy variable is invalid.
    """
    found = getproxies()
    given = {
        f"{name}_proxy": str(_read_proxy(name, found[name]))
        for name in ("http", "https", "all")
        if found.get(name)
    }
    entries = [entry.strip("[]") for entry in _entries(found.get("no", ""))]
    # httpx supports no IPv6 networks here.
    readable = [entry for entry in entries if not (":" in entry and "/" in entry)]
    return {**given, **({"no_proxy": ",".join(readable)} if readable else {})}


def tls_context() -> ssl.SSLContext:
    """Return a context with the CAs of SSL_CERT_FILE or SSL_CERT_DIR, else those of certifi.

    Reads from disk; do not call it in the event loop.

    Raises:
        ConfigError: The file or directory is invalid.
    """
    unusable = next((name for name in _CERTIFICATES if not _is_usable(name)), None)
    if unusable is not None:
        raise _unusable(unusable, "it contains no readable certificate")
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        if not os.environ.get("SSLKEYLOGFILE"):
            raise
        raise _unusable("SSLKEYLOGFILE", error.strerror or "it cannot be written") from None


def _is_usable(variable: str) -> bool:
    path = os.environ.get(variable)
    if not path:
        return True
    try:
        if variable == "SSL_CERT_FILE":
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            return True
        return any(Path(path).iterdir())
    except OSError:  # ssl.SSLError is one
        return False


class _Proxy(NamedTuple):
    """A proxy from an environment variable.

    Attributes:
        address: Host and optional port.
        auth: User and password, or None.
    """

    scheme: str
    address: str
    auth: tuple[str, str] | None

    def __str__(self) -> str:
        user = "" if self.auth is None else ":".join(quote(part, safe="") for part in self.auth)
        return f"{self.scheme}://{user}{'@' if user else ''}{self.address}"


def _read_proxy(name: str, value: str) -> _Proxy:
    register_proxy(value)
    variable = _variable(name)
    scheme, found, rest = value.strip().partition("://")
    if not found:
        scheme, rest = "http", scheme
    if scheme.lower() not in _SCHEMES:
        raise _unusable(variable, f"its scheme must be one of {', '.join(_SCHEMES)}")
    userinfo, at, address = rest.removesuffix("/").rpartition("@")
    if re.search(r"[/?#]", rest.removesuffix("/")):
        why = "it has a path" if not at else "its user or password contains /, ? or #"
        raise _unusable(variable, why)
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise _unusable(variable, "its host or port is invalid")
    host, port = match["host"], match["port"]
    if port and not 0 < int(port) < 65536:
        raise _unusable(variable, "its port is not between 1 and 65535")
    with suppress(UnicodeError):
        host = host if host.startswith("[") else host.encode("idna").decode()
        user, _, password = userinfo.partition(":")
        auth = (unquote(user), unquote(password)) if at else None
        return _Proxy(scheme.lower(), f"{host}:{port}" if port else host, auth)
    raise _unusable(variable, "its host name is invalid")


def _unusable(variable: str, why: str) -> ConfigError:
    hint = f"Fix or unset {variable}."
    if variable.lower().endswith("_proxy"):
        hint += (
            " Percent-encode special characters in the user name and password "
            "(%2F for /, %23 for #, %3F for ?, %40 for @)."
        )
    return ConfigError(f"Invalid {variable}: {why}.", hint=hint)


def _variable(name: str) -> str:
    """Return the variable's name as it is set; on macOS it may be a system setting."""
    wanted = f"{name}_proxy"
    # urllib prefers lower case.
    names = [each for each in (wanted, *os.environ) if each.lower() == wanted]
    return next((each for each in names if os.environ.get(each)), wanted.upper())


def _is_bypassed(base_url: str, no_proxy: str) -> bool:
    parts = urlsplit(base_url)
    host = (parts.hostname or "").rstrip(".")
    port = parts.port or _PORTS.get(parts.scheme)
    return any(_covers(entry, host, port) for entry in _entries(no_proxy))


def _entries(no_proxy: str) -> Iterator[str]:
    return (entry for entry in re.split(r"[\s,]+", no_proxy) if entry)


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Return whether an entry of NO_PROXY covers a host; an invalid entry covers none."""
    entry = entry.rpartition("://")[2].lower()
    if entry == "*":
        return True
    with suppress(ValueError):
        network = ip_network(re.sub(r"[\[\]]", "", entry), strict=False)
        with suppress(ValueError):
            return ip_address(host) in network
        return False
    name, colon, of_port = entry.partition(":")
    if colon and of_port != str(port):
        return False
    name = name.removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))
