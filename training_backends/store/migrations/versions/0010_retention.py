"""Add what retention needs: the last use of jobs and files, what is kept, periods of projects."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_KEPT = ("has_run", "has_checkpoints", "has_logs")
_INDEXES = ("gateway_jobs_with_run", "gateway_jobs_with_checkpoints", "gateway_jobs_with_logs")


def upgrade() -> None:
    """Add the columns and indexes; everything counts as kept, and as used now.

    Earlier uses are unknown: the first sweep must not delete what is in use every day.
    """
    op.add_column("gateway_projects", sa.Column("retention", sa.JSON(none_as_null=True)))
    op.add_column("gateway_files", sa.Column("used_at", sa.Float))
    op.add_column("gateway_jobs", sa.Column("used_at", sa.Float))
    op.add_column("gateway_jobs", sa.Column("used_steps", sa.JSON(none_as_null=True)))
    for name, index in zip(_KEPT, _INDEXES, strict=True):
        kept = sa.Column(name, sa.Boolean, nullable=False, server_default=sa.true())
        op.add_column("gateway_jobs", kept)
        columns, where = ["project", "status", "modified_at", "id"], sa.text(name)
        op.create_index(index, "gateway_jobs", columns, sqlite_where=where, postgresql_where=where)
    now = time.time()
    files = sa.table("gateway_files", sa.column("used_at"), sa.column("deleted_at"))
    op.execute(files.update().where(files.c.deleted_at.is_(None)).values(used_at=now))
    jobs = sa.table("gateway_jobs", sa.column("used_at"), sa.column("used_steps", sa.JSON))
    op.execute(jobs.update().values(used_at=now, used_steps={"*": now}))
