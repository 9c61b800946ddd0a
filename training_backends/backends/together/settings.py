"""Settings and options of the Together backend."""

from typing import ClassVar, Final, Literal

from pydantic import BaseModel, Field, PositiveFloat, field_validator

from training_backends.core.errors import ConfigError
from training_backends.http.settings import ServerSettings
from training_backends.http.urls import normalize_base_url

__all__ = ["HOSTED_URL", "TogetherOptions", "TogetherSettings"]

HOSTED_URL: Final = "https://api.together.ai"


class TogetherOptions(BaseModel, frozen=True, extra="forbid"):
    """`options` of a configuration; an option that is not set is left to Together."""

    n_checkpoints: int | None = Field(default=None, ge=0, description="Checkpoints to keep.")
    n_evals: int | None = Field(
        default=None, ge=0, description="Evaluations on the validation file."
    )
    packing: bool | None = Field(default=None, description="Pack several rows into a sequence.")
    train_on_inputs: bool | Literal["auto"] = Field(
        default="auto", description="Include prompts in the loss (sft)."
    )
    lr_scheduler: Literal["linear", "cosine"] | None = None
    min_lr_ratio: float | None = Field(
        default=None, ge=0, le=1, description="Final learning rate relative to the peak."
    )
    max_grad_norm: float | None = Field(default=None, ge=0)
    dpo_beta: float | None = Field(default=None, gt=0, description="KL penalty (dpo).")
    rpo_alpha: float | None = Field(
        default=None, ge=0, description="Weight of the loss of the chosen answer (dpo)."
    )


class TogetherSettings(ServerSettings):
    """Section `together`: `TRAINING_BACKENDS_TOGETHER__BASE_URL` and so on. Times in seconds.

    A key belongs to one of Together's projects, so the profile also chooses the project.
    """

    section: ClassVar[str | None] = "together"

    base_url: str = Field(
        default=HOSTED_URL, description="Base URL, with or without a trailing slash or /v1."
    )
    read_timeout: PositiveFloat = Field(default=60.0, description="Timeout without data.")
    file_timeout: PositiveFloat = Field(
        default=1800.0, description="How long to wait until a file is checked."
    )
    poll_min: PositiveFloat = Field(default=1.0, description="Shortest polling interval.")
    poll_max: PositiveFloat | None = Field(default=30.0, description="Longest polling interval.")

    @field_validator("base_url")
    @classmethod
    def _normalized(cls, value: str) -> str:
        try:
            return normalize_base_url(value, drop_suffix="v1")
        except ConfigError as error:
            raise ValueError(error.message) from None
