"""What can be set for this backend beyond the common configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["GithubRepository", "MistralOptions"]


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
