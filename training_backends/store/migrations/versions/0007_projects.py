"""Add the limits of projects and the audit log."""

import sqlalchemy as sa
from alembic import op

from training_backends.store.schema import BigInteger

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the tables; jobs that were launched count as running."""
    op.create_table(
        "gateway_projects",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("jobs_running", sa.Integer),
        sa.Column("jobs_queued", sa.Integer),
        sa.Column("bytes", sa.BigInteger),
        sa.Column("requests_per_second", sa.Float),
        sa.Column("steps", sa.BigInteger),
        sa.Column("modified_at", sa.Float, nullable=False),
    )
    op.create_table(
        "gateway_audit",
        sa.Column("id", BigInteger, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("project", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("request_id", sa.String, nullable=False),
    )
    op.create_index("gateway_audit_by_time", "gateway_audit", ["at"])
    admitted = sa.Column("admitted", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("gateway_jobs", admitted)
    op.add_column("gateway_jobs", sa.Column("trace", sa.JSON))
    op.execute("UPDATE gateway_jobs SET admitted = launched")
    op.create_index("gateway_jobs_of_project", "gateway_jobs", ["project", "status"])
    size = ["project", "deleted_at", "expires_at", "bytes"]
    op.create_index("gateway_files_by_size", "gateway_files", size)
