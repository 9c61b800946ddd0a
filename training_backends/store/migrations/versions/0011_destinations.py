"""Add the results that are to be copied to the destination of their run."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table; runs that have completed before had no destination."""
    run = sa.ForeignKey("runs.id", ondelete="CASCADE")
    op.create_table(
        "destinations",
        sa.Column("run_id", _text(128), run, primary_key=True),
        sa.Column("due_at", _text(40), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
    )
    op.create_index("destinations_by_time", "destinations", ["due_at"])
