"""Add the tables of the gateway, and an index of status changes."""

import sqlalchemy as sa
from alembic import op

from training_backends.store.schema import BigInteger

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the index and the tables."""
    is_status = sa.text("source = 'status'")
    op.create_index(
        "records_of_status",
        "records",
        ["run_id", "seq"],
        sqlite_where=is_status,
        postgresql_where=is_status,
    )
    _create_files()
    _create_jobs()
    op.create_table(
        "gateway_models",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("root", sa.String, nullable=False),
        sa.Column("model_type", sa.String, nullable=False),
        sa.Column("context_length", sa.Integer, nullable=False),
        sa.Column("classifier_targets", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("name", sa.String),
        sa.Column("description", sa.String),
        sa.Column("archived", sa.Boolean, nullable=False),
        sa.Column("deleted_at", sa.Float),
        sa.Column("project", sa.String, nullable=False),
    )
    op.create_table(
        "gateway_keys",
        sa.Column("id", sa.String(8), primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.Column("scope", sa.String, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("last_used_at", sa.Float),
        sa.Column("project", sa.String, nullable=False),
    )


def _create_files() -> None:
    op.create_table(
        "gateway_files",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("filename", sa.String, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("purpose", sa.String, nullable=False),
        sa.Column("sample_type", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("num_lines", sa.BigInteger),
        sa.Column("mimetype", sa.String),
        sa.Column("visibility", sa.String),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("deleted_at", sa.Float),
        sa.Column("project", sa.String, nullable=False),
    )
    op.create_index("gateway_files_by_content", "gateway_files", ["sha256"])
    op.create_index("gateway_files_by_time", "gateway_files", ["created_at"])
    op.create_index("gateway_files_by_project", "gateway_files", ["project", "created_at"])


def _create_jobs() -> None:
    op.create_table(
        "gateway_jobs",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("backend", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("job_type", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("suffix", sa.String),
        sa.Column("auto_start", sa.Boolean, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
        sa.Column("modified_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("launched", sa.Boolean, nullable=False),
        sa.Column("cleaned_up", sa.Boolean, nullable=False),
        sa.Column("training_files", sa.JSON, nullable=False),
        sa.Column("validation_files", sa.JSON, nullable=False),
        sa.Column("blobs", sa.JSON, nullable=False),
        sa.Column("hyperparameters", sa.JSON, nullable=False),
        sa.Column("classifier_targets", sa.JSON, nullable=False),
        sa.Column("context_length", sa.Integer, nullable=False),
        sa.Column("integrations", sa.JSON, nullable=False),
        sa.Column("wandb_project", sa.String),
        sa.Column("wandb_name", sa.String),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("quote", sa.JSON),
        sa.Column("trained_tokens", sa.BigInteger),
        sa.Column("fine_tuned_model", sa.String),
        sa.Column("history", sa.JSON),
        sa.Column("project", sa.String, nullable=False),
    )
    op.create_index("gateway_jobs_by_time", "gateway_jobs", ["created_at"])
    op.create_index("gateway_jobs_by_project", "gateway_jobs", ["project", "created_at"])
    op.create_index("gateway_jobs_by_status", "gateway_jobs", ["status", "created_by"])
    op.create_index("gateway_jobs_by_content", "gateway_jobs", ["fingerprint"])
    op.create_table(
        "gateway_events",
        sa.Column("id", BigInteger, primary_key=True),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("gateway_events_by_job", "gateway_events", ["job_id"])
