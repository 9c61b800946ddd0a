"""Tables of the run store at the latest revision, and the encoding of values.

Times are UTC in fixed-width ISO format, so that they sort as text.
"""

from datetime import UTC, datetime

import sqlalchemy as sa

__all__ = [
    "IS_LIVE",
    "IS_STATUS",
    "REVISION",
    "BigInteger",
    "as_text",
    "deliveries",
    "destinations",
    "documents",
    "journal",
    "leases",
    "metadata",
    "metrics",
    "records",
    "revision",
    "runs",
    "schema_version",
    "short_text",
    "uploads",
]

# SQLite autoincrements only INTEGER columns, which are 64-bit.
BigInteger = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""A 64-bit integer."""


def short_text(length: int) -> sa.String:
    """Return the type of a short text that sorts by code points.

    Args:
        length: Expected length; enforced neither by SQLite nor, on purpose, by PostgreSQL.
    """
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql")


REVISION = "0011"
"""Latest revision in `migrations/versions`."""

metadata = sa.MetaData()


IS_LIVE = sa.text("status NOT IN ('completed', 'failed', 'cancelled')")
"""Condition of the runs that have not finished; a query must repeat it literally."""


def as_text(moment: datetime) -> str:
    """Return a time as stored."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _of_run(*, key: bool = True) -> sa.Column[str]:
    run = sa.ForeignKey("runs.id", ondelete="CASCADE")
    return sa.Column("run_id", short_text(128), run, primary_key=key, nullable=False)


revision = sa.Table(
    "alembic_version", metadata, sa.Column("version_num", sa.String(32), primary_key=True)
)
# Versions before alembic check this table and reject newer stores.
schema_version = sa.Table(
    "schema_version", metadata, sa.Column("version", sa.Integer, nullable=False)
)
# Columns for queries, separate from the documents, so that a sweep over thousands of runs reads
# and writes short rows.
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", short_text(128), primary_key=True),
    sa.Column("backend", short_text(128), nullable=False),
    sa.Column("status", short_text(32), nullable=False),
    sa.Column("created_at", short_text(40), nullable=False),
    sa.Column("remote_id", short_text(256)),
    # `last_seen_at` is stored only here.
    sa.Column("seen_at", short_text(40)),
    # Incremented with each change of the document.
    sa.Column("version", sa.Integer, nullable=False),
    # Provider cursor up to which the log is in `records`.
    sa.Column("cursor", sa.Text),
    # Whether the run has finished and its complete log is in `records`.
    sa.Column("whole", sa.Boolean, nullable=False),
    sa.Index("runs_by_status", "status", "backend", "created_at"),
    sa.Index("runs_live", "backend", "id", sqlite_where=IS_LIVE, postgresql_where=IS_LIVE),
    sa.Index("runs_by_time", "created_at", "id"),
    sa.Index("runs_by_remote_id", "remote_id"),
)
documents = sa.Table(
    "documents",
    metadata,
    _of_run(),
    sa.Column("document", sa.Text, nullable=False),
)
journal = sa.Table(
    "journal",
    metadata,
    _of_run(),
    sa.Column("name", short_text(200), primary_key=True),
    sa.Column("begun_at", short_text(40), nullable=False),
    sa.Column("result", sa.Text),
)
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("scope", short_text(500), primary_key=True),
    sa.Column("sha256", short_text(64), primary_key=True),
    sa.Column("remote_id", short_text(256), nullable=False),
    sa.Column("uploaded_at", short_text(40), nullable=False),
)
leases = sa.Table(
    "leases",
    metadata,
    # Every take inserts a row, so the row id is the fencing token.
    sa.Column("token", BigInteger, primary_key=True),
    sa.Column("name", short_text(200), nullable=False, unique=True),
    sa.Column("owner", short_text(200), nullable=False),
    sa.Column("until", short_text(40), nullable=False),
    # Never reuses the number of a deleted row.
    sqlite_autoincrement=True,
)
IS_STATUS = sa.text("source = 'status'")
"""Condition of the index of status changes in `records`."""
records = sa.Table(
    "records",
    metadata,
    sa.Column("id", BigInteger, primary_key=True),
    _of_run(key=False),
    sa.Column("seq", BigInteger, nullable=False),
    sa.Column("at", short_text(40), nullable=False),
    sa.Column("level", short_text(16), nullable=False),
    sa.Column("source", short_text(64), nullable=False),
    sa.Column("step", BigInteger),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("fields", sa.Text),
    sa.Index("records_by_run", "run_id", "seq", unique=True),
    # Few among many metrics; a query must repeat the condition literally to use it.
    sa.Index(
        "records_of_status",
        "run_id",
        "seq",
        sqlite_where=IS_STATUS,
        postgresql_where=IS_STATUS,
    ),
    sqlite_autoincrement=True,
)
metrics = sa.Table(
    "metrics",
    metadata,
    _of_run(),
    sa.Column("step", BigInteger, primary_key=True, autoincrement=False),
    sa.Column("name", short_text(128), primary_key=True),
    sa.Column("at", short_text(40), nullable=False),
    sa.Column("value", sa.Float, nullable=False),
)
# Undelivered records.
deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column(
        "id",
        BigInteger,
        sa.ForeignKey("records.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    sa.Column("backend", short_text(128), nullable=False),
    sa.Index("deliveries_by_backend", "backend", "id"),
)
# Results of completed runs that are to be copied to the destination of their run.
destinations = sa.Table(
    "destinations",
    metadata,
    _of_run(),
    sa.Column("due_at", short_text(40), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Index("destinations_by_time", "due_at"),
)
