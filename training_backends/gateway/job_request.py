"""Validate a job request and convert it to a training configuration."""

import hashlib
import json
from base64 import b32decode, b32encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel, ValidationError

from training_backends.core.capabilities import Capabilities, config_issues
from training_backends.core.config import (
    ClassifierTarget,
    Data,
    DataSource,
    Hyperparameters,
    Result,
    TrainingConfig,
)
from training_backends.core.integrations import WandbIntegration
from training_backends.gateway.catalogue import Catalogue, Offer
from training_backends.gateway.errors import invalid, misfit, plain
from training_backends.protocols.mistral.errors import no_model_message
from training_backends.protocols.mistral.status import METHODS
from training_backends.protocols.mistral.wire import (
    ClassifierTargetIn,
    CompletionTrainingParametersIn,
    JobIn,
)

__all__ = [
    "CheckedJob",
    "check_declared",
    "check_job",
    "digest",
    "job_of_profile",
    "make_config",
    "secret_profile",
]


_SDK_RATE: Final = CompletionTrainingParametersIn().learning_rate
"""What the SDKs send for a learning rate that their user has not set."""
_RATE_IGNORED: Final = (
    f"The learning rate {_SDK_RATE:g}, which is the default of the SDKs, is ignored: the backend "
    "chooses the learning rate."
)
_PLACES = {"data.train": "training_files", "data.validation": "validation_files"}
"""Fields of a request by those of a configuration, where they differ."""


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A request that passed all checks that need no files.

    Attributes:
        method: `TrainingConfig.method`.
        hyperparameters: Only those that the client set.
        training_files: Each `{file_id, weight}`.
        keys: The client's own keys of `integrations`, in their order; without them, the
            integrations use the keys of the gateway.
        tolerated: Fraction of invalid rows to skip.
        options: Options of the backend.
        openai: What only the OpenAI API has; None for jobs of the Mistral API.
        fingerprint: The same for similar jobs.
        notes: What the client should know about how its request was read.
    """

    offer: Offer
    job_type: str
    method: str
    suffix: str | None
    hyperparameters: dict[str, Any]
    training_files: list[dict[str, Any]]
    validation_files: list[str]
    classifier_targets: list[dict[str, Any]]
    fingerprint: str
    integrations: tuple[WandbIntegration, ...] = ()
    keys: tuple[str, ...] = ()
    auto_start: bool = True
    tolerated: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    openai: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def check_job(
    request: JobIn, catalogue: Catalogue, capabilities: Capabilities, *, default_epochs: float
) -> CheckedJob:
    """Check everything in a request that can be checked without its files.

    Raises:
        HTTPProblem: A field is invalid or not supported.
    """
    job_type = request.job_type or ("classifier" if request.classifier_targets else "completion")
    offer = _offer(request.model, job_type, catalogue, capabilities)
    _check_supported(request, job_type, capabilities)
    if not request.training_files:
        raise invalid(["body", "training_files"], "At least one file is required.", "missing")
    hyperparameters, notes = _hyperparameters(request, capabilities, default_epochs)
    training_files = [file.model_dump() for file in request.training_files]
    targets = [_target(target) for target in request.classifier_targets or ()]
    validation_files = list(request.validation_files or ())
    suffix = request.suffix or None
    similar: list[Any] = [request.model, job_type, suffix, hyperparameters, targets]
    similar += [sorted(training_files, key=json.dumps), sorted(validation_files)]
    _check_bounds(hyperparameters, training_files, targets)
    job = CheckedJob(
        offer=offer,
        job_type=job_type,
        method=METHODS[job_type],
        suffix=suffix,
        hyperparameters=hyperparameters,
        training_files=training_files,
        validation_files=validation_files,
        classifier_targets=targets,
        fingerprint=digest(similar),
        integrations=tuple(
            WandbIntegration(project=given.project, name=given.name, run_name=given.run_name)
            for given in request.integrations or ()
        ),
        keys=tuple(given.api_key for given in request.integrations or ()),
        auto_start=request.auto_start,
        tolerated=request.invalid_sample_skip_percentage,
        notes=notes,
    )
    check_declared(job, capabilities, _PLACES)
    return job


def digest(values: Any) -> str:
    """Return a digest of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_declared(job: CheckedJob, capabilities: Capabilities, places: Mapping[str, str]) -> None:
    """Reject fields that the backend does not declare.

    Args:
        places: Fields of a request by those of a configuration, where they differ.
    """
    names = (*(file["file_id"] for file in job.training_files), *job.validation_files)
    sources = {name: DataSource(path=Path(name)) for name in names}
    config = make_config(job, sources, str(UUID(int=0)), {}, capabilities)
    for issue in config_issues(config, capabilities, "this gateway's backend"):
        name = issue.field or ""
        for ours, theirs in places.items():
            name = name.replace(ours, theirs)
        place = [int(part) if part.isdigit() else part for part in name.split(".")]
        raise invalid(["body", *place], f"{issue.message[:1].upper()}{issue.message[1:]}.")


def make_config(
    job: CheckedJob,
    sources: Mapping[str, DataSource],
    job_id: str,
    options: Mapping[str, Any],
    capabilities: Capabilities,
    *,
    destination: str | None = None,
) -> TrainingConfig:
    """Return the training configuration of a job, with only what its request sets.

    The gateway itself names the model, so the suffix is only for a backend that uses it as well.

    Args:
        sources: The files by the ids in the request.
        destination: Where the result is copied, if the backend can download it.
    """
    return TrainingConfig(
        model=job.offer.target,
        method=job.method,
        data=Data(
            train=tuple(
                sources[file["file_id"]].model_copy(update={"weight": file["weight"]})
                for file in job.training_files
            ),
            validation=tuple(sources[name] for name in job.validation_files),
        ),
        hyperparameters=Hyperparameters(**job.hyperparameters),
        suffix=job.suffix if capabilities.suffix else None,
        result=Result(destination=destination if capabilities.downloads else None),
        classifier_targets=tuple(
            ClassifierTarget.model_validate(target) for target in job.classifier_targets
        ),
        integrations=_integrations(job, job_id),
        tuning=job.offer.tuning,
        options={**job.offer.options, **job.options, **options},
    )


def _check_bounds(
    hyperparameters: Mapping[str, Any],
    training_files: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
) -> None:
    """Reject values that the protocol allows and a configuration does not, such as huge steps."""
    parts: list[tuple[list[str | int], type[BaseModel], Mapping[str, Any]]] = [
        (["body", "hyperparameters"], Hyperparameters, hyperparameters)
    ]
    for index, file in enumerate(training_files):
        source = {"path": file["file_id"], "weight": file["weight"]}
        parts.append((["body", "training_files", index], DataSource, source))
    for index, target in enumerate(targets):
        parts.append((["body", "classifier_targets", index], ClassifierTarget, target))
    for place, model, values in parts:
        try:
            model.model_validate(values)
        except ValidationError as error:
            raise misfit(place, error) from None


def _offer(model: str, job_type: str, catalogue: Catalogue, capabilities: Capabilities) -> Offer:
    if METHODS[job_type] not in capabilities.methods:
        raise plain(422, f"This gateway's backend does not support {job_type} fine-tuning.")
    offer = catalogue.get(model)
    if offer is not None and job_type in offer.job_types:
        return offer
    names = catalogue.names(job_type)
    if not names:
        # Clients take the service's own sentence with an empty list as: API retired.
        raise plain(422, f"This gateway offers no model for {job_type} fine-tuning.")
    raise plain(422, no_model_message(job_type, names))


def _check_supported(request: JobIn, job_type: str, capabilities: Capabilities) -> None:
    if request.repositories:
        raise invalid(
            ["body", "repositories"],
            "Repositories are not supported; upload their content as files.",
        )
    for index, integration in enumerate(request.integrations or ()):
        if index and integration.type in capabilities.integrations:
            raise invalid(["body", "integrations", index], "At most one integration is supported.")
    if job_type == "classifier" and not request.classifier_targets:
        # mistralai 2.5.1 silently drops all targets if one has no weight.
        message = "Required for a classifier job. The Python SDK drops targets without a weight."
        raise invalid(["body", "classifier_targets"], message, "missing")
    if job_type != "classifier" and request.classifier_targets:
        raise invalid(["body", "classifier_targets"], "Only supported for classifier jobs.")
    if job_type == "classifier" and "fim_ratio" in request.hyperparameters.model_fields_set:
        raise invalid(
            ["body", "hyperparameters", "fim_ratio"],
            "Extra inputs are not permitted",
            "extra_forbidden",
        )
    if request.suffix and not _is_suffix(request.suffix):
        raise invalid(["body", "suffix"], "Use letters, digits, dots, dashes and underscores.")


def _is_suffix(text: str) -> bool:
    return text.isascii() and all(char.isalnum() or char in "._-" for char in text)


def _hyperparameters(
    request: JobIn, capabilities: Capabilities, default_epochs: float
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the hyperparameters to use, and notes about those that are not."""
    given = request.hyperparameters
    if given.epochs is not None and given.training_steps is not None:
        raise invalid(["body", "hyperparameters"], "Set epochs or training_steps, not both.")
    # The protocol's defaults are the hosted service's; each backend has its own.
    chosen = given.model_dump(exclude_unset=True, exclude_none=True)
    known = capabilities.hyperparameters
    if (
        given.epochs is None
        and given.training_steps is None
        and (known is None or "epochs" in known)
    ):
        chosen["epochs"] = default_epochs
    rate = chosen.get("learning_rate")
    if known is not None and "learning_rate" not in known and rate == _SDK_RATE:
        del chosen["learning_rate"]
        return chosen, (_RATE_IGNORED,)
    return chosen, ()


def _target(target: ClassifierTargetIn) -> dict[str, Any]:
    return {**target.model_dump(), "loss_function": target.loss_function or "single_class"}


def _integrations(job: CheckedJob, job_id: str) -> tuple[WandbIntegration, ...]:
    if not job.keys:
        return job.integrations
    credential = f"wandb/{secret_profile(job_id)}"
    return tuple(given.model_copy(update={"credential": credential}) for given in job.integrations)


def job_of_profile(profile: str) -> str | None:
    """Return the job whose own key is stored under a profile, or None."""
    encoded = profile.removeprefix("job-")
    try:
        return str(UUID(bytes=b32decode(encoded.upper() + "=" * (-len(encoded) % 8))))
    except ValueError:
        return None


def secret_profile(job_id: str) -> str:
    """Return the credential profile that stores a job's own key."""
    # Base32 keeps it within the length limit of a profile name.
    return f"job-{b32encode(UUID(job_id).bytes).decode().rstrip('=').lower()}"
