"""Options and settings of the local backend."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from training_backends.core.errors import ConfigError
from training_backends.core.settings import SectionSettings
from training_backends.http.urls import normalize_base_url

__all__ = ["LocalOptions", "LocalSettings", "TrainingOptions"]


class TrainingOptions(BaseModel, frozen=True, extra="forbid"):
    """How to train, wherever the trainer runs."""

    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints; default: a tenth of the run, at least 10.",
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, le=10_000, description="How many of the newest checkpoints to keep."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Rows per forward pass, halved if they do not fit; must divide batch_size.",
    )
    sharding: Literal["auto", "zero2", "zero3"] = Field(
        default="auto",
        description="With several processes: zero2 divides gradients and optimizer state among "
        "the GPUs, zero3 also the weights; auto is zero2 if that leaves half of the memory free.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Compute dtype; auto uses bfloat16 on GPUs that support it.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto",
        description="Attention implementation; auto uses sdpa if the model supports it.",
    )
    kernels: Literal["auto", "none"] = Field(
        default="auto",
        description="auto uses liger-kernel on a GPU, if installed.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations to save memory; default: on a GPU.",
    )
    packing: bool = Field(
        default=False,
        description="Pack several rows into each sequence; batch_size then counts sequences.",
    )
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="For dpo: KL penalty towards the reference model.",
    )
    dpo_label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="For dpo: assumed fraction of mislabelled pairs.",
    )
    result: Literal["adapter", "merged", "both"] = Field(
        default="adapter",
        description="How to save an adapter: separately, merged into its base model, or both.",
    )
    max_invalid_fraction: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Fraction of invalid rows that are skipped instead of rejected.",
    )
    sample_prompt: str | None = Field(
        default=None, description="Prompt to answer before the first and after the last step."
    )
    sample_max_tokens: int = Field(
        default=64, ge=1, le=32_768, description="Maximum length of the answer, in tokens."
    )


class LocalOptions(TrainingOptions, frozen=True):
    """How to train on this machine."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto uses a GPU if there is one."
    )
    max_runs: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Maximum concurrent runs; default: one per GPU, or one without a GPU.",
    )
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Higher priorities leave the queue first; equal ones in order of arrival.",
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of GPUs for data-parallel training; they share each step's rows.",
    )


class LocalSettings(SectionSettings):
    """Section `local`: `TRAINING_BACKENDS_LOCAL__OFFLINE` and so on."""

    section: ClassVar[str | None] = "local"

    python: Path | None = Field(
        default=None,
        description="Python interpreter that trains, with training-backends[local] in its "
        "environment; default: the current one.",
    )
    generate_idle: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that the process which answers `generate` stays loaded for the next "
        "prompt; 0: not at all.",
    )
    offline: bool = Field(
        default=False, description="Never contact the model hub; same as HF_HUB_OFFLINE=1."
    )
    hub_url: str | None = Field(
        default=None, description="URL of a model hub mirror; default: HF_ENDPOINT."
    )
    profile: str | None = Field(
        default=None, description="Credential profile of `huggingface` to use."
    )

    @field_validator("hub_url")
    @classmethod
    def _normalized(cls, value: str | None) -> str | None:
        try:
            return value and normalize_base_url(value)
        except ConfigError as error:
            raise ValueError("; ".join(issue.message for issue in error.issues)) from None
