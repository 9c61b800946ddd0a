"""Requests and responses of the Mistral files, fine-tuning and models API.

Names follow the published OpenAPI specification (as of 2026-07). Responses are parsed tolerantly:
unknown fields are ignored, and enums such as status and purpose are plain strings, so that new
values do not break a client. Requests are strict: unknown fields are forbidden, and fields that
must not be null never are. All times are integers in Unix seconds.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

__all__ = [
    "FILE_PURPOSES",
    "FILE_VISIBILITIES",
    "MAX_FILE_BYTES",
    "MAX_SUFFIX",
    "ArchiveFTModelOut",
    "BaseModelCard",
    "CheckpointOut",
    "ClassifierDetailedJobOut",
    "ClassifierFTModelOut",
    "ClassifierJobOut",
    "ClassifierTargetIn",
    "ClassifierTargetOut",
    "ClassifierTrainingParameters",
    "ClassifierTrainingParametersIn",
    "CompletionDetailedJobOut",
    "CompletionFTModelOut",
    "CompletionJobOut",
    "CompletionTrainingParameters",
    "CompletionTrainingParametersIn",
    "DeleteFileOut",
    "DeleteModelOut",
    "DetailedJob",
    "EventOut",
    "FTModel",
    "FTModelCapabilitiesOut",
    "FTModelCard",
    "FileSchema",
    "FileSignedURL",
    "GithubRepositoryIn",
    "GithubRepositoryOut",
    "Job",
    "JobIn",
    "JobMetadataOut",
    "JobsOut",
    "LegacyJobMetadataOut",
    "ListFilesOut",
    "MetricOut",
    "ModelCapabilities",
    "ModelCard",
    "ModelList",
    "RetrieveFileOut",
    "TrainingFile",
    "UnarchiveFTModelOut",
    "UpdateFTModelIn",
    "UploadFileOut",
    "WandbIntegrationIn",
    "WandbIntegrationOut",
    "is_wandb_key",
    "read_detailed_job",
    "read_job",
    "read_model_card",
]

FILE_PURPOSES = ("fine-tune", "batch", "ocr")
FILE_VISIBILITIES = ("workspace", "user")

MAX_FILE_BYTES = 512 * 10**6
"""Maximum upload size. The specification (2026-07) says 512 MB, without defining MB."""
MAX_SUFFIX = 18
"""Maximum characters of a job's suffix, from the specification (2026-07)."""


_WANDB_KEY = re.compile(r"(?:local-)?[!-~]{40}|wandb_v1_[A-Za-z0-9_]{31,119}")
"""The specification says 40 characters. Keys created since 2026 have 86 and begin with `wandb_v1_`
(wandb/wandb#11614); keys of a self-hosted server may begin with `local-`."""


def is_wandb_key(text: str) -> bool:
    """Return whether a text has the format of a Weights & Biases key, old or new."""
    return _WANDB_KEY.fullmatch(text) is not None


class _Out(BaseModel, extra="ignore"):
    """A response."""


# A length limit also makes pydantic inspect the text, which rejects lone surrogates: valid in JSON,
# but not in UTF-8.
class _In(BaseModel, extra="forbid", str_max_length=100_000):
    """A request."""


def _empty_for_none(value: Any) -> Any:
    return [] if value is None else value


# -- files -----------------------------------------------------------------------------


class FileSchema(_Out):
    """A file in a list."""

    id: str
    object: str = "file"
    bytes: int | None = None
    created_at: int
    filename: str
    purpose: str = "fine-tune"
    sample_type: str = "instruct"
    num_lines: int | None = None
    mimetype: str | None = None
    source: str = "upload"
    signature: str | None = None
    expires_at: int | None = None
    visibility: str | None = None


class UploadFileOut(FileSchema):
    """Response to an upload."""


class RetrieveFileOut(FileSchema):
    """A retrieved file."""

    deleted: bool = False


class ListFilesOut(_Out):
    """A page of files."""

    data: list[FileSchema]
    object: str = "list"
    total: int | None = None


class DeleteFileOut(_Out):
    """Response to deleting a file."""

    id: str
    object: str = "file"
    deleted: bool = True


class FileSignedURL(_Out):
    """A signed URL to download a file without an API key."""

    url: str


# -- jobs: requests --------------------------------------------------------------------


class TrainingFile(_In):
    """A training file and its weight; also parsed from a bare id."""

    file_id: str
    weight: float = Field(default=1.0, gt=0)


def _training_file(value: Any) -> Any:
    return {"file_id": value} if isinstance(value, str) else value


class ClassifierTrainingParametersIn(_In):
    """Hyperparameters of a classifier job."""

    training_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-4, ge=1e-8, le=1)
    weight_decay: float | None = Field(default=0.1, ge=0, le=1)
    warmup_fraction: float | None = Field(default=0.05, ge=0, le=1)
    epochs: float | None = Field(default=None, gt=0)
    seq_len: int | None = Field(default=None, ge=100)


class CompletionTrainingParametersIn(ClassifierTrainingParametersIn):
    """Hyperparameters of a completion job."""

    fim_ratio: float | None = Field(default=0.9, ge=0, le=1)


# The target's name becomes part of metric names; the specification sets no limit.
class ClassifierTargetIn(_In, str_max_length=256):
    """A classification target."""

    name: str
    labels: list[str]
    weight: float = Field(default=1.0, ge=0)
    loss_function: Literal["single_class", "multi_class"] | None = None


class GithubRepositoryIn(_In):
    """A repository to train on."""

    type: Literal["github"] = "github"
    name: str
    owner: str
    ref: str | None = None
    weight: float = Field(default=1.0, gt=0)
    token: str = Field(repr=False)


def _wandb_key(text: str) -> str:
    if not is_wandb_key(text):
        raise ValueError("a Weights & Biases key has 40 characters, or begins with wandb_v1_")
    return text


class WandbIntegrationIn(_In):
    """Report to Weights & Biases."""

    type: Literal["wandb"] = "wandb"
    project: str
    name: str | None = None
    api_key: Annotated[str, AfterValidator(_wandb_key)] = Field(max_length=128, repr=False)
    run_name: str | None = None


class JobIn(_In):
    """Request to create a job. Training files may be bare ids, as in the documentation."""

    model: str
    training_files: list[Annotated[TrainingFile, BeforeValidator(_training_file)]] = Field(
        default_factory=list
    )
    validation_files: list[str] | None = None
    suffix: str | None = Field(default=None, max_length=MAX_SUFFIX)
    integrations: list[WandbIntegrationIn] | None = None
    auto_start: bool = False
    invalid_sample_skip_percentage: float = Field(default=0, ge=0, le=0.5)
    job_type: Literal["completion", "classifier"] | None = None
    hyperparameters: CompletionTrainingParametersIn
    repositories: list[GithubRepositoryIn] | None = None
    classifier_targets: list[ClassifierTargetIn] | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON body with the fields that are set and not null."""
        body = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        body["training_files"] = [file.model_dump(mode="json") for file in self.training_files]
        body["auto_start"] = self.auto_start
        # Always send the discriminator, even if it is the default.
        for integration in body.get("integrations", ()):
            integration.setdefault("type", "wandb")
        for repository in body.get("repositories", ()):
            repository.setdefault("type", "github")
        return body


# -- jobs: responses -------------------------------------------------------------------


class ClassifierTrainingParameters(_Out):
    """Effective hyperparameters of a classifier job."""

    training_steps: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float | None = 0.1
    warmup_fraction: float | None = 0.05
    epochs: float | None = None
    seq_len: int | None = None


class CompletionTrainingParameters(ClassifierTrainingParameters):
    """Effective hyperparameters of a completion job."""

    fim_ratio: float | None = 0.9


class ClassifierTargetOut(_Out):
    """A classification target."""

    name: str
    labels: list[str]
    weight: float = 1.0
    loss_function: str = "single_class"


class GithubRepositoryOut(_Out):
    """A repository used for training, with its commit."""

    type: str = "github"
    name: str
    owner: str
    ref: str | None = None
    weight: float = 1.0
    commit_id: str


class WandbIntegrationOut(_Out):
    """A Weights & Biases integration."""

    type: str = "wandb"
    project: str
    name: str | None = None
    run_name: str | None = None
    url: str | None = None


class JobMetadataOut(_Out):
    """The price quote; null until the job is VALIDATED."""

    expected_duration_seconds: int | None = None
    cost: float | None = None
    cost_currency: str | None = None
    train_tokens_per_step: int | None = None
    train_tokens: int | None = None
    data_tokens: int | None = None
    estimated_start_time: int | None = None


class LegacyJobMetadataOut(JobMetadataOut):
    """Response to a dry run."""

    deprecated: bool = True
    details: str = ""
    epochs: float | None = None
    training_steps: int | None = None
    object: str = "job.metadata"


class EventOut(_Out):
    """An event of a job."""

    name: str
    data: dict[str, Any] | None = None
    created_at: int


class MetricOut(_Out):
    """Metrics of a checkpoint. The hosted service's accuracy could exceed 1."""

    train_loss: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


class CheckpointOut(_Out):
    """A checkpoint of a job."""

    metrics: MetricOut
    step_number: int
    created_at: int


class Job(_Out):
    """Fields of all jobs."""

    id: str
    auto_start: bool = False
    model: str
    status: str
    created_at: int
    modified_at: int
    training_files: Annotated[list[str], BeforeValidator(_empty_for_none)]
    validation_files: list[str] | None = Field(default_factory=list)
    object: str = "job"
    fine_tuned_model: str | None = None
    suffix: str | None = None
    integrations: list[WandbIntegrationOut] | None = None
    trained_tokens: int | None = None
    metadata: JobMetadataOut | None = None
    job_type: str
    hyperparameters: ClassifierTrainingParameters


class CompletionJobOut(Job):
    """A completion job in a list."""

    job_type: str = "completion"
    hyperparameters: CompletionTrainingParameters
    repositories: Annotated[list[GithubRepositoryOut], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )


class ClassifierJobOut(Job):
    """A classifier job in a list."""

    job_type: str = "classifier"


class DetailedJob(Job):
    """Additional fields of all retrieved jobs."""

    events: Annotated[list[EventOut], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )
    checkpoints: Annotated[list[CheckpointOut], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )


class CompletionDetailedJobOut(DetailedJob):
    """A completion job."""

    job_type: str = "completion"
    hyperparameters: CompletionTrainingParameters
    repositories: Annotated[list[GithubRepositoryOut], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )


class ClassifierDetailedJobOut(DetailedJob):
    """A classifier job."""

    job_type: str = "classifier"
    classifier_targets: Annotated[list[ClassifierTargetOut], BeforeValidator(_empty_for_none)] = (
        Field(default_factory=list)
    )


def read_job(data: Mapping[str, Any]) -> Job:
    """Parse a job from a list or create response."""
    kind = ClassifierJobOut if data.get("job_type") == "classifier" else CompletionJobOut
    return kind.model_validate(data)


def read_detailed_job(data: Mapping[str, Any]) -> DetailedJob:
    """Parse a job from a retrieve, start or cancel response."""
    if data.get("job_type") == "classifier":
        return ClassifierDetailedJobOut.model_validate(data)
    return CompletionDetailedJobOut.model_validate(data)


def _any_job(value: Any) -> Any:
    return read_job(value) if isinstance(value, Mapping) else value


class JobsOut(_Out):
    """A page of jobs."""

    data: list[Annotated[CompletionJobOut | ClassifierJobOut, BeforeValidator(_any_job)]] = Field(
        default_factory=list
    )
    object: str = "list"
    total: int = 0


# -- models ----------------------------------------------------------------------------


class ModelCapabilities(_Out):
    """Capabilities of a model."""

    completion_chat: bool = False
    function_calling: bool = False
    completion_fim: bool = False
    fine_tuning: bool = False
    vision: bool = False
    ocr: bool = False
    classification: bool = False
    moderation: bool = False
    audio: bool = False
    audio_transcription: bool = False


class ModelCard(_Out):
    """Fields of all models."""

    id: str
    object: str = "model"
    created: int | None = None
    owned_by: str = "mistralai"
    capabilities: ModelCapabilities
    name: str | None = None
    description: str | None = None
    max_context_length: int = 32768
    aliases: list[str] = Field(default_factory=list)
    deprecation: str | None = None
    deprecation_replacement_model: str | None = None
    default_model_temperature: float | None = None
    type: str


class BaseModelCard(ModelCard):
    """A base model."""

    type: str = "base"


class FTModelCard(ModelCard):
    """A fine-tuned model."""

    type: str = "fine-tuned"
    job: str
    root: str
    archived: bool = False


def read_model_card(data: Mapping[str, Any]) -> ModelCard:
    """Parse a model; the service spells the discriminator `type` or `TYPE`."""
    values = {**data, "type": data.get("type") or data.get("TYPE") or "base"}
    kind = FTModelCard if values["type"] == "fine-tuned" else BaseModelCard
    return kind.model_validate(values)


def _any_card(value: Any) -> Any:
    return read_model_card(value) if isinstance(value, Mapping) else value


class ModelList(_Out):
    """All models."""

    object: str = "list"
    data: list[Annotated[BaseModelCard | FTModelCard, BeforeValidator(_any_card)]] = Field(
        default_factory=list
    )


class DeleteModelOut(_Out):
    """Response to deleting a model."""

    id: str
    object: str = "model"
    deleted: bool = True


class FTModelCapabilitiesOut(_Out):
    """Capabilities of a fine-tuned model."""

    completion_chat: bool = True
    completion_fim: bool = False
    function_calling: bool = False
    fine_tuning: bool = False
    classification: bool = False


class FTModel(_Out):
    """Fields of all updated fine-tuned models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    workspace_id: str
    root: str
    root_version: str
    archived: bool
    name: str | None = None
    description: str | None = None
    capabilities: FTModelCapabilitiesOut
    max_context_length: int = 32768
    aliases: list[str] = Field(default_factory=list)
    job: str
    model_type: str


class CompletionFTModelOut(FTModel):
    """A fine-tuned completion model."""

    model_type: str = "completion"


class ClassifierFTModelOut(FTModel):
    """A fine-tuned classifier."""

    model_type: str = "classifier"
    classifier_targets: list[ClassifierTargetOut]


class UpdateFTModelIn(_In):
    """Request to update a model's name or description; only set fields are sent."""

    name: str | None = None
    description: str | None = None


class ArchiveFTModelOut(_Out):
    """Response to archiving a model."""

    id: str
    object: str = "model"
    archived: bool = True


class UnarchiveFTModelOut(_Out):
    """Response to unarchiving a model."""

    id: str
    object: str = "model"
    archived: bool = False
