"""API keys: made here, shown once, kept as a hash.

A key is `tb-<id>-<secret>`: the id finds the row, the hash of the whole key is compared
in constant time. The secret has 256 random bits, so a fast hash is enough.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from training_backends.core.errors import ConfigError, CredentialNotFound
from training_backends.core.run import utc_now
from training_backends.gateway.store import GatewayStore, keys

__all__ = ["STATIC_KEY_ID", "KeyInfo", "KeyStore", "NewKey", "open_keys"]

STATIC_KEY_ID = "static"
"""Stands for the key from the settings."""

_NO_HASH = "0" * 64
_MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be shown of a key."""

    id: str
    name: str
    created_at: datetime
    revoked_at: datetime | None

    @property
    def active(self) -> bool:
        """Whether the key opens the gateway."""
        return self.revoked_at is None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; `key` is never shown again."""

    info: KeyInfo
    key: SecretStr


class KeyStore:
    """The keys of one gateway. Blocking; several processes may use it at once."""

    def __init__(self, store: GatewayStore, static_key: SecretStr | None = None) -> None:
        self._store = store
        self._static = _hash(static_key.get_secret_value()) if static_key else None

    def create(self, name: str = "") -> NewKey:
        """Make a key.

        Raises:
            ConfigError: The name is too long or cannot be printed.
        """
        if len(name) > _MAX_NAME or (name and not name.isprintable()):
            raise ConfigError(f"A key's name is printable and has at most {_MAX_NAME} characters.")
        key_id = secrets.token_hex(4)
        key = f"tb-{key_id}-{secrets.token_urlsafe(32)}"
        now = utc_now()
        row = {"id": key_id, "name": name, "sha256": _hash(key), "created_at": now.timestamp()}
        self._store.write(lambda connection: connection.execute(keys.insert().values(row)))
        return NewKey(KeyInfo(key_id, name, now, None), SecretStr(key))

    def list(self) -> Sequence[KeyInfo]:
        """Return all keys ever made, oldest first."""
        query = sa.select(keys).order_by(keys.c.created_at)
        return [_info(row) for row in self._store.read(lambda c: c.execute(query).all())]

    def revoke(self, key_id: str) -> KeyInfo:
        """Make a key useless from the next request on; safe to repeat.

        Raises:
            CredentialNotFound: There is no such key.
        """
        now = utc_now().timestamp()

        def work(connection: sa.Connection) -> Any:
            mine = keys.c.id == key_id
            connection.execute(
                keys.update().where(mine, keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            return connection.execute(sa.select(keys).where(mine)).first()

        row = self._store.write(work)
        if row is None:
            raise CredentialNotFound(
                f"There is no gateway key {key_id!r}.",
                hint="`training-backends keys list` shows their ids.",
            )
        return _info(row)

    def usable(self) -> bool:
        """Tell whether any key opens the gateway."""
        return self._static is not None or any(key.active for key in self.list())

    def identify(self, presented: str) -> str | None:
        """Return the id of the key that `presented` is, or None if it is none of ours.

        Every comparison takes the same time whatever was presented.
        """
        given = _hash(presented)
        if self._static is not None and hmac.compare_digest(self._static, given):
            return STATIC_KEY_ID
        prefix, _, rest = presented.partition("-")
        key_id = rest.partition("-")[0] if prefix == "tb" else ""
        query = sa.select(keys.c.sha256).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
        known = self._store.read(lambda connection: connection.execute(query).scalar())
        matches = hmac.compare_digest(known or _NO_HASH, given)
        return key_id if known and matches else None


def open_keys(home: Path) -> KeyStore:
    """Open the keys of the gateway whose state lies in `home`, running or not."""
    return KeyStore(GatewayStore(home / "gateway" / "gateway.db"))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _info(row: Any) -> KeyInfo:
    revoked = None if row.revoked_at is None else datetime.fromtimestamp(row.revoked_at, UTC)
    return KeyInfo(row.id, row.name, datetime.fromtimestamp(row.created_at, UTC), revoked)
