"""Sessions of the console: a cookie that stands for an API key.

The cookie holds a random token, the database its hash. A session grants what its key grants at the
moment of the request, so a revoked or expired key ends it. Requests that another site could have
caused are rejected: `Sec-Fetch-Site` or `Origin` must name this gateway, and a request that
changes something must repeat a value that only the console's own scripts can read.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import urlsplit

import sqlalchemy as sa
from anyio import to_thread

from training_backends.gateway.errors import plain
from training_backends.gateway.keys import KeyStore, Principal, unauthorized
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import sessions

__all__ = ["CSRF_HEADER", "SESSION_SECONDS", "ConsoleSessions", "csrf_token"]

CSRF_HEADER: Final = "x-console-token"
SESSION_SECONDS: Final = 12 * 3600
_READS: Final = frozenset({"GET", "HEAD"})
_FOREIGN: Final = "This request came from another site."


class ConsoleSessions:
    """The sessions of one gateway.

    Args:
        public_url: URL that browsers use; https makes the cookie `Secure`.
    """

    def __init__(self, store: GatewayStore, keys: KeyStore, *, public_url: str) -> None:
        self._store = store
        self._keys = keys
        self._url = urlsplit(public_url)
        self._is_secure = self._url.scheme == "https"
        # Browsers send a host's cookies to all of its ports.
        port = self._url.port or (443 if self._is_secure else 80)
        prefix = "__Host-" if self._is_secure else ""
        self._name = f"{prefix}tb-session-{port}"

    def open(self, presented: str, *, address: str, request_id: str) -> str:
        """Start a session for a key and return its token. Blocking.

        Args:
            address: Where the request comes from, for the audit log.
            request_id: Which request it is, for the audit log.

        Raises:
            HTTPProblem: 401: the key is unknown, revoked or expired.
        """
        caller = self._keys.admit(presented, writes=False)
        caller = replace(caller, address=address, request_id=request_id)
        token = secrets.token_urlsafe(32)
        row = {
            "sha256": _hash(token),
            "key_id": caller.key_id,
            "key_sha256": self._keys.hash_of(caller),
            "expires_at": time.time() + SESSION_SECONDS,
        }

        def work(connection: sa.Connection) -> None:
            connection.execute(sessions.delete().where(sessions.c.expires_at < time.time()))
            connection.execute(sessions.insert().values(row))
            caller.record(connection, "session.open", caller.key_id)

        self._store.write(work)
        return token

    def close(self, token: str) -> None:
        """End a session. Blocking."""
        mine = sessions.delete().where(sessions.c.sha256 == _hash(token))
        self._store.write(lambda connection: connection.execute(mine))

    def admit(self, token: str, *, writes: bool) -> Principal:
        """Return the caller of a session. Blocking.

        Raises:
            HTTPProblem: 401: the session has ended; 403: its key is read-only.
        """
        query = sa.select(sessions).where(
            sessions.c.sha256 == _hash(token), sessions.c.expires_at > time.time()
        )
        row = self._store.read(lambda connection: connection.execute(query).first())
        if row is None:
            raise unauthorized("The session has ended; sign in again.")
        return self._keys.admit_hash(row.key_id, row.key_sha256, writes=writes)

    async def admit_request(self, method: str, headers: Mapping[bytes, bytes]) -> Principal | None:
        """Return the caller of a browser's request, or None if it has no session cookie.

        Raises:
            HTTPProblem: The session has ended, its key does not allow this, or the request may
                come from another site.
        """
        writes = method not in _READS
        token = self.checked_token(headers, writes=writes)
        if token is None:
            return None
        return await to_thread.run_sync(partial(self.admit, token, writes=writes))

    def checked_token(self, headers: Mapping[bytes, bytes], *, writes: bool) -> str | None:
        """Return the session token of a request that the console sent, or None without one.

        Raises:
            HTTPProblem: The request may come from another site.
        """
        token = self._token(headers)
        if token is None:
            return None
        self.check_site(headers, navigates=not writes)
        given = headers.get(CSRF_HEADER.encode(), b"")
        if writes and not hmac.compare_digest(given, csrf_token(token).encode()):
            raise plain(403, f"The header {CSRF_HEADER} is missing or wrong; reload the page.")
        return token

    def check_site(self, headers: Mapping[bytes, bytes], *, navigates: bool = False) -> None:
        """Check that a request comes from the console itself.

        Args:
            navigates: The user may have entered the address.

        Raises:
            HTTPProblem: It comes from another site.
        """
        site = headers.get(b"sec-fetch-site")
        if site is not None:
            if site == b"same-origin" or (navigates and site == b"none"):
                return
            raise plain(403, _FOREIGN)
        origin = headers.get(b"origin")
        if origin is None:
            return
        host = urlsplit(origin.decode("latin-1")).netloc
        if host not in {headers.get(b"host", b"").decode("latin-1"), self._url.netloc}:
            raise plain(403, _FOREIGN)

    def _token(self, headers: Mapping[bytes, bytes]) -> str | None:
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return None
        found = cookies.get(self._name)
        return found.value if found and found.value else None

    def cookie(self, token: str) -> str:
        """Return the `Set-Cookie` header of a session; an empty token deletes it."""
        parts = [
            f"{self._name}={token}",
            f"Max-Age={SESSION_SECONDS if token else 0}",
            "Path=/",
            "HttpOnly",
            "SameSite=Strict",
        ]
        return "; ".join([*parts, *(["Secure"] if self._is_secure else [])])


def csrf_token(token: str) -> str:
    """Return what requests of a session must repeat in `CSRF_HEADER`."""
    return hmac.new(token.encode(), b"console", hashlib.sha256).hexdigest()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
