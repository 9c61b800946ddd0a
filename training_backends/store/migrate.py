"""Bring a store to the newest revision. Loads alembic, so import this only when it is needed."""

import threading
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from training_backends.core.errors import StoreError
from training_backends.store.schema import REVISION, revision

__all__ = ["migrate"]

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_ALONE: Final = threading.Lock()
"""Alembic keeps what it is at in its modules, so one thread of a process migrates at a time."""
_BEFORE_ALEMBIC: Final = "0001"
"""What a store is whose version stands in a table `schema_version`."""


def migrate(engine: sa.Engine) -> None:
    """Bring a new or older store to the newest revision, in one transaction.

    Safe when several processes do it at once: the first does it, the others find it done.

    Args:
        engine: Takes the write lock when it begins.

    Raises:
        StoreError: The store was written by a newer version.
    """
    config = Config()
    # A Config takes % for the beginning of a reference.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with _ALONE, engine.begin() as connection:
        config.attributes["connection"] = connection
        found = _found(connection)
        if found == REVISION:
            return
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if found not in {*known, None}:
            raise StoreError(
                f"The run store was written by a newer version (revision {found}, "
                f"this one knows {REVISION}).",
                hint="Upgrade training-backends.",
            )
        if found == _BEFORE_ALEMBIC:
            command.stamp(config, _BEFORE_ALEMBIC)
        command.upgrade(config, "head")


def _found(connection: sa.Connection) -> str | None:
    """Return the revision of a store, however it says so; None: it is empty."""
    tables = sa.inspect(connection)
    if tables.has_table(revision.name):
        return connection.execute(sa.select(revision.c.version_num)).scalar()
    if tables.has_table("schema_version"):
        number = connection.execute(sa.text("SELECT version FROM schema_version")).scalar()
        return f"{number or 1:04}"
    return None
