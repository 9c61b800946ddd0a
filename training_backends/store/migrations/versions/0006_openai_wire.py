"""Add result files, uploads in parts, idempotency keys and webhook deliveries to the gateway."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the columns and create the tables."""
    op.add_column("gateway_jobs", sa.Column("result_files", sa.JSON))
    op.add_column("gateway_files", sa.Column("idempotency_key", sa.String))
    op.create_table(
        "gateway_uploads",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("filename", sa.String, nullable=False),
        sa.Column("purpose", sa.String, nullable=False),
        sa.Column("mimetype", sa.String, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("lifetime", sa.Integer),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("file_id", sa.String(36)),
        sa.Column("part_ids", sa.JSON),
        sa.Column("idempotency_key", sa.String),
        sa.Column("project", sa.String, nullable=False),
    )
    op.create_index("gateway_uploads_by_status", "gateway_uploads", ["status", "created_by"])
    op.create_table(
        "gateway_upload_parts",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("upload_id", sa.String(36), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("idempotency_key", sa.String),
    )
    op.create_index("gateway_upload_parts_by_upload", "gateway_upload_parts", ["upload_id"])
    op.create_table(
        "gateway_webhooks",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Float, nullable=False),
    )
    op.create_index("gateway_webhooks_by_time", "gateway_webhooks", ["due_at"])
