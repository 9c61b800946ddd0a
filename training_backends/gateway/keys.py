"""API keys: generated here, shown once, stored as a hash.

A key is `tb-<id>-<secret>`: the id selects the row, and the hash of the complete key is compared
in constant time. The secret has 256 random bits, so a fast hash is enough, and each wrong key
costs one hash and at most one lookup by primary key. A valid key is looked up again only after the
store has changed, which is asked for each request: a change by another process applies to the next
one.
"""

import getpass
import hashlib
import hmac
import re
import secrets
import threading
import time as clock
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import SecretStr, TypeAdapter

from training_backends.core.errors import ConfigError, CredentialNotFound, StoreError
from training_backends.core.estimate import Duration
from training_backends.core.run import utc_now
from training_backends.gateway.errors import HTTPProblem, plain
from training_backends.gateway.legacy_store import import_legacy
from training_backends.gateway.store import GatewayStore, database_url
from training_backends.store.gateway_schema import DEFAULT_PROJECT, audit, keys, projects

__all__ = [
    "STATIC_KEY_ID",
    "KeyInfo",
    "KeyState",
    "KeyStore",
    "NewKey",
    "Principal",
    "Scope",
    "check_project",
    "local_operator",
    "open_keys",
    "open_store",
    "read_expiry",
    "unauthorized",
]

STATIC_KEY_ID = "static"
"""Id of the key from the settings: an `admin` key of the default project."""

Scope = Literal["read", "write", "admin"]
"""`read` and `write` apply to the key's project; `admin` reads and writes in all projects."""
KeyState = Literal["active", "revoked", "expired"]

_KEY = re.compile(r"tb-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_NO_HASH = "0" * 64
_MAX_NAME = 80
_LAST_YEAR = 9999
"""Excluded: its last day does not exist in every time zone."""
_MOST_KNOWN = 10_000
_USE_NOTED_EVERY = 60.0
"""Seconds; a durable write per request would cost more than the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """Public information about a key.

    Attributes:
        project: Project it gives access to; objects of other projects are invisible to it.
        expires_at: When it expires, or None.
        last_used_at: When it was last used, to the minute; None: never.
    """

    id: str
    name: str
    scope: Scope
    project: str = DEFAULT_PROJECT
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    @property
    def state(self) -> KeyState:
        """Whether the key is valid now, or why not."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= utc_now():
            return "expired"
        return "active"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A newly created key; `key` is not shown again."""

    info: KeyInfo
    key: SecretStr


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request.

    Attributes:
        key_id: Id of the presented key.
        project: Project of that key; it owns what the caller creates.
        admin: Whether all projects are visible.
        writes: Whether the key does more than read.
        requests_per_second: Limit of the project; None: unlimited.
        address: Where the request comes from, for the audit log.
        request_id: Which request it is, for the audit log.
    """

    key_id: str
    project: str = DEFAULT_PROJECT
    admin: bool = False
    writes: bool = True
    requests_per_second: float | None = None
    address: str = ""
    request_id: str = ""

    def sees(self, owner: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        """Return the condition on a table's project column, part of every client query."""
        return sa.true() if self.admin else owner == self.project

    def record(
        self, connection: sa.Connection, action: str, target: str, *, outcome: str = "ok"
    ) -> None:
        """Add an entry to the audit log, in the transaction of the change that it reports."""
        connection.execute(
            audit.insert().values(
                at=clock.time(),
                actor=self.key_id,
                project=self.project,
                action=action,
                target=target,
                outcome=outcome,
                address=self.address,
                request_id=self.request_id,
            )
        )

    def made(self, table: sa.Table) -> sa.ColumnElement[bool]:
        """Return the condition for the rows that were created with this key."""
        return (table.c.created_by == self.key_id) & (table.c.project == self.project)


@dataclass(frozen=True, slots=True)
class _Known:
    """A caller whose key was valid in a version of the store, until a time."""

    version: Hashable
    caller: Principal
    until: datetime


def local_operator(project: str = DEFAULT_PROJECT) -> Principal:
    """Return the caller that stands for a command run on this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        user = "unknown"
    return Principal(f"local:{user}", project, admin=True)


def check_project(name: str) -> None:
    """Require a valid name of a project.

    Raises:
        ConfigError: It is not.
    """
    if not _PROJECT.fullmatch(name):
        raise ConfigError(
            f"Invalid project name {name!r}.",
            hint="Use 1 to 64 lowercase letters, digits, dots, dashes and underscores, "
            "starting with a letter or digit.",
        )


class KeyStore:
    """The keys of one gateway. Blocking; safe across processes."""

    def __init__(self, store: GatewayStore, static_key: SecretStr | None = None) -> None:
        self._store = store
        self._static = _hash(static_key.get_secret_value()) if static_key else None
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def create(
        self,
        name: str = "",
        *,
        scope: Scope = "write",
        project: str = DEFAULT_PROJECT,
        expires_at: datetime | None = None,
        by: Principal | None = None,
    ) -> NewKey:
        """Create a key.

        Args:
            project: Project it gives access to; created by its first key or object.
            expires_at: When it expires; None: never.
            by: Who creates it, for the audit log; None: a command on this machine.

        Raises:
            ConfigError: The key name or project name is invalid, or `expires_at` is in the past.
        """
        check_project(project)
        if len(name) > _MAX_NAME or (name and not name.isprintable()):
            raise ConfigError(f"Invalid key name: use at most {_MAX_NAME} printable characters.")
        now = utc_now()
        if expires_at is not None and expires_at <= now:
            raise ConfigError(
                f"Expiry {expires_at.astimezone():%Y-%m-%d %H:%M} is in the past.",
                hint="Use a later date, or a duration from now such as 30d.",
            )
        key_id = secrets.token_hex(4)
        key = f"tb-{key_id}-{secrets.token_urlsafe(32)}"
        info = KeyInfo(
            id=key_id,
            name=name,
            scope=scope,
            project=project,
            created_at=now,
            expires_at=expires_at,
        )
        row = {
            "id": key_id,
            "name": name,
            "sha256": _hash(key),
            "scope": scope,
            "project": project,
            "created_at": now.timestamp(),
            "expires_at": expires_at and expires_at.timestamp(),
        }

        def work(connection: sa.Connection) -> None:
            connection.execute(keys.insert().values(row))
            (by or local_operator(project)).record(connection, "key.create", key_id)

        self._store.write(work)
        return NewKey(info, SecretStr(key))

    def list(self) -> Sequence[KeyInfo]:
        """Return all keys, including revoked and expired ones, oldest first."""
        query = sa.select(keys).order_by(keys.c.created_at, keys.c.id)
        return [_info(row) for row in self._store.read(lambda c: c.execute(query).all())]

    def revoke(self, key_id: str, *, by: Principal | None = None) -> KeyInfo:
        """Revoke a key, effective immediately; safe to repeat.

        Args:
            by: Who revokes it, for the audit log; None: a command on this machine.

        Raises:
            CredentialNotFound: No key has this id.
        """
        now = utc_now().timestamp()

        def work(connection: sa.Connection) -> Any:
            mine = keys.c.id == key_id
            done = connection.execute(
                keys.update().where(mine, keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            row = connection.execute(sa.select(keys).where(mine)).first()
            if done.rowcount and row is not None:
                (by or local_operator(row.project)).record(connection, "key.revoke", key_id)
            return row

        row = self._store.write(work)
        if row is None:
            raise CredentialNotFound(
                f"Gateway key {key_id!r} not found.",
                hint="`training-backends keys list` shows the key ids.",
            )
        return _info(row)

    def usable(self) -> bool:
        """Return whether any key is valid now."""
        now = utc_now().timestamp()
        lasts = keys.c.expires_at.is_(None) | (keys.c.expires_at > now)
        query = sa.select(keys.c.id).where(keys.c.revoked_at.is_(None), lasts).limit(1)
        return (
            self._static is not None
            or self._store.read(lambda c: c.execute(query).first()) is not None
        )

    def recall(self, presented: str, version: Hashable) -> Principal | None:
        """Return who presents a key for a read, without asking the store; None: ask `admit`.

        Args:
            version: The present version of the store; see `StoreVersion`.
        """
        known = self._known.get(_hash(presented))
        if known is None or known.version != version or utc_now() >= known.until:
            return None
        return known.caller

    def admit(self, presented: str, *, writes: bool, version: Hashable = None) -> Principal:
        """Authenticate a presented key.

        Only a caller with the complete key learns that it has expired or been revoked.

        Args:
            writes: Whether the request does more than read.
            version: Version of the store before, for `recall`; None: unknown.

        Raises:
            HTTPProblem: 401: the key is unknown, revoked or expired; 403: it is read-only.
        """
        found = _KEY.fullmatch(presented)
        key_id = found[1] if found else None
        return self.admit_hash(key_id, _hash(presented), writes=writes, version=version)

    def admit_hash(
        self, key_id: str | None, given: str, *, writes: bool, version: Hashable = None
    ) -> Principal:
        """Do what `admit` does, by the id in a key and the hash of the complete key."""
        if self._static is not None and hmac.compare_digest(self._static, given):
            caller = Principal(STATIC_KEY_ID, admin=True, requests_per_second=self._static_rate())
            return self._remember(given, version, caller)
        row = self._row(key_id) if key_id else None
        if not hmac.compare_digest(row.sha256 if row else _NO_HASH, given) or row is None:
            raise unauthorized()
        key = _info(row)
        if key.state != "active":
            raise unauthorized(f"This API key is {key.state}.")
        if writes and key.scope == "read":
            raise plain(403, "This API key is read-only; the request needs the write scope.")
        self._note_use(key)
        caller = Principal(
            key.id,
            key.project,
            admin=key.scope == "admin",
            writes=key.scope != "read",
            requests_per_second=row.requests_per_second,
        )
        return self._remember(given, version, caller, key.expires_at)

    def _remember(
        self, given: str, version: Hashable, caller: Principal, ends: datetime | None = None
    ) -> Principal:
        if version is not None:
            until = utc_now() + timedelta(seconds=_USE_NOTED_EVERY / 2)
            known = _Known(version, caller, min(until, ends or until))
            with self._lock:
                self._known[given] = known
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        return caller

    def hash_of(self, principal: Principal) -> str:
        """Return the hash of the key that a caller presented."""
        if principal.key_id == STATIC_KEY_ID:
            return self._static or _NO_HASH
        row = self._row(principal.key_id)
        return str(row.sha256) if row else _NO_HASH

    def info(self, principal: Principal) -> KeyInfo:
        """Return what is public about the key that a caller presented."""
        row = self._row(principal.key_id)
        if row is not None:
            return _info(row)
        return KeyInfo(
            id=principal.key_id,
            name="static key",
            scope="admin" if principal.admin else "read",
            project=principal.project,
            created_at=datetime.fromtimestamp(0, UTC),
        )

    def _row(self, key_id: str) -> Any:
        query = sa.select(keys, projects.c.requests_per_second).where(keys.c.id == key_id)
        query = query.outerjoin(projects, projects.c.id == keys.c.project)
        return self._store.read(lambda connection: connection.execute(query).first())

    def _static_rate(self) -> float | None:
        limit = sa.select(projects.c.requests_per_second).where(projects.c.id == DEFAULT_PROJECT)
        return self._store.read(lambda connection: connection.execute(limit).scalar())

    def _note_use(self, key: KeyInfo) -> None:
        now = utc_now()
        if key.last_used_at and (now - key.last_used_at).total_seconds() < _USE_NOTED_EVERY:
            return
        used = keys.update().where(keys.c.id == key.id).values(last_used_at=now.timestamp())
        # A full disk must not block read requests.
        with suppress(StoreError):
            self._store.write(lambda connection: connection.execute(used))


def unauthorized(sentence: str = "Unauthorized") -> HTTPProblem:
    """Return a 401."""
    return HTTPProblem(401, {"detail": sentence}, {"www-authenticate": "Bearer"})


def open_keys(home: Path, store_url: str | None = None) -> KeyStore:
    """Open the keys of the gateway in `home`, running or not.

    Args:
        store_url: URL of its database; None: the file in `home`.
    """
    return KeyStore(open_store(home, store_url))


def open_store(home: Path, store_url: str | None = None) -> GatewayStore:
    """Open the database of the gateway in `home`, running or not.

    Args:
        store_url: Its URL; None: the file in `home`.
    """
    root = home.expanduser().absolute() / "gateway"
    store = GatewayStore(database_url(root, store_url))
    if store_url is None:
        import_legacy(store, root)
    return store


def read_expiry(text: str) -> datetime:
    """Parse an expiry time.

    Args:
        text: A duration from now (`30d`, `12h`), a date, meaning the end of that day
            (`2027-01-31`), or a time (`2027-01-31T12:00`), in local time unless it has a zone.

    Raises:
        ConfigError: The text has none of these forms.
    """
    try:
        moment = _read_moment(text.strip())
    except (ValueError, OverflowError):
        moment = None
    if moment is None or moment.year >= _LAST_YEAR:
        raise ConfigError(
            f"Invalid --expires value {text!r}.",
            hint="Use a duration such as 30d or 12h, or a date such as 2027-01-31. Omit it for a "
            "key that does not expire.",
        )
    return moment


def _read_moment(text: str) -> datetime | None:
    if _DAY.fullmatch(text):
        return datetime.combine(datetime.fromisoformat(text), time(23, 59, 59)).astimezone(UTC)
    if _DAY.match(text):
        return datetime.fromisoformat(text).astimezone(UTC)
    if text.isdigit():
        return None  # no unit
    span: timedelta = TypeAdapter(Duration).validate_python(text)
    return utc_now() + span


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _info(row: Any) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        name=row.name,
        scope=row.scope,
        project=row.project,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        expires_at=_moment(row.expires_at),
        revoked_at=_moment(row.revoked_at),
        last_used_at=_moment(row.last_used_at),
    )


def _moment(timestamp: float | None) -> datetime | None:
    return None if timestamp is None else datetime.fromtimestamp(timestamp, UTC)
