"""Every request and response of the Mistral files, fine-tuning and models API.

Names are those of the published OpenAPI specification (as of 2026-07). What is read is
read tolerantly: unknown fields are ignored and words such as a status or a purpose stay
plain text, so that a new one does not break a client. What is sent is exact: requests
forbid what the specification does not know, and a field that may not be null is never
null. All times on the wire are integers, Unix seconds.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "FILE_PURPOSES",
    "FILE_VISIBILITIES",
    "MAX_FILE_BYTES",
    "SAMPLE_TYPES",
    "SOURCES",
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
    "WandbIntegration",
    "WandbIntegrationOut",
    "is_wandb_key",
    "read_detailed_job",
    "read_ft_model",
    "read_job",
    "read_model_card",
]

FILE_PURPOSES = ("fine-tune", "batch", "ocr")
FILE_VISIBILITIES = ("workspace", "user")
SAMPLE_TYPES = ("pretrain", "instruct", "batch_request", "batch_result", "batch_error")
SOURCES = ("upload", "repository", "mistral")

MAX_FILE_BYTES = 512 * 10**6
"""Largest upload. The specification says 512 MB, as of 2026-07; MB or MiB is not said."""


_WANDB_KEY = re.compile(r"(?:local-)?[!-~]{40}|wandb_v1_[A-Za-z0-9_]{31,119}")
"""The specification says 40 characters. Keys made since 2026 have 86 and begin with `wandb_v1_`
(wandb/wandb#11614); those of a server of one's own may begin with `local-`."""


def is_wandb_key(text: str) -> bool:
    """Tell whether a text has the shape of a Weights & Biases key, old or new."""
    return _WANDB_KEY.fullmatch(text) is not None


class _Out(BaseModel):
    """A response."""

    model_config = ConfigDict(extra="ignore")


class _In(BaseModel):
    """A request."""

    # A bound also makes pydantic look at the text, so that half a surrogate pair, which
    # JSON can write and UTF-8 cannot, is refused.
    model_config = ConfigDict(extra="forbid", str_max_length=100_000)


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
    """A file just uploaded."""


class RetrieveFileOut(FileSchema):
    """A file asked for by its id."""

    deleted: bool = False


class ListFilesOut(_Out):
    """A page of files."""

    data: list[FileSchema]
    object: str = "list"
    total: int | None = None


class DeleteFileOut(_Out):
    """The answer to deleting a file."""

    id: str
    object: str = "file"
    deleted: bool = True


class FileSignedURL(_Out):
    """Where a file can be fetched without a key for a while."""

    url: str


# -- jobs: requests --------------------------------------------------------------------


class TrainingFile(_In):
    """A training file and its share; also read from its bare id."""

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


class ClassifierTargetIn(_In):
    """One thing that a classifier decides."""

    # The name becomes part of each metric's name; the specification has no bound.
    model_config = ConfigDict(str_max_length=256)

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


class WandbIntegration(_In):
    """Report to Weights & Biases."""

    type: Literal["wandb"] = "wandb"
    project: str
    name: str | None = None
    api_key: Annotated[str, AfterValidator(_wandb_key)] = Field(max_length=128, repr=False)
    run_name: str | None = None


class JobIn(_In):
    """Create a job. Reads training files as bare ids too, as the documentation shows them."""

    model: str
    training_files: list[Annotated[TrainingFile, BeforeValidator(_training_file)]] = Field(
        default_factory=list
    )
    validation_files: list[str] | None = None
    suffix: str | None = Field(default=None, max_length=18)
    integrations: list[WandbIntegration] | None = None
    auto_start: bool = False
    invalid_sample_skip_percentage: float = Field(default=0, ge=0, le=0.5)
    job_type: Literal["completion", "classifier"] | None = None
    hyperparameters: CompletionTrainingParametersIn
    repositories: list[GithubRepositoryIn] | None = None
    classifier_targets: list[ClassifierTargetIn] | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON body: what was set, and nothing that is null."""
        body = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        body["training_files"] = [file.model_dump(mode="json") for file in self.training_files]
        body["auto_start"] = self.auto_start
        # The word that tells one kind from another is sent even where it is the default.
        for integration in body.get("integrations", ()):
            integration.setdefault("type", "wandb")
        for repository in body.get("repositories", ()):
            repository.setdefault("type", "github")
        return body


# -- jobs: responses -------------------------------------------------------------------


class ClassifierTrainingParameters(_Out):
    """Hyperparameters of a classifier job, as they were taken."""

    training_steps: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float | None = 0.1
    warmup_fraction: float | None = 0.05
    epochs: float | None = None
    seq_len: int | None = None


class CompletionTrainingParameters(ClassifierTrainingParameters):
    """Hyperparameters of a completion job, as they were taken."""

    fim_ratio: float | None = 0.9


class ClassifierTargetOut(_Out):
    """One thing that a classifier decides."""

    name: str
    labels: list[str]
    weight: float = 1.0
    loss_function: str = "single_class"


class GithubRepositoryOut(_Out):
    """A repository that was trained on, at its commit."""

    type: str = "github"
    name: str
    owner: str
    ref: str | None = None
    weight: float = 1.0
    commit_id: str


class WandbIntegrationOut(_Out):
    """Where a run is reported."""

    type: str = "wandb"
    project: str
    name: str | None = None
    run_name: str | None = None
    url: str | None = None


class JobMetadataOut(_Out):
    """The quote: null until the job is VALIDATED."""

    expected_duration_seconds: int | None = None
    cost: float | None = None
    cost_currency: str | None = None
    train_tokens_per_step: int | None = None
    train_tokens: int | None = None
    data_tokens: int | None = None
    estimated_start_time: int | None = None


class LegacyJobMetadataOut(JobMetadataOut):
    """The answer to a dry run."""

    deprecated: bool = True
    details: str = ""
    epochs: float | None = None
    training_steps: int | None = None
    object: str = "job.metadata"


class EventOut(_Out):
    """Something that happened to a job."""

    name: str
    data: dict[str, Any] | None = None
    created_at: int


class MetricOut(_Out):
    """What was measured. The hosted service's accuracy was not bounded by 1."""

    train_loss: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


class CheckpointOut(_Out):
    """A point that a job reached."""

    metrics: MetricOut
    step_number: int
    created_at: int


class Job(_Out):
    """What all jobs have."""

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
    """What all jobs have when they are asked for one by one."""

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
    """Read a job of a list or of a create."""
    kind = ClassifierJobOut if data.get("job_type") == "classifier" else CompletionJobOut
    return kind.model_validate(data)


def read_detailed_job(data: Mapping[str, Any]) -> DetailedJob:
    """Read a job asked for by its id, just started or just cancelled."""
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
    """What a model can be used for."""

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
    """What all models have."""

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
    """A model that is offered."""

    type: str = "base"


class FTModelCard(ModelCard):
    """A model that was fine-tuned."""

    type: str = "fine-tuned"
    job: str
    root: str
    archived: bool = False


def read_model_card(data: Mapping[str, Any]) -> ModelCard:
    """Read one model; the service spells the discriminator `type` or `TYPE`."""
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
    """The answer to deleting a model."""

    id: str
    object: str = "model"
    deleted: bool = True


class FTModelCapabilitiesOut(_Out):
    """What a fine-tuned model can be used for."""

    completion_chat: bool = True
    completion_fim: bool = False
    function_calling: bool = False
    fine_tuning: bool = False
    classification: bool = False


class FTModel(_Out):
    """What all fine-tuned models have when they are updated."""

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


def read_ft_model(data: Mapping[str, Any]) -> FTModel:
    """Read the answer to updating a model."""
    kind = ClassifierFTModelOut if data.get("model_type") == "classifier" else CompletionFTModelOut
    return kind.model_validate(data)


class UpdateFTModelIn(_In):
    """Change a model's name or description; send only what is set."""

    name: str | None = None
    description: str | None = None


class ArchiveFTModelOut(_Out):
    """The answer to archiving a model."""

    id: str
    object: str = "model"
    archived: bool = True


class UnarchiveFTModelOut(_Out):
    """The answer to bringing a model back."""

    id: str
    object: str = "model"
    archived: bool = False
