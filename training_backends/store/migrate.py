"""Migrations of a store. Loads alembic (0.15 s), so it is imported only when they are needed."""

import threading
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from training_backends.core.errors import StoreError
from training_backends.store.schema import REVISION, revision, schema_version

__all__ = ["migrate"]

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_MIGRATING: Final = threading.Lock()
"""Alembic has module-level state, so only one thread of a process migrates at a time."""
_BEFORE_ALEMBIC: Final = "0001"
"""Revision of a store with a `schema_version` table."""


def migrate(engine: sa.Engine) -> None:
    """Upgrade an older store, or a database with other tables, to the latest revision at once.

    Safe to run in several processes at once: the first one migrates.

    Args:
        engine: Its transactions take the write lock when they begin.

    Raises:
        StoreError: The store was written by a newer version.
    """
    config = Config()
    # Config interpolates %.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with _MIGRATING, engine.begin() as connection:
        config.attributes["connection"] = connection
        found = _found(connection)
        if found == REVISION:
            return
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if found not in {*known, None}:
            raise StoreError(
                f"The run store was written by a newer version (revision {found}; "
                f"this version supports {REVISION}).",
                hint="Upgrade training-backends.",
            )
        if found == _BEFORE_ALEMBIC:
            command.stamp(config, _BEFORE_ALEMBIC)
        command.upgrade(config, "head")


def _found(connection: sa.Connection) -> str | None:
    """Return the revision of a store, before or after alembic; None: the store is empty."""
    tables = sa.inspect(connection)
    if tables.has_table(revision.name):
        return connection.execute(sa.select(revision.c.version_num)).scalar()
    if tables.has_table(schema_version.name):
        number = connection.execute(sa.select(schema_version.c.version)).scalar()
        return f"{number or 1:04}"
    return None
