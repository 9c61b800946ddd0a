"""Options of the local backend, under `options:` in a configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LocalOptions"]


class LocalOptions(BaseModel):
    """How to train on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto takes a GPU if there is one."
    )
    max_runs: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Runs that may train at once; others wait in the queue.",
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints; a tenth of the run if not given.",
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, le=10_000, description="How many of the newest checkpoints stay on disk."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Rows in memory at a time; must divide batch_size.",
    )
    max_invalid_fraction: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of unusable rows that is left out, not refused.",
    )
    sample_prompt: str | None = Field(
        default=None, description="Asked before the first and after the last step."
    )
    sample_max_tokens: int = Field(
        default=64, ge=1, le=32_768, description="Longest answer to it, in tokens."
    )
