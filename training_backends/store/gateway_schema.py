"""The gateway's tables, in the same database as its runs; a job's id is its run's id."""

import sqlalchemy as sa

from training_backends.store.schema import BigInteger, metadata

__all__ = [
    "DEFAULT_PROJECT",
    "GATEWAY_TABLES",
    "HAS_CHECKPOINTS",
    "HAS_LOGS",
    "HAS_RUN",
    "IS_OPEN",
    "audit",
    "events",
    "files",
    "job_counts",
    "jobs",
    "keys",
    "models",
    "parts",
    "projects",
    "sessions",
    "uploads",
    "webhooks",
]

DEFAULT_PROJECT = "default"
"""Owner of objects created before projects existed, and of keys created without one."""


IS_OPEN = sa.text("NOT cleaned_up")
"""Condition of the jobs that have not finished, or are not cleaned up yet. A query must repeat it
literally to use its indexes."""
HAS_RUN = sa.text("has_run")
"""Conditions, likewise, of the jobs of which retention has not deleted the run, the checkpoints or
the log yet; also of jobs that never had one."""
HAS_CHECKPOINTS = sa.text("has_checkpoints")
HAS_LOGS = sa.text("has_logs")
_PAGED = ("created_at", "id")
"""Columns by which all lists are ordered: with the id, a page continues exactly after the last."""
_ENDED_BY_PROJECT = ("project", "status", "modified_at", "id")
_EXISTS = sa.text("deleted_at IS NULL")


def _index(name: str, *columns: str, where: "sa.TextClause | None" = None) -> sa.Index:
    """Return an index of some of the rows; None: of all."""
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


def _kept(name: str) -> "sa.Column[bool]":
    """Return a column for what a job has until retention deletes it."""
    return sa.Column(name, sa.Boolean, nullable=False, default=True, server_default=sa.true())


def _project(*, key: bool = False) -> "sa.Column[str]":
    """Return a column for the project that owns a row."""
    return sa.Column("project", sa.String, nullable=False, primary_key=key)


files = sa.Table(
    "gateway_files",
    metadata,
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
    # What a client of the OpenAI API sent with the upload.
    sa.Column("idempotency_key", sa.String),
    # When it was last uploaded again, or a job that uses it was created or ended.
    sa.Column("used_at", sa.Float),
    _project(),
    sa.Index("gateway_files_by_content", "sha256"),
    _index("gateway_files_by_time", *_PAGED, "expires_at", where=_EXISTS),
    _index("gateway_files_by_project", "project", *_PAGED, "expires_at", where=_EXISTS),
    _index("gateway_files_by_purpose", "project", "purpose", *_PAGED, "expires_at", where=_EXISTS),
    _index("gateway_files_by_expiry", "expires_at", where=_EXISTS),
    # Covers the sum of a project's bytes.
    sa.Index("gateway_files_by_size", "project", "deleted_at", "expires_at", "bytes"),
)
jobs = sa.Table(
    "gateway_jobs",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("backend", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("job_type", sa.String, nullable=False),
    # While the run is live, as far as its log was read; see `job_events`.
    sa.Column("status", sa.String, nullable=False),
    sa.Column("suffix", sa.String),
    sa.Column("auto_start", sa.Boolean, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("modified_at", sa.Float, nullable=False),
    # When the start was accepted; `launched`: the backend has accepted it too.
    sa.Column("started_at", sa.Float),
    # Whether it counts as running for its project, from just before its launch.
    sa.Column("admitted", sa.Boolean, nullable=False, default=False, server_default=sa.false()),
    sa.Column("launched", sa.Boolean, nullable=False, default=False),
    # Whether files and keys that only this job needed were removed after its end.
    sa.Column("cleaned_up", sa.Boolean, nullable=False, default=False),
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
    sa.Column("quote", sa.JSON(none_as_null=True)),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("fine_tuned_model", sa.String),
    # Events and checkpoints of a job whose run is no longer stored.
    sa.Column("history", sa.JSON(none_as_null=True)),
    # What only the OpenAI API has; see `openai_jobs`. Null: created by the Mistral API.
    sa.Column("openai", sa.JSON(none_as_null=True)),
    # Headers of the trace in which the job was created.
    sa.Column("trace", sa.JSON(none_as_null=True)),
    # Ids of the files with the metrics of a job that succeeded.
    sa.Column("result_files", sa.JSON(none_as_null=True)),
    # When its model or one of its checkpoints last answered or was downloaded, to the hour.
    sa.Column("used_at", sa.Float),
    # The same for each step of a checkpoint.
    sa.Column("used_steps", sa.JSON(none_as_null=True)),
    _kept("has_run"),
    _kept("has_checkpoints"),
    _kept("has_logs"),
    _project(),
    sa.Index("gateway_jobs_by_time", *_PAGED),
    sa.Index("gateway_jobs_by_project", "project", *_PAGED),
    sa.Index("gateway_jobs_by_state", "project", "status", *_PAGED),
    sa.Index("gateway_jobs_by_model", "project", "model", *_PAGED),
    sa.Index("gateway_jobs_by_suffix", "project", "suffix", *_PAGED),
    sa.Index("gateway_jobs_by_key", "created_by", *_PAGED),
    sa.Index("gateway_jobs_by_change", "modified_at"),
    _index("gateway_jobs_open", "created_by", "status", where=IS_OPEN),
    _index("gateway_jobs_by_content", "fingerprint", where=IS_OPEN),
    sa.Index("gateway_jobs_of_project", "project", "status"),
    _index("gateway_jobs_with_run", *_ENDED_BY_PROJECT, where=HAS_RUN),
    _index("gateway_jobs_with_checkpoints", *_ENDED_BY_PROJECT, where=HAS_CHECKPOINTS),
    _index("gateway_jobs_with_logs", *_ENDED_BY_PROJECT, where=HAS_LOGS),
)
# How many jobs there are, so that no list counts them: by the day of their creation, in days since
# the epoch, and in total as day -1. Written in the transaction that changes a job's status.
job_counts = sa.Table(
    "gateway_job_counts",
    metadata,
    _project(key=True),
    sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("created_by", sa.String, primary_key=True),
    sa.Column("status", sa.String, primary_key=True),
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("jobs", sa.BigInteger, nullable=False),
    sa.Index("gateway_job_counts_by_day", "day"),
)
# Only what the gateway itself did: the rest is in the log of the run.
events = sa.Table(
    "gateway_events",
    metadata,
    sa.Column("id", BigInteger, primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("gateway_events_by_job", "job_id", "id"),
)
models = sa.Table(
    "gateway_models",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("root", sa.String, nullable=False),
    sa.Column("model_type", sa.String, nullable=False),
    sa.Column("context_length", sa.Integer, nullable=False),
    sa.Column("classifier_targets", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("name", sa.String),
    sa.Column("description", sa.String),
    sa.Column("archived", sa.Boolean, nullable=False, default=False),
    sa.Column("deleted_at", sa.Float),
    _project(),
    _index("gateway_models_by_time", *_PAGED, where=_EXISTS),
    _index("gateway_models_by_project", "project", *_PAGED, where=_EXISTS),
    sa.Index("gateway_models_by_job", "job_id"),
)
keys = sa.Table(
    "gateway_keys",
    metadata,
    sa.Column("id", sa.String(8), primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("scope", sa.String, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("last_used_at", sa.Float),
    _project(),
    sa.Index("gateway_keys_by_time", *_PAGED),
)
# Sign-ins at the console; the browser has the session's token, and this table its hash.
sessions = sa.Table(
    "gateway_sessions",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(8), nullable=False),
    # Hash of the key: ends the session if the static key changes.
    sa.Column("key_sha256", sa.String(64), nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)

# Limits and retention of projects; a project without a row has none. Null: unlimited.
projects = sa.Table(
    "gateway_projects",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("jobs_running", sa.Integer),
    sa.Column("jobs_queued", sa.Integer),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("requests_per_second", sa.Float),
    sa.Column("steps", sa.BigInteger),
    # Days by kind, or "forever"; without a value, those of the gateway's settings.
    sa.Column("retention", sa.JSON(none_as_null=True)),
    sa.Column("modified_at", sa.Float, nullable=False),
)
# Rows are inserted, and deleted by age; never updated.
audit = sa.Table(
    "gateway_audit",
    metadata,
    sa.Column("id", BigInteger, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("actor", sa.String, nullable=False),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("outcome", sa.String, nullable=False),
    sa.Column("address", sa.String, nullable=False),
    sa.Column("request_id", sa.String, nullable=False),
    sa.Index("gateway_audit_by_time", "at"),
)

# Files that are uploaded in parts; rows stay when an upload has ended.
uploads = sa.Table(
    "gateway_uploads",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("mimetype", sa.String, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    # Seconds until the file expires; null: never.
    sa.Column("lifetime", sa.Integer),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("file_id", sa.String(36)),
    sa.Column("part_ids", sa.JSON(none_as_null=True)),
    sa.Column("idempotency_key", sa.String),
    _project(),
    sa.Index("gateway_uploads_by_status", "status", "created_by"),
)
# The parts of pending uploads; the content is in a file named by the id.
parts = sa.Table(
    "gateway_upload_parts",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("upload_id", sa.String(36), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("idempotency_key", sa.String),
    sa.Index("gateway_upload_parts_by_upload", "upload_id"),
)
# Events that the webhook has not received yet.
webhooks = sa.Table(
    "gateway_webhooks",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", sa.Float, nullable=False),
    sa.Index("gateway_webhooks_by_time", "due_at"),
)

GATEWAY_TABLES = tuple(
    table.name
    for table in (
        *(keys, files, jobs, events, models, uploads, parts, webhooks, projects, audit),
        sessions,
    )
)
"""Names of these tables, without those that follow from others."""
