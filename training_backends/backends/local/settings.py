"""How models are fetched from the hub."""

from typing import ClassVar

from pydantic import Field, field_validator

from training_backends.core.errors import ConfigError
from training_backends.core.settings import SectionSettings
from training_backends.http.urls import normalize_base_url

__all__ = ["LocalSettings"]


class LocalSettings(SectionSettings):
    """Section `local`: `TRAINING_BACKENDS_LOCAL__OFFLINE` and so on."""

    section: ClassVar[str | None] = "local"

    offline: bool = Field(
        default=False, description="Never ask the model hub; HF_HUB_OFFLINE=1 says the same."
    )
    hub_url: str | None = Field(
        default=None, description="A mirror of the model hub; default what HF_ENDPOINT says."
    )
    profile: str | None = Field(
        default=None, description="Which of several keys of `huggingface` to use."
    )

    @field_validator("hub_url")
    @classmethod
    def _normalized(cls, value: str | None) -> str | None:
        try:
            return value and normalize_base_url(value)
        except ConfigError as error:
            raise ValueError("; ".join(issue.message for issue in error.issues)) from None
