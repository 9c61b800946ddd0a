"""Requests of the OpenAI files, uploads and fine-tuning API, and those of Azure and Nebius.

Limits follow the types of openai-python 3.57.0 (2026-11) unless a class names another source.
Requests are strict: unknown fields are forbidden. Clients also send null for fields that are not
set, so a server accepts it; `to_wire` never does.
"""

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    model_validator,
)

__all__ = [
    "MAX_SEED",
    "MAX_SUFFIX",
    "MAX_SUFFIX_AZURE",
    "AzureFineTuningJobIn",
    "CheckpointSourceIn",
    "CompleteUploadIn",
    "DPOHyperparametersIn",
    "DPOMethodIn",
    "ExpiresAfterIn",
    "FineTuningJobIn",
    "FineTuningMethodIn",
    "HyperparametersIn",
    "NebiusFineTuningJobIn",
    "NebiusFineTuningMethodIn",
    "NebiusHyperparametersIn",
    "NebiusSupervisedMethodIn",
    "SupervisedMethodIn",
    "UploadIn",
    "WandbConfigIn",
    "WandbJobIntegrationIn",
]

MAX_SEED: Final = 2**31 - 1
MAX_SUFFIX: Final = 64
MAX_SUFFIX_AZURE: Final = 40
"""Maximum length of a suffix at OpenAI (18 until 2023) and at Azure."""


class _WireRequest(BaseModel, extra="forbid", str_max_length=100_000):
    """A request."""

    # The bound also makes pydantic reject lone surrogates, which JSON can hold but UTF-8 cannot.


# -- files -----------------------------------------------------------------------------


class ExpiresAfterIn(_WireRequest):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=3600, le=2_592_000)


class UploadIn(_WireRequest):
    """Request to upload a file in parts."""

    bytes: int = Field(ge=0)
    filename: str
    mime_type: str
    purpose: str
    expires_after: ExpiresAfterIn | None = None


class CompleteUploadIn(_WireRequest):
    """Request to join the parts, in the order of `part_ids`."""

    part_ids: list[str]
    md5: str | None = None


# -- jobs ------------------------------------------------------------------------------

_Auto = Literal["auto"]


class HyperparametersIn(_WireRequest):
    """Hyperparameters of a supervised job: a value, or `auto`."""

    n_epochs: _Auto | Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: _Auto | Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: _Auto | Annotated[float, Field(gt=0)] | None = None


class DPOHyperparametersIn(HyperparametersIn):
    """Hyperparameters of a preference job."""

    beta: _Auto | Annotated[float, Field(gt=0, le=2)] | None = None


class SupervisedMethodIn(_WireRequest):
    """Settings of supervised fine-tuning."""

    hyperparameters: HyperparametersIn | None = None


class DPOMethodIn(_WireRequest):
    """Settings of direct preference optimization."""

    hyperparameters: DPOHyperparametersIn | None = None


class FineTuningMethodIn(_WireRequest):
    """The training method; the settings of `reinforcement` are passed on unchecked."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethodIn | None = None
    dpo: DPOMethodIn | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        others = {"supervised", "dpo", "reinforcement"} - {self.type}
        if set_others := sorted(name for name in others if getattr(self, name) is not None):
            raise ValueError(f"method.{set_others[0]} does not belong to method {self.type!r}")
        return self


class WandbConfigIn(_WireRequest):
    """A project of Weights & Biases; the key is stored at the provider."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class WandbJobIntegrationIn(_WireRequest):
    """Report a job to Weights & Biases."""

    type: Literal["wandb"] = "wandb"
    wandb: WandbConfigIn


_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class FineTuningJobIn(_WireRequest):
    """Request to create a job. Clients also send null for fields that are not set."""

    model: Annotated[str, StringConstraints(min_length=1)]
    training_file: Annotated[str, StringConstraints(min_length=1)]
    validation_file: str | None = None
    method: FineTuningMethodIn | None = None
    hyperparameters: HyperparametersIn | None = Field(
        default=None, description="Superseded by `method`; supervised only."
    )
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SUFFIX)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    integrations: Annotated[list[WandbJobIntegrationIn], Field(max_length=5)] | None = None

    @property
    def method_type(self) -> str:
        """The method; supervised if none is given."""
        return self.method.type if self.method else "supervised"

    @property
    def effective_hyperparameters(self) -> dict[str, Any]:
        """The values that are set, wherever they are; those of `method` win."""
        given = self.hyperparameters.model_dump(exclude_none=True) if self.hyperparameters else {}
        method = self.model_dump(include={"method"}, exclude_none=True).get("method", {})
        return {**given, **(method.get(self.method_type, {}).get("hyperparameters") or {})}

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON body with the fields that are set and not null."""
        body = self.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
        # Always send the discriminator, even if it is the default.
        for integration in body.get("integrations", ()):
            integration.setdefault("type", "wandb")
        return body


_AZURE_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,40}")


def _azure_suffix(text: str) -> str:
    if not _AZURE_SUFFIX.fullmatch(text):
        raise ValueError("at most 40 letters, digits, hyphens and underscores")
    return text


class AzureFineTuningJobIn(FineTuningJobIn, populate_by_name=True):
    """Request to create a job at Azure (documentation of 2025-12).

    Attributes:
        training_type: Standard, GlobalStandard or a Developer type; sets price and place.
    """

    suffix: Annotated[str, AfterValidator(_azure_suffix)] | None = None
    training_type: str | None = Field(default=None, alias="trainingType")


class NebiusHyperparametersIn(_WireRequest):
    """Hyperparameters of Nebius; the learning rate is absolute and `auto` does not exist.

    Defaults of the service: batch_size 8, learning_rate 1e-5, n_epochs 3, packing true,
    context_length 8192, lora false, lora_r 8, lora_alpha 8 (reference 20260506).
    """

    batch_size: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    n_epochs: Annotated[int, Field(ge=1)] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    packing: bool | None = None
    max_grad_norm: Annotated[float, Field(ge=0)] | None = None
    context_length: Annotated[int, Field(ge=1)] | None = None
    lora: bool | None = None
    lora_r: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: Annotated[int, Field(ge=1)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None


class NebiusSupervisedMethodIn(_WireRequest):
    """Settings of supervised fine-tuning at Nebius."""

    hyperparameters: NebiusHyperparametersIn | None = None


class NebiusFineTuningMethodIn(_WireRequest):
    """The training method; Nebius documents one."""

    type: Literal["supervised"] = "supervised"
    supervised: NebiusSupervisedMethodIn | None = None


class CheckpointSourceIn(_WireRequest):
    """A checkpoint to continue from; the token is for a private repository."""

    repo: str
    type: str = "hf"
    revision: str | None = None
    token: str | None = Field(default=None, repr=False)


class NebiusFineTuningJobIn(_WireRequest):
    """Request to create a job at Nebius (reference of API version 20260506).

    The suffix has no documented limit. Unlike OpenAI's, a W&B integration carries the key.
    """

    model: Annotated[str, StringConstraints(min_length=1)]
    training_file: Annotated[str, StringConstraints(min_length=1)]
    validation_file: str | None = None
    method: NebiusFineTuningMethodIn | None = None
    hyperparameters: NebiusHyperparametersIn | None = None
    suffix: Annotated[str, StringConstraints(min_length=1)] | None = None
    seed: int | None = None
    integrations: list[dict[str, Any]] | None = Field(default=None, repr=False)
    tags: list[str] | None = None
    from_checkpoint: CheckpointSourceIn | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON body with the fields that are set and not null."""
        body = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        if self.method is not None:
            body["method"].setdefault("type", self.method.type)
        if self.from_checkpoint is not None:
            body["from_checkpoint"].setdefault("type", self.from_checkpoint.type)
        return body
