"""Add what a client of the OpenAI API asked for to the gateway's jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column."""
    op.add_column("gateway_jobs", sa.Column("openai", sa.JSON))
