"""Responses of the OpenAI files, uploads, fine-tuning and models API.

Names and shapes follow the published OpenAPI document (openai/openai-openapi, 2026-08-21) and the
types of openai-python 3.57.0; differences of Azure follow its specification 2024-10-21 and its
documentation of 2025-12, those of Nebius the reference of API version 20260506. Responses are
parsed tolerantly: unknown fields are ignored, and enums such as status, purpose and level are plain
strings, so that new values do not break a client. All times are Unix seconds.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Generic, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

__all__ = [
    "FILE_PURPOSES",
    "MAX_FILE_BYTES",
    "MAX_PART_BYTES",
    "MAX_UPLOAD_BYTES",
    "MIN_EXAMPLES",
    "FileDeleted",
    "FileObject",
    "FineTuningJob",
    "FineTuningJobCheckpoint",
    "FineTuningJobError",
    "FineTuningJobEvent",
    "FineTuningMethod",
    "FineTuningMethodOptions",
    "JobHyperparameters",
    "ListPage",
    "ModelDeleted",
    "ModelObject",
    "StepMetrics",
    "UploadObject",
    "UploadPart",
]

FILE_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""Purposes that an upload may have; results of a job have `fine-tune-results`."""

MAX_FILE_BYTES: Final = 512 * 10**6
"""Maximum size of a file in one request (openai-python 3.57.0: 512 MB, without defining MB)."""

MAX_PART_BYTES: Final = 64 * 10**6
MAX_UPLOAD_BYTES: Final = 8 * 10**9
"""Maximum sizes of a part and of an upload in parts (OpenAI; Azure allows 9 GB in total)."""

MIN_EXAMPLES: Final = 10
"""Minimum rows of a training file; fewer make the job fail after its creation."""

_T = TypeVar("_T")


class _WireAnswer(BaseModel, extra="ignore", populate_by_name=True):
    """A response."""


def _empty_for_none(value: Any) -> Any:
    return [] if value is None else value


def _whole(value: Any) -> Any:
    """Truncate a number with a fraction; the live service has sent such times."""
    return int(value) if isinstance(value, float) and math.isfinite(value) else value


def _number_or_none(value: Any) -> Any:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _mapping_or_none(value: Any) -> Any:
    return value if isinstance(value, Mapping) else None


Seconds = Annotated[int, BeforeValidator(_whole)]
_Text = Annotated[str | None, BeforeValidator(lambda value: value if value is None else str(value))]
_Measured = Annotated[float | None, BeforeValidator(_number_or_none)]


# -- lists -----------------------------------------------------------------------------


class ListPage(_WireAnswer, Generic[_T]):
    """A page of a list; `after=<id of the last item>` requests the next one.

    Attributes:
        has_more: None if the server does not say.
        first_id: Not sent for jobs and events.
    """

    object: str = "list"
    data: Annotated[list[_T], BeforeValidator(_empty_for_none)]
    has_more: bool | None = None
    first_id: str | None = None
    last_id: str | None = None

    @property
    def next_after(self) -> str | None:
        """The `after` of the next page; None after the last page.

        Without `has_more` a list continues until an empty page, as in the official Python client;
        the Node client stops after the first (both read in 2026-11). A server without `has_more`
        may also ignore `after`: stop at an item that was seen before.
        """
        if not self.data or self.has_more is False:
            return None
        last = getattr(self.data[-1], "id", None)
        return last if isinstance(last, str) else self.last_id


# -- files -----------------------------------------------------------------------------


class FileObject(_WireAnswer):
    """A file.

    Attributes:
        bytes: None where a server does not know the size yet.
        status: See `status.FILE_STATUSES`; None where a server does not send it.
    """

    id: str
    object: str = "file"
    bytes: int | None = None
    created_at: Seconds
    expires_at: Seconds | None = None
    filename: str
    purpose: str
    status: str | None = None
    status_details: str | None = None

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what the published schema does not allow to be null."""
        fields: dict[str, Any] = serialize(self)
        optional = ("expires_at", "status_details")
        return {name: v for name, v in fields.items() if v is not None or name not in optional}


class FileDeleted(_WireAnswer):
    """Response to deleting a file."""

    id: str
    object: str = "file"
    deleted: bool = True


class UploadObject(_WireAnswer):
    """An upload in parts.

    Attributes:
        status: pending, completed, cancelled or expired.
        file: The file, once completed.
    """

    id: str
    object: str = "upload"
    bytes: int
    created_at: Seconds
    expires_at: Seconds
    filename: str
    purpose: str
    status: str
    file: FileObject | None = None


class UploadPart(_WireAnswer):
    """A received part."""

    id: str
    object: str = "upload.part"
    created_at: Seconds
    upload_id: str


# -- jobs ------------------------------------------------------------------------------

_Given = Annotated[
    int | float | str | None,
    BeforeValidator(lambda value: value if isinstance(value, int | float | str) else None),
]


class JobHyperparameters(_WireAnswer, extra="allow"):
    """Hyperparameters of a job: `auto` until the job starts, numbers afterwards.

    Values of other providers, such as Nebius' `learning_rate`, are kept as further fields.
    """

    n_epochs: _Given = None
    batch_size: _Given = None
    learning_rate_multiplier: _Given = None
    beta: _Given = None

    def known(self) -> dict[str, Any]:
        """Return the values that are decided: neither missing nor `auto`."""
        values = self.model_dump(exclude_none=True)
        return {name: value for name, value in values.items() if value != "auto"}


class FineTuningMethodOptions(_WireAnswer, extra="allow"):
    """Settings of a method; those of graders are kept as further fields."""

    hyperparameters: Annotated[JobHyperparameters | None, BeforeValidator(_mapping_or_none)] = None


_Options = Annotated[FineTuningMethodOptions | None, BeforeValidator(_mapping_or_none)]


class FineTuningMethod(_WireAnswer):
    """The method of a job; a type that is not known is kept."""

    type: str = "supervised"
    supervised: _Options = None
    dpo: _Options = None
    reinforcement: _Options = None

    @property
    def options(self) -> FineTuningMethodOptions | None:
        """The settings of `type`."""
        options = getattr(self, self.type, None) if self.type in type(self).model_fields else None
        return options if isinstance(options, FineTuningMethodOptions) else None


class FineTuningJobError(_WireAnswer):
    """Why a job failed."""

    code: _Text = None
    message: _Text = None
    param: _Text = None


def _error_or_none(value: Any) -> Any:
    """Read the empty error of a healthy job as none; the live service sends one (2024-10)."""
    if isinstance(value, FineTuningJobError):
        return value
    fields = FineTuningJobError.model_fields
    return value if isinstance(value, Mapping) and any(value.get(f) for f in fields) else None


def _texts_or_none(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return None
    return {key: text for key, text in value.items() if isinstance(text, str)}


def _nonzero_or_none(value: Any) -> Any:
    return _whole(value) or None


_OPTIONAL_JOB_FIELDS: Final = (
    "method",
    "user_provided_suffix",
    "suffix",
    "training_type",
    "trained_steps",
    "total_steps",
)


class FineTuningJob(_WireAnswer):
    """A job.

    Attributes:
        hyperparameters: Null or absent for dpo and reinforcement at the live service.
        error: None for the empty object that healthy jobs carry.
        estimated_finish: None for the 0 that some answers carry.
        organization_id: Also read as `organisation_id`, the spelling of Azure's specification.
        user_provided_suffix: The suffix as the live service returns it (2024-2025).
        suffix: The suffix as Nebius returns it.
        training_type: Azure only.
        trained_steps: Nebius only, as `total_steps`.
    """

    id: str
    object: str = "fine_tuning.job"
    model: str
    training_file: str
    created_at: Seconds
    status: str
    organization_id: str = Field(
        default="", validation_alias=AliasChoices("organization_id", "organisation_id")
    )
    hyperparameters: Annotated[JobHyperparameters | None, BeforeValidator(_mapping_or_none)] = None
    method: Annotated[FineTuningMethod | None, BeforeValidator(_mapping_or_none)] = None
    seed: int | None = None
    validation_file: str | None = None
    fine_tuned_model: str | None = None
    finished_at: Seconds | None = None
    trained_tokens: int | None = None
    result_files: Annotated[list[str], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )
    error: Annotated[FineTuningJobError | None, BeforeValidator(_error_or_none)] = None
    estimated_finish: Annotated[int | None, BeforeValidator(_nonzero_or_none)] = None
    integrations: Annotated[list[dict[str, Any]], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_texts_or_none)] = None
    user_provided_suffix: str | None = None
    suffix: str | None = None
    training_type: str | None = Field(default=None, alias="trainingType")
    trained_steps: int | None = None
    total_steps: int | None = None

    @property
    def method_type(self) -> str:
        """The method; supervised if the job names none, as before 2024-12."""
        return self.method.type if self.method else "supervised"

    @property
    def effective_hyperparameters(self) -> dict[str, Any]:
        """The values that are decided, wherever the job carries them; those of `method` win."""
        options = self.method.options if self.method else None
        values = self.hyperparameters.known() if self.hyperparameters else {}
        if options and options.hyperparameters:
            values |= options.hyperparameters.known()
        return values

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON: every field of the protocol, null where unknown."""
        missing = {name for name in _OPTIONAL_JOB_FIELDS if getattr(self, name) is None}
        return self.model_dump(
            mode="json", by_alias=True, exclude=missing | {"method", "hyperparameters"}
        ) | {
            name: part.model_dump(mode="json", exclude_none=True) if part else None
            for name, part in (("hyperparameters", self.hyperparameters), ("method", self.method))
            if part or name == "hyperparameters"
        }


class StepMetrics(_WireAnswer):
    """Metrics of one step, in events, checkpoints and result files; None where not measured."""

    step: Annotated[int | None, BeforeValidator(lambda value: _whole(_number_or_none(value)))] = (
        None
    )
    total_steps: Annotated[
        int | None, BeforeValidator(lambda value: _whole(_number_or_none(value)))
    ] = None
    train_loss: _Measured = None
    train_mean_token_accuracy: _Measured = None
    valid_loss: _Measured = None
    valid_mean_token_accuracy: _Measured = None
    full_valid_loss: _Measured = None
    full_valid_mean_token_accuracy: _Measured = None

    def values(self) -> dict[str, float]:
        """Return what was measured, by name."""
        return self.model_dump(exclude_none=True, exclude={"step", "total_steps"})


class FineTuningJobEvent(_WireAnswer):
    """An event of a job; lists are newest first.

    Attributes:
        level: info, warn or error.
        type: message or metrics; absent in older answers.
        data: The metrics of a metrics event, see `events.read_metrics`.
    """

    id: str
    object: str = "fine_tuning.job.event"
    created_at: Seconds
    level: str = "info"
    message: str = ""
    type: str | None = None
    data: Annotated[dict[str, Any] | None, BeforeValidator(_mapping_or_none)] = None


class FineTuningJobCheckpoint(_WireAnswer):
    """A checkpoint of a job; lists are newest first.

    Attributes:
        result_files: Files of the weights; Nebius only.
    """

    id: str
    object: str = "fine_tuning.job.checkpoint"
    created_at: Seconds
    fine_tuned_model_checkpoint: str | None = None
    fine_tuning_job_id: str | None = None
    step_number: Seconds
    metrics: Annotated[StepMetrics, BeforeValidator(lambda value: value or {})] = Field(
        default_factory=StepMetrics
    )
    result_files: Annotated[list[str], BeforeValidator(_empty_for_none)] = Field(
        default_factory=list
    )


# -- models ----------------------------------------------------------------------------


class ModelObject(_WireAnswer):
    """A base model or a fine-tuned model.

    Attributes:
        shutdown_date: YYYY-MM-DD, since 2026.
    """

    id: str
    object: str = "model"
    created: Seconds | None = None
    owned_by: str = ""
    shutdown_date: str | None = None


class ModelDeleted(_WireAnswer):
    """Response to deleting a model."""

    id: str
    object: str = "model"
    deleted: bool = True
