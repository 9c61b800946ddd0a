"""Convert configurations to create requests, and match jobs with them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from training_backends.backends.mistral.job_state import plain
from training_backends.backends.mistral.settings import MistralOptions
from training_backends.core.backend import CredentialSource
from training_backends.core.config import Hyperparameters, TrainingConfig, option_issues
from training_backends.core.errors import ConfigError, Issue
from training_backends.protocols.mistral.status import METHODS, job_type_of
from training_backends.protocols.mistral.wire import (
    ClassifierTargetIn,
    CompletionTrainingParametersIn,
    GithubRepositoryIn,
    Job,
    JobIn,
    TrainingFile,
    WandbIntegrationIn,
    is_wandb_key,
)

__all__ = [
    "config_of",
    "find_credential",
    "make_job",
    "matches",
    "read_options",
    "same_job",
    "sent_fields",
]


def read_options(config: TrainingConfig) -> MistralOptions:
    """Validate and return the options of this backend.

    Raises:
        ConfigError: An option is invalid; the issues suggest the nearest name.
    """
    if issues := list(option_issues(MistralOptions, config.options)):
        raise ConfigError("Invalid options for the backend 'mistral'.", issues=issues)
    return MistralOptions.model_validate(config.options)


def sent_fields(config: TrainingConfig) -> dict[str, Any]:
    """Return the set hyperparameters by their names in the specification."""
    known = CompletionTrainingParametersIn.model_fields
    chosen = config.hyperparameters.model_dump(exclude_none=True)
    return {name: value for name, value in chosen.items() if name in known}


async def find_credential(credentials: CredentialSource, reference: str) -> str:
    """Return the secret of `PROVIDER` or `PROVIDER/PROFILE`.

    Raises:
        CredentialNotFound: There is no such secret.
    """
    provider, _, profile = reference.partition("/")
    return (await credentials.get(provider, profile or None)).get_secret_value()


async def make_job(
    config: TrainingConfig,
    train: Sequence[TrainingFile],
    validation: Sequence[str],
    credentials: CredentialSource,
) -> JobIn:
    """Return the create request, including the secrets that the configuration names.

    Raises:
        CredentialNotFound: A named secret does not exist.
        ConfigError: The server would reject it, for example for a key of the wrong length.
    """
    options = read_options(config)
    values: dict[str, Any] = {
        "model": config.base_model,
        "training_files": list(train),
        "auto_start": False,
        "invalid_sample_skip_percentage": options.invalid_sample_skip_percentage,
        "job_type": job_type_of(config.method),
        "hyperparameters": CompletionTrainingParametersIn(**sent_fields(config)),
    }
    if validation:
        values["validation_files"] = list(validation)
    if config.suffix is not None:
        values["suffix"] = config.suffix
    if config.classifier_targets:
        values["classifier_targets"] = [
            ClassifierTargetIn(**target.model_dump(exclude_none=True))
            for target in config.classifier_targets
        ]
    values |= await _with_secrets(config, options, credentials)
    return JobIn(**values)


async def _with_secrets(
    config: TrainingConfig, options: MistralOptions, credentials: CredentialSource
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.wandb:
        values["integrations"] = [
            WandbIntegrationIn(
                project=entry.project,
                name=entry.name,
                run_name=entry.run_name,
                api_key=check_wandb_key(await find_credential(credentials, entry.credential)),
            )
            for entry in config.wandb
        ]
    if options.repositories:
        values["repositories"] = [
            GithubRepositoryIn(
                name=entry.name,
                owner=entry.owner,
                ref=entry.ref,
                weight=entry.weight,
                token=await find_credential(credentials, entry.credential),
            )
            for entry in options.repositories
        ]
    return values


def check_wandb_key(key: str) -> str:
    """Return the key if it has a valid format.

    Raises:
        ConfigError: The format is invalid.
    """
    if is_wandb_key(key):
        return key
    issue = Issue(
        code="bad_wandb_key",
        message=f"the Weights & Biases key has {len(key)} characters; keys have 40, or begin with "
        "wandb_v1_ and have 86",
        field="integrations",
        fix="store a valid key with `training-backends credentials set wandb`",
    )
    raise ConfigError("Invalid Weights & Biases key.", issues=[issue])


def matches(job: Job, wanted: JobIn) -> bool:
    """Return whether a job matches a request, ignoring values filled in by the server."""
    return (
        sorted(job.training_files) == sorted(file.file_id for file in wanted.training_files)
        and sorted(job.validation_files or ()) == sorted(wanted.validation_files or ())
        and job.suffix == wanted.suffix
        and job.job_type == wanted.job_type
        and _same_model(job.model, wanted.model)
        and _fit(
            job.hyperparameters.model_dump(),
            wanted.hyperparameters.model_dump(exclude_unset=True),
        )
    )


def _same_model(found: str, wanted: str) -> bool:
    # A server may resolve `...-latest` to a dated name.
    return found == wanted or (
        wanted.endswith("-latest") and found.startswith(wanted.removesuffix("latest"))
    )


def _fit(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    """Return whether two sets of hyperparameters agree where both have a value."""
    for name, value in other.items():
        found = one.get(name)
        if found is not None and value is not None and not math.isclose(found, value, rel_tol=1e-6):
            return False
    return True


def same_job(one: Job, other: Job) -> bool:
    """Return whether two jobs are the same, as far as the server shows.

    For a validated job it also shows default values.
    """

    def essence(job: Job) -> tuple[object, ...]:
        return (
            sorted(job.training_files),
            sorted(job.validation_files or ()),
            job.suffix,
            job.job_type,
            job.model,
        )

    return essence(one) == essence(other) and _fit(
        one.hyperparameters.model_dump(exclude_unset=True),
        other.hyperparameters.model_dump(exclude_unset=True),
    )


def config_of(job: Job) -> TrainingConfig | None:
    """Return the configuration of a job, as far as the server reports it.

    Data files are given by their ids. Fields that the protocol does not report
    are omitted (tags, budget, file weights and, in lists, classifier targets), and
    hyperparameters are the effective ones.

    Returns:
        None if the job has no valid configuration.
    """
    hyper = job.hyperparameters.model_dump(exclude_none=True)
    known = {name: value for name, value in hyper.items() if name in Hyperparameters.model_fields}
    if "training_steps" in known:
        known.pop("epochs", None)  # some servers work one out from the other
    values = {
        "model": job.model,
        "method": METHODS.get(job.job_type),
        "data": {
            "train": [{"remote_id": file_id} for file_id in job.training_files],
            "validation": [{"remote_id": file_id} for file_id in job.validation_files or ()],
        },
        "hyperparameters": known,
        "suffix": job.suffix or None,
        "integrations": [
            {"project": entry.project, "name": entry.name, "run_name": entry.run_name}
            for entry in job.integrations or ()
            if entry.type == "wandb"
        ],
        "classifier_targets": [
            target.model_dump() for target in getattr(job, "classifier_targets", ())
        ],
        "options": _shown_options(job),
    }
    try:
        return TrainingConfig.model_validate(plain(values))
    except ValidationError:
        return None


def _shown_options(job: Job) -> dict[str, Any]:
    repositories = [
        {"owner": entry.owner, "name": entry.name, "ref": entry.ref, "weight": entry.weight}
        for entry in getattr(job, "repositories", ())
        if entry.type == "github"
    ]
    return {"repositories": repositories} if repositories else {}
