"""Add the sessions of the console, and an index of changed jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Create the table and the index."""
    op.create_table(
        "gateway_sessions",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(8), nullable=False),
        sa.Column("key_sha256", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_index("gateway_jobs_by_change", "gateway_jobs", ["modified_at"])
