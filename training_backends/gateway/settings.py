"""Settings of the gateway."""

import hashlib
import re
from pathlib import Path
from typing import ClassVar

from pydantic import AnyHttpUrl, Field, SecretStr, field_validator

from training_backends.core.settings import SectionSettings
from training_backends.protocols.mistral.wire import MAX_FILE_BYTES

__all__ = ["GatewaySettings"]

_SHORTEST_KEY = 16
"""Characters; a random key of this length cannot be guessed over a network."""


class GatewaySettings(SectionSettings):
    """Where the gateway listens, what it accepts and what it calls itself."""

    section: ClassVar[str | None] = "gateway"

    api_key: SecretStr | None = Field(
        default=None,
        description="One static key, beside those of `keys create`; at least 16 characters.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="0: any free port.")
    public_url: AnyHttpUrl | None = Field(
        default=None,
        description="How clients reach the gateway, for signed URLs; default: where it listens.",
    )
    plain_http: bool = Field(
        default=False,
        description="Listen beyond this machine without TLS: keys can be read on the way.",
    )
    tls_cert: Path | None = Field(
        default=None, description="PEM file with the certificate and its chain: serve https."
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file with its private key; default: the certificate's file."
    )
    tls_key_password: SecretStr | None = Field(
        default=None, description="Opens the private key, if it is encrypted."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file with authorities: only clients with a certificate of theirs connect.",
    )
    max_upload_bytes: int = Field(default=MAX_FILE_BYTES, ge=1, description="Largest file.")
    max_request_bytes: int = Field(
        default=2**20, ge=1, description="Largest body of a request that is no upload."
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="Most open connections; default: three eighths of the file descriptors.",
    )
    max_headers: int = Field(default=100, ge=1, description="Most headers of a request.")
    max_header_bytes: int = Field(
        default=2**15, ge=1024, description="Largest head: address and all headers."
    )
    header_timeout: float = Field(
        default=30.0, gt=0, description="Seconds in which a request's head must be here."
    )
    body_timeout: float = Field(
        default=60.0, gt=0, description="Seconds in which the body of what is no upload must be."
    )
    upload_timeout: float = Field(
        default=120.0, gt=0, description="Seconds of silence after which an upload is given up."
    )
    min_upload_rate: float = Field(
        default=1000.0,
        gt=0,
        description="Bytes a second that an upload must make, upload_timeout to begin with.",
    )
    answer_timeout: float = Field(
        default=60.0, gt=0, description="Seconds for which a client may leave an answer unread."
    )
    max_open_jobs: int = Field(default=200, ge=1, description="Most unfinished jobs of one key.")
    max_training_steps: int = Field(
        default=1_000_000, ge=1, description="Most training steps of one job."
    )
    organization: str = Field(
        default="local", min_length=1, description="Stands, as 8 hex digits, in model names."
    )
    catalogue: Path | None = Field(
        default=None, description="TOML file with models to offer beside the built-in ones."
    )
    default_epochs: float = Field(
        default=3.0,
        gt=0,
        description="Taken when a job gives neither epochs nor training_steps.",
    )

    @field_validator("public_url")
    @classmethod
    def _is_a_base(cls, value: AnyHttpUrl | None) -> AnyHttpUrl | None:
        if value and (value.username or value.password or value.query or value.fragment):
            raise ValueError("give scheme, host, port and path only, as in https://ft.example.org")
        return value

    @field_validator("api_key")
    @classmethod
    def _not_guessable(cls, key: SecretStr | None) -> SecretStr | None:
        if key and len(key) < _SHORTEST_KEY:
            raise ValueError(
                f"use at least {_SHORTEST_KEY} characters, such as those of `openssl rand -hex 16`"
            )
        return key

    @property
    def organization_id(self) -> str:
        """The organization as the 8 hex digits of a model name."""
        if re.fullmatch("[0-9a-f]{8}", self.organization):
            return self.organization
        return hashlib.sha256(self.organization.encode()).hexdigest()[:8]
