"""Add the indexes from which each list is read, and maintained counts of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_DAY = 86_400
_EXISTS = sa.text("deleted_at IS NULL")
_IS_LIVE = sa.text("status NOT IN ('completed', 'failed', 'cancelled')")
_IS_OPEN = sa.text("NOT cleaned_up")
_FILES = ("created_at", "id", "expires_at")
_REPLACED = (
    ("gateway_files_by_time", "gateway_files"),
    ("gateway_files_by_project", "gateway_files"),
    ("gateway_jobs_by_time", "gateway_jobs"),
    ("gateway_jobs_by_project", "gateway_jobs"),
    ("gateway_jobs_by_status", "gateway_jobs"),
    ("gateway_jobs_by_content", "gateway_jobs"),
    ("gateway_events_by_job", "gateway_events"),
)
_INDEXES = (
    ("runs_by_time", "runs", "created_at", "id"),
    ("gateway_jobs_by_time", "gateway_jobs", "created_at", "id"),
    ("gateway_jobs_by_project", "gateway_jobs", "project", "created_at", "id"),
    ("gateway_jobs_by_state", "gateway_jobs", "project", "status", "created_at", "id"),
    ("gateway_jobs_by_model", "gateway_jobs", "project", "model", "created_at", "id"),
    ("gateway_jobs_by_suffix", "gateway_jobs", "project", "suffix", "created_at", "id"),
    ("gateway_jobs_by_key", "gateway_jobs", "created_by", "created_at", "id"),
    ("gateway_events_by_job", "gateway_events", "job_id", "id"),
    ("gateway_models_by_job", "gateway_models", "job_id"),
    ("gateway_keys_by_time", "gateway_keys", "created_at", "id"),
)
_PARTIAL_INDEXES = (
    (_IS_LIVE, "runs_live", "runs", "backend", "id"),
    (_EXISTS, "gateway_files_by_time", "gateway_files", *_FILES),
    (_EXISTS, "gateway_files_by_project", "gateway_files", "project", *_FILES),
    (_EXISTS, "gateway_files_by_purpose", "gateway_files", "project", "purpose", *_FILES),
    (_EXISTS, "gateway_files_by_expiry", "gateway_files", "expires_at"),
    (_EXISTS, "gateway_models_by_time", "gateway_models", "created_at", "id"),
    (_EXISTS, "gateway_models_by_project", "gateway_models", "project", "created_at", "id"),
    (_IS_OPEN, "gateway_jobs_open", "gateway_jobs", "created_by", "status"),
    (_IS_OPEN, "gateway_jobs_by_content", "gateway_jobs", "fingerprint"),
)


def upgrade() -> None:
    """Replace the indexes, and count the jobs."""
    for name, table in _REPLACED:
        op.drop_index(name, table)
    for name, table, *columns in _INDEXES:
        op.create_index(name, table, columns)
    for where, name, table, *columns in _PARTIAL_INDEXES:
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
    counts = op.create_table(
        "gateway_job_counts",
        sa.Column("project", sa.String, primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("created_by", sa.String, primary_key=True),
        sa.Column("status", sa.String, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("jobs", sa.BigInteger, nullable=False),
    )
    op.create_index("gateway_job_counts_by_day", "gateway_job_counts", ["day"])
    names = ("project", "created_by", "status", "model", "created_at")
    jobs = sa.table("gateway_jobs", *map(sa.column, names))
    day = sa.cast(sa.func.floor(jobs.c.created_at / _DAY), sa.Integer)
    if op.get_bind().dialect.name == "sqlite":
        day = sa.cast(jobs.c.created_at / _DAY, sa.Integer)  # truncates
    for each in (sa.literal(-1, sa.Integer), day):
        by = (jobs.c.project, each, jobs.c.created_by, jobs.c.status, jobs.c.model)
        grouped = (jobs.c.project, jobs.c.created_by, jobs.c.status, jobs.c.model)
        found = sa.select(*by, sa.func.count()).group_by(*grouped, *([each] if each is day else []))
        op.execute(counts.insert().from_select([column.name for column in counts.c], found))
