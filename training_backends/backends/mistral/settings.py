"""Where the server of the Mistral protocol is and how patient we are with it."""

from datetime import timedelta
from typing import ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from training_backends.core.errors import ConfigError
from training_backends.core.settings import SectionSettings
from training_backends.http.policy import HttpPolicy
from training_backends.http.urls import is_loopback, normalize_base_url
from training_backends.protocols.mistral.wire import MAX_FILE_BYTES

__all__ = ["CLOCK_SLACK", "HOSTED_URL", "GithubRepository", "MistralOptions", "MistralSettings"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GithubRepository(_Model):
    """A repository to train on. The token is named, never written down."""

    type: Literal["github"] = "github"
    owner: str = Field(min_length=1)
    name: str = Field(min_length=1)
    ref: str | None = Field(default=None, description="Branch, tag or commit.")
    weight: float = Field(default=1.0, gt=0, description="Share relative to the other data.")
    credential: str = Field(
        default="github",
        description="Where the token lies in the vault: PROVIDER or PROVIDER/PROFILE.",
    )


class MistralOptions(_Model):
    """`options` of a configuration for the Mistral protocol."""

    invalid_sample_skip_percentage: float = Field(
        default=0.0, ge=0, le=0.5, description="Share of broken samples that is tolerated."
    )
    repositories: tuple[GithubRepository, ...] = ()
    validate_timeout: float = Field(
        default=1800.0, gt=0, description="Seconds to wait until the server has checked the data."
    )


HOSTED_URL: Final = "https://api.mistral.ai"
CLOCK_SLACK: Final = timedelta(days=1)
"""How far our clock and the server's may be apart where jobs are listed by their time."""


class MistralSettings(SectionSettings):
    """Section `mistral`: `TRAINING_BACKENDS_MISTRAL__BASE_URL` and so on. Times in seconds."""

    section: ClassVar[str | None] = "mistral"

    base_url: str = Field(
        default=HOSTED_URL, description="With or without a trailing slash or /v1."
    )
    profile: str | None = Field(default=None, description="Which of several keys to use.")
    connect_timeout: PositiveFloat = 10.0
    read_timeout: PositiveFloat = Field(default=30.0, description="Silence before giving up.")
    write_timeout: PositiveFloat = 30.0
    call_timeout: PositiveFloat = Field(default=120.0, description="A call with all its attempts.")
    upload_timeout: PositiveFloat = Field(
        default=600.0, description="Until an uploaded file is answered for; it is checked there."
    )
    max_file_bytes: PositiveInt = Field(
        default=MAX_FILE_BYTES,
        description="Largest file that the server takes; a larger training file goes in parts.",
    )
    attempts: PositiveInt = Field(default=5, description="How often a request is sent at most.")
    poll_min: PositiveFloat = Field(default=0.5, description="Between two looks at a new state.")
    poll_max: PositiveFloat | None = Field(
        default=None, description="Between two looks at an old one; default 2 here, 10 elsewhere."
    )
    settle_timeout: PositiveFloat | None = Field(
        default=None,
        description="How long a job is looked for whose create was not answered, before it is "
        "created again; default 3 here, 60 elsewhere.",
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
        """Whether this is the provider's own service, with its prices and limits."""
        return self.base_url == HOSTED_URL

    @property
    def longest_poll(self) -> float:
        """Seconds between two looks at a state that does not change."""
        if self.poll_max is not None:
            return self.poll_max
        return 2.0 if is_loopback(self.base_url) else 10.0

    @property
    def settling(self) -> float:
        """Seconds in which a create that was not answered is carried out, if it ever is."""
        if self.settle_timeout is not None:
            return self.settle_timeout
        # Between us and a server elsewhere, proxies give up after 30 or 60 seconds.
        return 3.0 if is_loopback(self.base_url) else 60.0

    @property
    def scope(self) -> str:
        """Which server and account ids hold for; no secret."""
        return f"{self.base_url}#{self.profile or ''}"

    def policy(self) -> HttpPolicy:
        """Return the timeouts in the words of `net`."""
        return HttpPolicy(
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            write_timeout=self.write_timeout,
            call_timeout=self.call_timeout,
            upload_timeout=self.upload_timeout,
            attempts=self.attempts,
        )
