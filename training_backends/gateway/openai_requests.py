"""Validate a job request of the OpenAI API and convert it to a training configuration."""

import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from training_backends.core.backend import TrainingBackend
from training_backends.core.capabilities import Capabilities
from training_backends.core.config import Hyperparameters, TrainingConfig
from training_backends.core.errors import ConfigError
from training_backends.core.estimate import Estimate
from training_backends.core.integrations import WandbIntegration
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.errors import invalid, problem
from training_backends.gateway.job_request import CheckedJob, check_declared, digest
from training_backends.protocols.openai.errors import model_not_available
from training_backends.protocols.openai.requests import MAX_SEED, FineTuningJobIn
from training_backends.protocols.openai.status import to_method

__all__ = ["check_openai_job", "multiplied_rate"]

_PLACES: Final = {
    "data.train.0": "training_file",
    "data.validation.0": "validation_file",
    "hyperparameters.epochs": "hyperparameters.n_epochs",
    "hyperparameters.seed": "seed",
}
"""Fields of a request by those of a configuration, where they differ."""
_BETA: Final = ("dpo_beta", "beta")
"""Names of the backends' options for the KL penalty of DPO."""


def check_openai_job(
    request: FineTuningJobIn,
    catalogue: Catalogue,
    backend: TrainingBackend,
    *,
    default_epochs: float,
    idempotency_key: str | None,
) -> CheckedJob:
    """Check everything in a request that can be checked without its files.

    Raises:
        HTTPProblem: A field is invalid or not supported.
    """
    capabilities = backend.capabilities
    offer = catalogue.get(request.model)
    if offer is None or "completion" not in offer.job_types:
        raise problem(model_not_available(request.model))
    method = to_method(request.method_type)
    if capabilities.uses_method and method not in capabilities.methods:
        message = f"This gateway's backend does not support the method {request.method_type}."
        raise invalid(["body", "method"], message)
    given = {
        name: value
        for name, value in request.effective_hyperparameters.items()
        if value not in {None, "auto"}
    }
    options = _options(given, backend.options_model, capabilities)
    hyperparameters = _hyperparameters(given, request.seed, capabilities, default_epochs)
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", request.suffix) if request.suffix else None
    validation_files = [request.validation_file] if request.validation_file else []
    similar = [request.model, method, suffix, hyperparameters, options, request.training_file]
    job = CheckedJob(
        offer=offer,
        job_type="completion",
        method=method,
        suffix=suffix,
        hyperparameters=hyperparameters,
        training_files=[{"file_id": request.training_file, "weight": 1.0}],
        validation_files=validation_files,
        classifier_targets=[],
        fingerprint=digest([*similar, validation_files]),
        integrations=tuple(
            WandbIntegration(
                project=one.wandb.project,
                name=one.wandb.name,
                entity=one.wandb.entity,
                tags=tuple(one.wandb.tags or ()),
            )
            for one in request.integrations or ()
        ),
        options=options,
        openai={
            "method": method,
            "given": given,
            "default_beta": _default_beta(backend.options_model) if method == "dpo" else None,
            "seed": request.seed,
            "suffix": request.suffix,
            "metadata": request.metadata or None,
            "integrations": request.to_wire().get("integrations", []),
            "request": digest(request.to_wire()),
            "idempotency_key": idempotency_key,
        },
    )
    check_declared(job, capabilities, _PLACES)
    return job


def _hyperparameters(
    given: Mapping[str, Any], seed: int | None, capabilities: Capabilities, default_epochs: float
) -> dict[str, Any]:
    """Return the values in our names; what is `auto` is the backend's choice, except epochs."""
    known = capabilities.hyperparameters
    if seed is None and (known is None or "seed" in known):
        seed = secrets.randbelow(MAX_SEED + 1)  # as the service does
    found = {"epochs": given.get("n_epochs"), "batch_size": given.get("batch_size"), "seed": seed}
    if found["epochs"] is None and (known is None or "epochs" in known):
        found["epochs"] = default_epochs
    return {name: value for name, value in found.items() if value is not None}


def _options(
    given: Mapping[str, Any], model: type[BaseModel], capabilities: Capabilities
) -> dict[str, Any]:
    """Return the options of the backend that some hyperparameters stand for.

    A backend without a multiplier of its own gets a learning rate after the validation; see
    `multiplied_rate`.
    """
    options: dict[str, Any] = {}
    multiplier = given.get("learning_rate_multiplier")
    known = capabilities.hyperparameters
    if multiplier is not None and "learning_rate_multiplier" in model.model_fields:
        options["learning_rate_multiplier"] = multiplier
    elif multiplier not in {None, 1.0} and known is not None and "learning_rate" not in known:
        raise invalid(
            ["body", "hyperparameters", "learning_rate_multiplier"],
            "This gateway's backend does not support a learning rate; use auto.",
        )
    if "beta" in given:
        names = [name for name in _BETA if name in model.model_fields]
        if not names:
            message = "This gateway's backend does not support beta; use auto."
            raise invalid(["body", "hyperparameters", "beta"], message)
        options[names[0]] = given["beta"]
    return options


def _default_beta(model: type[BaseModel]) -> float | None:
    found = (model.model_fields[name].default for name in _BETA if name in model.model_fields)
    return next(found, None)


def multiplied_rate(job: Any, config: TrainingConfig, estimate: Estimate) -> dict[str, float]:
    """Return the learning rate that a job's multiplier stands for; empty without one.

    A multiplier of 1.0 is the backend's default learning rate for the model and method.

    Raises:
        ConfigError: The backend does not report its default, or the product is out of range.
    """
    multiplier = ((job.openai or {}).get("given") or {}).get("learning_rate_multiplier")
    if multiplier in {None, 1.0} or "learning_rate_multiplier" in config.options:
        return {}
    if config.hyperparameters.learning_rate is not None:
        return {}  # validated before
    default = estimate.hyperparameters.get("learning_rate")
    if default is None:
        raise ConfigError(
            "The backend does not report its default learning rate, which "
            "learning_rate_multiplier multiplies.",
            hint="Use auto.",
        )
    rate = multiplier * default
    try:
        Hyperparameters(learning_rate=rate)
    except ValidationError as error:
        raise ConfigError(
            f"learning_rate_multiplier {multiplier:g} makes a learning rate of {rate:g}, which is "
            "out of range.",
            hint="Use a multiplier closer to 1.",
        ) from error
    return {"learning_rate": rate}
