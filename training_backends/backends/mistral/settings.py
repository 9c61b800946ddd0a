"""Settings and options of the Mistral backend."""

from datetime import timedelta
from typing import ClassVar, Final, Literal

from pydantic import BaseModel, Field, PositiveInt, field_validator

from training_backends.core.errors import ConfigError
from training_backends.http.settings import ServerSettings
from training_backends.http.urls import normalize_base_url
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


class MistralSettings(ServerSettings):
    """Section `mistral`: `TRAINING_BACKENDS_MISTRAL__BASE_URL` and so on. Times in seconds."""

    section: ClassVar[str | None] = "mistral"

    base_url: str = Field(
        default=HOSTED_URL, description="Base URL, with or without a trailing slash or /v1."
    )
    max_file_bytes: PositiveInt = Field(
        default=MAX_FILE_BYTES,
        description="Maximum file size of the server; larger training files are split.",
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
