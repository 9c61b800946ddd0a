"""What Together's fine-tuning API sends. Source: together 3.1.1 (PyPI), 2026-11.

Unknown fields are ignored, and whatever the client can do without is optional: the generated types
of the official SDK and its hand-written ones differ.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, Field

__all__ = [
    "LARGEST_FILE",
    "LONGEST_SUFFIX",
    "NANODOLLAR",
    "BatchLimits",
    "FineTune",
    "FineTuneCheckpoint",
    "FineTuneEvent",
    "JobPrice",
    "ModelLimits",
    "UploadedFile",
]

LONGEST_SUFFIX: Final = 40
"""Characters of a job's suffix."""
LARGEST_FILE: Final = 5 * 2**30
"""Bytes; larger files need the multipart upload, which this client does not use."""
NANODOLLAR: Final = 1_000_000_000
"""`total_price` of a job is in billionths of a dollar; that of an estimate is in dollars."""


def _aware(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_aware)]
"""ISO 8601; without a time zone it is UTC."""


class FineTuneEvent(BaseModel):
    """An entry of a job's log; types are in lower or upper case."""

    created_at: Time
    message: str = ""
    type: str = ""
    level: str | None = None
    step: int | None = None
    total_steps: int | None = None

    @property
    def kind(self) -> str:
        """The type in lower case."""
        return self.type.lower()


class FineTune(BaseModel):
    """A job; lists have most of its fields."""

    id: str = Field(min_length=1)
    status: str
    created_at: Time | None = None
    updated_at: Time | None = None
    started_at: Time | None = None
    model: str | None = None
    suffix: str | None = None
    model_output_name: str | None = None
    from_checkpoint: str | None = None
    training_type: dict[str, Any] | None = None
    token_count: int | None = None
    total_price: int | None = None

    def has_suffix(self, suffix: str) -> bool:
        """Return whether it was created with this suffix, of which lists may lack the field."""
        return self.suffix == suffix or suffix in (self.model_output_name or "")


class FineTuneCheckpoint(BaseModel):
    """A checkpoint, from which another job can start."""

    step: int
    created_at: Time


class _FileReport(BaseModel):
    error: str | None = None


class UploadedFile(BaseModel):
    """An uploaded file."""

    id: str = Field(min_length=1)
    filename: str = ""
    bytes: int | None = None
    processing_status: str | None = None
    validation_report: _FileReport | None = None


class BatchLimits(BaseModel):
    """Batch sizes of one kind of tuning."""

    min_batch_size: int = 1
    max_batch_size: int
    max_batch_size_dpo: int


class _LoraLimits(BatchLimits):
    max_rank: int
    target_modules: tuple[str, ...] = ()


class ModelLimits(BaseModel):
    """What the hyperparameters of a model may be."""

    lora_training: _LoraLimits
    full_training: BatchLimits | None = None
    supports_full_training: bool = True
    min_learning_rate: float
    max_learning_rate: float
    max_num_epochs: int
    max_num_evals: int
    max_num_checkpoints: int
    min_max_seq_length: int = 1
    max_seq_length_sft: int
    max_seq_length_dpo: int


class JobPrice(BaseModel):
    """The price of a job before it is created, in dollars."""

    estimation_available: bool
    unavailable_reason: str | None = None
    allowed_to_proceed: bool | None = None
    estimated_total_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    estimated_train_token_count: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    user_limit: float | None = None

    @property
    def is_allowed(self) -> bool:
        """Whether the account may start the job."""
        return self.allowed_to_proceed is not False
