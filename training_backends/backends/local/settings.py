"""How models are fetched from the hub."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from training_backends.core.errors import ConfigError
from training_backends.core.settings import SectionSettings
from training_backends.http.urls import normalize_base_url

__all__ = ["LocalOptions", "LocalSettings"]


class LocalOptions(BaseModel):
    """How to train on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto takes a GPU if there is one."
    )
    max_runs: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Runs that may train at once; one a GPU, or one without a GPU, if not given.",
    )
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Of those that wait, the highest trains first; among equals, who came first.",
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints; if not given a tenth of the run, but 10 at least.",
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, le=10_000, description="How many of the newest checkpoints stay on disk."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Rows in memory at a time, halved where they do not fit; divides batch_size.",
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs that train together: each takes its part of the rows of every step.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="What to compute in; auto takes bfloat16 on a GPU that has it.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto",
        description="Implementation in transformers; auto takes sdpa where the model has it.",
    )
    kernels: Literal["auto", "none"] = Field(
        default="auto",
        description="On a GPU, auto takes those of liger-kernel where that is installed.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Compute twice to save memory; on a GPU if not given.",
    )
    packing: bool = Field(
        default=False,
        description="Fill sequences of seq_len with several rows; batch_size then counts those.",
    )
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="For preference pairs: what it costs to leave the model one began with.",
    )
    dpo_label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of the pairs that are taken to be the wrong way round.",
    )
    result: Literal["adapter", "merged", "both"] = Field(
        default="adapter",
        description="What an adapter is saved as: by itself, merged into its base, or both.",
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
