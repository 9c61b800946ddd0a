"""Settings of the gateway."""

import hashlib
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    AnyHttpUrl,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    field_validator,
)

from training_backends.core.config import Result
from training_backends.core.settings import SectionSettings
from training_backends.objects.settings import hide_secrets
from training_backends.objects.store import is_object_url
from training_backends.protocols.mistral.wire import MAX_FILE_BYTES
from training_backends.protocols.openai.wire import MAX_UPLOAD_BYTES

__all__ = ["GatewaySettings"]

_SHORTEST_KEY = 16
"""Characters; a random key of this length cannot be guessed over a network."""


class GatewaySettings(SectionSettings):
    """Section `gateway`: address, TLS, limits and model names."""

    section: ClassVar[str | None] = "gateway"

    api_key: SecretStr | None = Field(
        default=None,
        description="Static API key in addition to those of `keys create`; at least 16 characters.",
    )
    store_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL of the database of runs, jobs, files and keys; default: SQLite "
        "in the gateway's home.",
    )
    blobs: str | None = Field(
        default=None,
        description="Where uploaded files are stored, such as `s3://bucket/prefix` or "
        "`file:///directory`; default: in the gateway's home.",
    )
    results: str | None = Field(
        default=None,
        description="Where the models of completed jobs are copied, such as `s3://bucket/prefix`; "
        "default: nowhere.",
    )
    blob_options: dict[str, Any] = Field(
        default={},
        description="Options of that store, for example `endpoint_url` of an S3-compatible server; "
        "default: those in `objects.options`.",
    )
    presigned_urls: bool = Field(
        default=True,
        description="Signed URLs of files are those of the object store, if it makes any; false: "
        "of the gateway, for clients that cannot reach the store.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="Port; 0: any free port.")
    public_url: AnyHttpUrl | None = Field(
        default=None,
        description="URL that clients use, for signed URLs; default: the listening address.",
    )
    plain_http: bool = Field(
        default=False,
        description="Allow plain HTTP on non-loopback addresses; keys are sent unencrypted.",
    )
    tls_cert: Path | None = Field(
        default=None, description="PEM file with the certificate and its chain; enables HTTPS."
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file with the private key; default: the certificate's file."
    )
    tls_key_password: SecretStr | None = Field(
        default=None, description="Password of an encrypted private key."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file with CAs; requires client certificates signed by them (mTLS).",
    )
    max_upload_bytes: int = Field(default=MAX_FILE_BYTES, ge=1, description="Maximum file size.")
    max_parts_bytes: int = Field(
        default=MAX_UPLOAD_BYTES, ge=1, description="Maximum size of a file uploaded in parts."
    )
    max_request_bytes: int = Field(
        default=2**20, ge=1, description="Maximum request body size, except for uploads."
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="Maximum open connections; default: 3/8 of the file descriptor limit.",
    )
    max_headers: int = Field(default=100, ge=1, description="Maximum request headers.")
    max_header_bytes: int = Field(
        default=2**15, ge=1024, description="Maximum size of the request line and headers."
    )
    header_timeout: float = Field(
        default=30.0, gt=0, description="Seconds to receive the request line and headers."
    )
    body_timeout: float = Field(
        default=60.0, gt=0, description="Seconds to receive a request body, except for uploads."
    )
    upload_timeout: float = Field(
        default=120.0, gt=0, description="Seconds without data after which an upload is aborted."
    )
    min_upload_rate: float = Field(
        default=1000.0,
        gt=0,
        description="Minimum upload rate in bytes/s, after the first upload_timeout seconds.",
    )
    answer_timeout: float = Field(
        default=60.0, gt=0, description="Seconds a client may take to read a response."
    )
    shutdown_delay: float = Field(
        default=0.0,
        ge=0,
        description="Seconds between the stop signal, from which /readyz says 503, and the end of "
        "new connections.",
    )
    shutdown_timeout: float = Field(
        default=10.0,
        ge=0,
        description="Seconds that uploads and other requests get to finish when the gateway stops.",
    )
    access_log: bool = Field(
        default=False,
        description="Write a JSON line to standard error for each request.",
    )
    metrics_token: SecretStr | None = Field(
        default=None,
        description="Bearer token for /metrics, at least 16 characters; keys of scope admin work "
        "as well.",
    )
    max_open_jobs: int = Field(default=200, ge=1, description="Maximum unfinished jobs per key.")
    max_training_steps: int = Field(
        default=1_000_000, ge=1, description="Maximum training steps per job."
    )
    trusted_proxies: tuple[IPvAnyNetwork, ...] = Field(
        default=(),
        description="Addresses or networks of proxies whose X-Forwarded-For names the client, for "
        "the audit and access logs.",
    )
    audit_days: float = Field(
        default=365.0, gt=0, description="Days after which entries of the audit log are deleted."
    )
    keep_failed_days: float | None = Field(
        default=None,
        gt=0,
        description="Days after which the runs of jobs that failed or were cancelled are deleted; "
        "default: never.",
    )
    keep_completed_days: float | None = Field(
        default=None,
        gt=0,
        description="Days without use after which the models of completed jobs are deleted; "
        "default: never.",
    )
    keep_checkpoints_days: float | None = Field(
        default=None,
        gt=0,
        description="Days without use after which the checkpoints of completed jobs are deleted; "
        "default: never.",
    )
    keep_files_days: float | None = Field(
        default=None,
        gt=0,
        description="Days without use after which uploaded files are deleted; default: never.",
    )
    keep_logs_days: float | None = Field(
        default=None,
        gt=0,
        description="Days after which the logs and metrics of finished jobs are deleted; "
        "default: never.",
    )
    organization: str = Field(
        default="local", min_length=1, description="Part of model names, as 8 hex digits."
    )
    console: bool = Field(default=True, description="Serve the console at `/`.")
    catalogue: Path | None = Field(
        default=None, description="TOML file with models to add to the built-in ones."
    )
    default_epochs: float = Field(
        default=3.0,
        gt=0,
        description="Epochs of a job that sets neither epochs nor training_steps.",
    )
    openai_result_csv: Literal["base64", "plain"] = Field(
        default="base64",
        description="Content of result files: base64 of the CSV, as OpenAI's service sends it, "
        "or the plain CSV of its documentation.",
    )
    webhook_url: AnyHttpUrl | None = Field(
        default=None, description="URL that receives an event when a job has finished."
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="Signs the events: `whsec_` and base64; default: the credential `webhook`.",
    )

    inference_url: str | None = Field(
        default=None,
        description="Base URL, with /v1, of an OpenAI-compatible server that answers chats; "
        "default: `transformers serve`, started on demand.",
    )
    inference_api_key: SecretStr | None = Field(
        default=None, description="API key of the server at inference_url."
    )
    inference_models: int = Field(
        default=2, ge=1, description="Maximum models that `transformers serve` has loaded."
    )
    inference_idle: float = Field(
        default=600.0, gt=0, description="Seconds without a chat after which a model is unloaded."
    )
    inference_timeout: float = Field(
        default=600.0, gt=0, description="Seconds for a chat, including loading the model."
    )
    inference_requests: int = Field(
        default=256, ge=1, description="Maximum chats at a time, answered and waiting."
    )
    inference_options: tuple[str, ...] = Field(
        default=(), description="Options of `transformers serve`, such as --continuous-batching."
    )

    @field_validator("public_url")
    @classmethod
    def _is_a_base(cls, value: AnyHttpUrl | None) -> AnyHttpUrl | None:
        if value and (value.username or value.password or value.query or value.fragment):
            raise ValueError("use scheme, host, port and path only, as in https://ft.example.org")
        return value

    @field_validator("blobs")
    @classmethod
    def _is_a_store(cls, value: str | None) -> str | None:
        if value and not is_object_url(value) and not value.startswith("file:///"):
            known = ", ".join(f"{scheme}://" for scheme in ("s3", "gs", "az"))
            raise ValueError(f"use a URL that starts with file:///, {known}")
        return value

    @field_validator("results")
    @classmethod
    def _is_destination(cls, value: str | None) -> str | None:
        try:
            return Result(destination=value).destination
        except ValidationError:
            raise ValueError("use a URL such as s3://bucket/prefix, gs://… or az://…") from None

    @field_validator("blob_options")
    @classmethod
    def _hidden(cls, value: dict[str, Any]) -> dict[str, Any]:
        hide_secrets(value)
        return value

    @field_validator("api_key", "metrics_token")
    @classmethod
    def _not_guessable(cls, key: SecretStr | None) -> SecretStr | None:
        if key and len(key) < _SHORTEST_KEY:
            raise ValueError(
                f"use at least {_SHORTEST_KEY} characters, for example from `openssl rand -hex 16`"
            )
        return key

    @property
    def organization_id(self) -> str:
        """The organization as 8 hex digits, as used in model names."""
        if re.fullmatch("[0-9a-f]{8}", self.organization):
            return self.organization
        return hashlib.sha256(self.organization.encode()).hexdigest()[:8]
