"""Separate documents from query columns; add uploads, leases and timelines."""

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from training_backends.store.schema import BigInteger, short_text

revision = "0002"
down_revision = "0001"

_BATCH = 1000


def upgrade() -> None:
    """Create the new tables and fill the runs tables from the documents."""
    _rebuild_runs()
    _make_records()
    op.create_table(
        "uploads",
        sa.Column("scope", short_text(500), primary_key=True),
        sa.Column("sha256", short_text(64), primary_key=True),
        sa.Column("remote_id", short_text(256), nullable=False),
        sa.Column("uploaded_at", short_text(40), nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("token", BigInteger, primary_key=True),
        sa.Column("name", short_text(200), nullable=False, unique=True),
        sa.Column("owner", short_text(200), nullable=False),
        sa.Column("until", short_text(40), nullable=False),
        sqlite_autoincrement=True,
    )
    # Versions before alembic check this table and reject newer stores.
    op.execute("UPDATE schema_version SET version = 2")


def _rebuild_runs() -> None:
    # Under new names first: dropping the old runs would also delete the rows that reference them.
    # Renaming updates the references.
    runs = op.create_table(
        "new_runs",
        sa.Column("id", short_text(128), primary_key=True),
        sa.Column("backend", short_text(128), nullable=False),
        sa.Column("status", short_text(32), nullable=False),
        sa.Column("created_at", short_text(40), nullable=False),
        sa.Column("remote_id", short_text(256)),
        sa.Column("seen_at", short_text(40)),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("cursor", sa.Text),
        sa.Column("whole", sa.Boolean, nullable=False),
    )
    documents = op.create_table(
        "documents",
        _of_run("new_runs"),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_table(
        "new_journal",
        _of_run("new_runs"),
        sa.Column("name", short_text(200), primary_key=True),
        sa.Column("begun_at", short_text(40), nullable=False),
        sa.Column("result", sa.Text),
    )
    connection = op.get_bind()
    old = connection.execute(
        sa.text(
            "SELECT id, backend, status, created_at, document FROM runs ORDER BY created_at, id"
        )
    )
    for rows in old.mappings().partitions(_BATCH):
        connection.execute(runs.insert(), [_columns(dict(row)) for row in rows])
        connection.execute(
            documents.insert(),
            [{"run_id": row["id"], "document": row["document"]} for row in rows],
        )
    op.execute(
        "INSERT INTO new_journal (run_id, name, begun_at, result) "
        "SELECT run_id, name, begun_at, result FROM journal"
    )
    op.drop_table("journal")
    op.drop_table("runs")
    op.rename_table("new_runs", "runs")
    op.rename_table("new_journal", "journal")
    op.create_index("runs_by_status", "runs", ["status", "backend", "created_at"])
    op.create_index("runs_by_remote_id", "runs", ["remote_id"])


def _make_records() -> None:
    op.create_table(
        "records",
        sa.Column("id", BigInteger, primary_key=True),
        _of_run(key=False),
        sa.Column("seq", BigInteger, nullable=False),
        sa.Column("at", short_text(40), nullable=False),
        sa.Column("level", short_text(16), nullable=False),
        sa.Column("source", short_text(64), nullable=False),
        sa.Column("step", BigInteger),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("fields", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("records_by_run", "records", ["run_id", "seq"], unique=True)
    op.create_table(
        "metrics",
        _of_run(),
        sa.Column("step", BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", short_text(128), primary_key=True),
        sa.Column("at", short_text(40), nullable=False),
        sa.Column("value", sa.Float, nullable=False),
    )
    record = sa.ForeignKey("records.id", ondelete="CASCADE")
    op.create_table(
        "deliveries",
        sa.Column("id", BigInteger, record, primary_key=True, autoincrement=False),
        sa.Column("backend", short_text(128), nullable=False),
    )
    op.create_index("deliveries_by_backend", "deliveries", ["backend", "id"])


def _of_run(table: str = "runs", *, key: bool = True) -> sa.Column[str]:
    run = sa.ForeignKey(f"{table}.id", ondelete="CASCADE")
    return sa.Column("run_id", short_text(128), run, primary_key=key, nullable=False)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    try:
        known = json.loads(row["document"])
    except ValueError:
        known = {}  # reported when that run is read; must not block the others
    seen_at = known.get("last_seen_at")
    return {
        "id": row["id"],
        "backend": row["backend"],
        "status": row["status"],
        "created_at": row["created_at"],
        "remote_id": known.get("remote_id"),
        "seen_at": seen_at and _as_text(seen_at),
        "version": 1,
        "whole": False,
    }


def _as_text(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone(UTC).isoformat(timespec="microseconds")
