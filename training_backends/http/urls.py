"""Base URLs of servers, and whether a key may be sent there."""

import re
from ipaddress import ip_address
from urllib.parse import quote, urlsplit

from training_backends.core.errors import ConfigError, Issue, RunNotFound

__all__ = [
    "is_loopback",
    "normalize_base_url",
    "path_segment",
    "path_template",
    "require_private_transport",
]

_WORD = re.compile(r"v\d+|[a-z][a-z_-]{0,39}")


def path_template(path: str) -> str:
    """Return a path without its query and with `{id}` for each id or name, for spans.

    What follows a plural is a name, as in `/v1/files/train`, and so is what has other characters
    than those of a word.
    """
    before, found = "", []
    for each in path.partition("?")[0].split("/"):
        is_word = not before.endswith("s") and (not each or _WORD.fullmatch(each))
        found.append(each if is_word else "{id}")
        before = each
    return "/".join(found)


def normalize_base_url(text: str, *, drop_suffix: str = "") -> str:
    """Return `scheme://host[:port][/path]` without a trailing slash.

    Args:
        drop_suffix: A trailing path segment to remove, which people often add.

    Raises:
        ConfigError: The URL is not an absolute http(s) URL, or contains credentials.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        # Do not quote it: a key may have been pasted into it.
        raise _bad_url("its host or port is invalid") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _bad_url("use https://host or https://host:port")
    if parts.username or parts.password:
        raise _bad_url("it contains a user name or password; store the key as a credential instead")
    if parts.query or parts.fragment:
        raise _bad_url("it contains a query or fragment")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    if drop_suffix:
        path = path.removesuffix("/" + drop_suffix.strip("/")).rstrip("/")
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{path}"


def _bad_url(why: str) -> ConfigError:
    issue = Issue(code="bad_base_url", message=why, field="base_url")
    return ConfigError(f"Invalid base URL: {why}.", issues=[issue])


def path_segment(identifier: str) -> str:
    """Quote a provider's id as one segment of a path; colons are not escaped.

    Raises:
        RunNotFound: The id is empty or consists of dots, and would address something else.
    """
    if identifier.strip("./ ") == "":
        # An empty id would address the collection, perhaps to delete it.
        raise RunNotFound(f"Invalid id {identifier!r}.")
    return quote(identifier, safe=":")


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is a loopback address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def require_private_transport(
    url: str, *, backend: str | None = None, what: str = "the API key"
) -> None:
    """Reject URLs that would send a key or data unencrypted.

    Args:
        what: What would be sent.

    Raises:
        ConfigError: The URL is plain http to a non-loopback host.
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
        f"Refusing to send {what} over plain HTTP to another host.",
        issues=[issue],
        hint="API keys and training data are sent over https or to a loopback address only. "
        + str(issue.fix).capitalize()
        + ".",
        backend=backend,
    )
