"""Convert configurations to create requests and back, and match jobs with requests."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from training_backends.backends.openai.settings import OpenAIOptions, OpenAISettings, Variant
from training_backends.core.config import (
    TrainingConfig,
    given_options,
    option_issues,
)
from training_backends.core.errors import ConfigError, Issue
from training_backends.core.integrations import WandbIntegration
from training_backends.protocols.openai.requests import (
    AzureFineTuningJobIn,
    FineTuningJobIn,
    NebiusFineTuningJobIn,
)
from training_backends.protocols.openai.status import to_method, to_method_type
from training_backends.protocols.openai.wire import FineTuningJob

__all__ = ["HYPERPARAMETERS", "RUN_KEY", "TOKEN_KEY", "config_of", "issues_of", "make_job", "shows"]

RUN_KEY: Final = "training_backends_run"
TOKEN_KEY: Final = "training_backends_launch"  # noqa: S105  # no secret
"""Keys of a job's metadata: the run's id, and a random value that no other launch has."""

_FIELDS: Mapping[str, str] = MappingProxyType({"epochs": "n_epochs", "batch_size": "batch_size"})
_NEBIUS_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **_FIELDS,
        "learning_rate": "learning_rate",
        "weight_decay": "weight_decay",
        "warmup_fraction": "warmup_ratio",
        "seq_len": "context_length",
    }
)
HYPERPARAMETERS: Mapping[Variant, Mapping[str, str]] = MappingProxyType(
    {"openai": _FIELDS, "azure": _FIELDS, "nebius": _NEBIUS_FIELDS}
)
"""The protocol's names of our hyperparameters, besides `seed`."""

_REQUESTS: Mapping[Variant, type[BaseModel]] = MappingProxyType(
    {
        "openai": FineTuningJobIn,
        "azure": AzureFineTuningJobIn,
        "nebius": NebiusFineTuningJobIn,
    }
)


def issues_of(config: TrainingConfig, settings: OpenAISettings) -> Iterator[Issue]:
    """Yield what the capabilities cannot express: options, and the ranges of values."""
    found = list(option_issues(OpenAIOptions, given_options(OpenAIOptions, config.options)))
    yield from found
    if len(config.data.validation) > 1:
        yield Issue(
            code="too_many_files",
            message="the protocol has one validation file",
            field="data.validation",
            fix="join the files",
        )
    if found:
        return
    options = OpenAIOptions.model_validate(config.options)
    misplaced = False
    for name, why in _misplaced(config, options, settings):
        misplaced = True
        yield Issue(code="unsupported_field", message=why, field=f"options.{name}", fix="remove it")
    if misplaced:
        return
    try:
        make_job(config, settings, train="file-id", validation=None)
    except ConfigError as error:
        yield from error.issues


def _misplaced(
    config: TrainingConfig, options: OpenAIOptions, settings: OpenAISettings
) -> Iterator[tuple[str, str]]:
    if options.beta is not None and config.method != "dpo":
        yield "beta", "only preference training (dpo) has a beta"
    if options.training_type is not None and settings.variant != "azure":
        yield "training_type", "only Azure has training types"
    if options.learning_rate_multiplier is not None and settings.variant == "nebius":
        yield "learning_rate_multiplier", "Nebius takes hyperparameters.learning_rate instead"


def make_job(
    config: TrainingConfig,
    settings: OpenAISettings,
    *,
    train: str,
    validation: str | None,
    metadata: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the body of a create request.

    Args:
        seed: Used if the configuration has none.

    Raises:
        ConfigError: A value is outside the protocol's range; the issues name our fields.
    """
    variant = settings.variant or "openai"
    options = OpenAIOptions.model_validate(config.options)
    names = HYPERPARAMETERS[variant]
    chosen = config.hyperparameters.model_dump(exclude_none=True)
    hyper = {names[name]: value for name, value in chosen.items() if name in names}
    hyper |= options.model_dump(exclude_none=True, include={"learning_rate_multiplier", "beta"})
    if variant == "nebius" and config.tuning is not None:
        hyper |= _lora(config)
    kind = to_method_type(config.method) or config.method
    values: dict[str, Any] = {
        "model": config.base_model,
        "training_file": train,
        "validation_file": validation,
        **_method(kind, hyper, variant),
        "suffix": config.suffix,
        "seed": seed if config.hyperparameters.seed is None else config.hyperparameters.seed,
        "metadata": dict(metadata) if metadata else None,
        "integrations": [_wandb(entry) for entry in config.wandb] or None,
        "trainingType": options.training_type,
    }
    body = {name: value for name, value in values.items() if value is not None}
    try:
        request = _REQUESTS[variant].model_validate(body)
    except ValidationError as error:
        found = [_issue(detail["loc"], detail["msg"], names) for detail in error.errors()]
        # A field that also accepts `auto` has an error for each type; the last is of the number.
        issues = {issue.field: issue for issue in found}
        raise ConfigError(
            "The configuration is invalid for the OpenAI protocol.", issues=[*issues.values()]
        ) from None
    sent: dict[str, Any] = request.to_wire()  # type: ignore[attr-defined]  # each of them has it
    return sent


def _method(kind: str, hyper: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    if variant == "azure" and kind == "supervised":
        # Its versions before 2025 know no method; later ones read both.
        return {"hyperparameters": hyper or None}
    return {"method": {"type": kind, kind: {"hyperparameters": hyper} if hyper else None}}


def _wandb(entry: WandbIntegration) -> dict[str, Any]:
    """Return an integration; the key is not part of it, but of the provider's own settings."""
    values = {
        "project": entry.project,
        "name": entry.run_name or entry.name,
        "entity": entry.entity,
        "tags": list(entry.tags) or None,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return {"type": "wandb", "wandb": given}


def _lora(config: TrainingConfig) -> dict[str, Any]:
    tuning = config.tuning
    if tuning is None or tuning.kind == "full":
        return {"lora": False}
    alpha = 2 * tuning.rank if tuning.alpha is None else tuning.alpha
    return {
        "lora": True,
        "lora_r": tuning.rank,
        "lora_alpha": alpha,
        "lora_dropout": tuning.dropout,
    }


def _issue(place: tuple[int | str, ...], message: str, names: Mapping[str, str]) -> Issue:
    """Return an issue with the name that the field has in our configuration."""
    ours = {wire: f"hyperparameters.{name}" for name, wire in names.items()}
    ours |= {name: f"options.{name}" for name in ("learning_rate_multiplier", "beta")}
    ours |= {"seed": "hyperparameters.seed", "lora_alpha": "tuning.alpha"}
    found = next((ours[str(part)] for part in place if str(part) in ours), str(place[0]))
    return Issue(code="out_of_range", message=message, field=found)


def shows(job: FineTuningJob, body: Mapping[str, Any]) -> bool:
    """Return whether a job has the fields of a request, where the server shows them."""
    method = body.get("method") or {"type": "supervised"}
    options = method.get(method["type"]) or body
    wanted = options.get("hyperparameters") or {}
    suffix = job.user_provided_suffix or job.suffix
    return (
        job.training_file == body["training_file"]
        and (job.validation_file or None) == body.get("validation_file")
        # A server resolves an alias to a dated name.
        and job.model.startswith(body["model"])
        and job.method_type == method["type"]
        and suffix in {None, body.get("suffix")}
        and job.seed in {None, body.get("seed", job.seed)}
        and all(
            _agree(value, wanted[name])
            for name, value in job.effective_hyperparameters.items()
            if name in wanted
        )
    )


def _agree(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def config_of(job: FineTuningJob) -> TrainingConfig | None:
    """Return the configuration of a job, as far as the server reports it.

    Data files are given by their ids. None if it is not a valid one.
    """
    hyper = job.effective_hyperparameters
    known = {ours: hyper[wire] for ours, wire in _NEBIUS_FIELDS.items() if wire in hyper}
    files = {"train": [{"remote_id": job.training_file}]}
    if job.validation_file:
        files["validation"] = [{"remote_id": job.validation_file}]
    options = {name: hyper[name] for name in ("learning_rate_multiplier", "beta") if name in hyper}
    try:
        return TrainingConfig.model_validate(
            {
                "model": job.model,
                "method": to_method(job.method_type),
                "data": files,
                "hyperparameters": {**known, "seed": job.seed},
                "suffix": job.user_provided_suffix or job.suffix or None,
                "options": options,
            }
        )
    except ValidationError:
        return None
