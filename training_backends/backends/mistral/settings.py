"""Settings and options of the Mistral backend."""

from datetime import timedelta
from typing import ClassVar, Final, Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, field_validator

from training_backends.core.errors import ConfigError
from training_backends.core.settings import SectionSettings
from training_backends.http.policy import HttpPolicy
from training_backends.http.urls import is_loopback, normalize_base_url
from training_backends.protocols.mistral.wire import MAX_FILE_BYTES

__all__ = ["CLOCK_SLACK", "HOSTED_URL", "GithubRepository", "MistralOptions", "MistralSettings"]


class _SettingsModel(BaseModel, frozen=True, extra="forbid"):
    """Options of a run."""


class GithubRepository(_SettingsModel):
    """A repository to train on. `credential` names the token; it is never stored here."""

    type: Literal["github"] = "github"
    owner: str = Field(min_length=1)
    name: str = Field(min_length=1)
    ref: str | None = Field(default=None, description="Branch, tag or commit.")
    weight: float = Field(default=1.0, gt=0, description="Share relative to the other data.")
    credential: str = Field(
        default="github",
        description="Credential with the token: PROVIDER or PROVIDER/PROFILE.",
    )


class MistralOptions(_SettingsModel):
    """`options` of a configuration for the Mistral protocol."""

    invalid_sample_skip_percentage: float = Field(
        default=0.0, ge=0, le=0.5, description="Tolerated fraction of invalid samples."
    )
    repositories: tuple[GithubRepository, ...] = ()
    validate_timeout: float = Field(
        default=1800.0, gt=0, description="Seconds to wait for the server to validate the data."
    )


HOSTED_URL: Final = "https://api.mistral.ai"
CLOCK_SLACK: Final = timedelta(days=1)
"""Tolerated difference between the local and the server's clock when listing jobs by time."""


class MistralSettings(SectionSettings):
    """Section `mistral`: `TRAINING_BACKENDS_MISTRAL__BASE_URL` and so on. Times in seconds."""

    section: ClassVar[str | None] = "mistral"

    base_url: str = Field(
        default=HOSTED_URL, description="Base URL, with or without a trailing slash or /v1."
    )
    profile: str | None = Field(default=None, description="Credential profile of the API key.")
    connect_timeout: PositiveFloat = 10.0
    read_timeout: PositiveFloat = Field(default=30.0, description="Timeout without data.")
    write_timeout: PositiveFloat = 30.0
    call_timeout: PositiveFloat = Field(
        default=120.0, description="Timeout of a call with retries."
    )
    upload_timeout: PositiveFloat = Field(
        default=600.0,
        description="Timeout of the response to an upload, which includes validation.",
    )
    max_file_bytes: PositiveInt = Field(
        default=MAX_FILE_BYTES,
        description="Maximum file size of the server; larger training files are split.",
    )
    attempts: PositiveInt = Field(default=5, description="Maximum attempts per request.")
    poll_min: PositiveFloat = Field(default=0.5, description="Shortest polling interval.")
    poll_max: PositiveFloat | None = Field(
        default=None, description="Longest polling interval; default: 2 on loopback, else 10."
    )
    settle_timeout: PositiveFloat | None = Field(
        default=None,
        description="How long to look for a job after a lost create response before creating it "
        "again; default: 3 on loopback, else 60.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalized(cls, value: str) -> str:
        try:
            return normalize_base_url(value, drop_suffix="v1")
        except ConfigError as error:
            raise ValueError(error.message) from None

    @property
    def is_hosted(self) -> bool:
        """Whether the server is the provider's own service, with its prices and limits."""
        return self.base_url == HOSTED_URL

    @property
    def longest_poll(self) -> float:
        """Longest polling interval in seconds."""
        if self.poll_max is not None:
            return self.poll_max
        return 2.0 if is_loopback(self.base_url) else 10.0

    @property
    def settling(self) -> float:
        """Seconds within which a create request without a response takes effect, if ever."""
        if self.settle_timeout is not None:
            return self.settle_timeout
        # Proxies on the way time out after 30 or 60 seconds.
        return 3.0 if is_loopback(self.base_url) else 60.0

    @property
    def scope(self) -> str:
        """Server and account that ids belong to; contains no secret."""
        return f"{self.base_url}#{self.profile or ''}"

    def policy(self) -> HttpPolicy:
        """Return the timeouts as an `HttpPolicy`."""
        return HttpPolicy(
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            write_timeout=self.write_timeout,
            call_timeout=self.call_timeout,
            upload_timeout=self.upload_timeout,
            attempts=self.attempts,
        )
