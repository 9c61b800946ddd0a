"""Create requests from configurations, and what Together does not accept in them."""

from collections.abc import Iterator
from typing import Any, Final

from training_backends.backends.together.settings import TogetherOptions
from training_backends.backends.together.wire import LONGEST_SUFFIX, BatchLimits, ModelLimits
from training_backends.core.config import TrainingConfig, Tuning, option_issues
from training_backends.core.dataset import Dataset
from training_backends.core.errors import ConfigError, Issue

__all__ = [
    "HYPERPARAMETERS",
    "LONGEST_OWN_SUFFIX",
    "config_issues",
    "limit_issues",
    "make_body",
    "make_suffix",
    "read_options",
    "saves_adapter",
    "users_suffix",
]

HYPERPARAMETERS: Final = {
    "epochs": "n_epochs",
    "learning_rate": "learning_rate",
    "batch_size": "batch_size",
    "seq_len": "max_seq_length",
    "weight_decay": "weight_decay",
    "warmup_fraction": "warmup_ratio",
    "seed": "random_seed",
}
"""Names in create requests. There is no number of steps; learning rates are absolute."""

_TOKEN: Final = 10
"""Hexadecimal digits."""
LONGEST_OWN_SUFFIX: Final = LONGEST_SUFFIX - 1 - _TOKEN
"""Characters left for the user: a job's suffix ends with a dash and the run's token."""

_SENT_OPTIONS: Final = ("n_checkpoints", "n_evals", "packing", "max_grad_norm")


def read_options(config: TrainingConfig) -> TogetherOptions:
    """Validate and return the options.

    Raises:
        ConfigError: An option is invalid; the issues suggest the nearest name.
    """
    if issues := list(option_issues(TogetherOptions, config.options)):
        raise ConfigError("Invalid options for the backend 'together'.", issues=issues)
    return TogetherOptions.model_validate(config.options)


def make_suffix(suffix: str | None, token: str) -> str:
    """Return a job's suffix, which no job of anyone else has.

    Args:
        token: Random hexadecimal digits.
    """
    return f"{suffix or 'run'}-{token[:_TOKEN]}"


def users_suffix(suffix: str) -> str:
    """Return the user's part of the suffix of one of our jobs."""
    return suffix[: -1 - _TOKEN]


def make_body(
    config: TrainingConfig,
    *,
    training_file: str,
    validation_file: str | None = None,
    suffix: str | None = None,
    from_checkpoint: str | None = None,
) -> dict[str, Any]:
    """Return a create request with what is set; Together chooses the rest.

    Args:
        from_checkpoint: Replaces the model: `JOB_ID:STEP`.
    """
    options = read_options(config)
    body: dict[str, Any] = {
        "model": config.model if from_checkpoint is None else None,
        "from_checkpoint": from_checkpoint,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "training_type": _training_type(config.tuning),
        "training_method": _training_method(config.method, options),
        "lr_scheduler": _scheduler(options),
    }
    hyper = config.hyperparameters
    body |= {name: getattr(hyper, ours) for ours, name in HYPERPARAMETERS.items()}
    if hyper.epochs is not None:
        body["n_epochs"] = int(hyper.epochs)
    body |= {name: getattr(options, name) for name in _SENT_OPTIONS}
    return {name: value for name, value in body.items() if value is not None}


def _training_type(tuning: Tuning | None) -> dict[str, Any] | None:
    if tuning is None:
        return None
    if tuning.kind == "full":
        return {"type": "Full"}
    return {
        "type": "Lora",
        "lora_r": tuning.rank,
        "lora_alpha": int(2 * tuning.rank if tuning.alpha is None else tuning.alpha),
        "lora_dropout": tuning.dropout,
        "lora_trainable_modules": ",".join(tuning.target_modules or ("all-linear",)),
    }


def _training_method(method: str, options: TogetherOptions) -> dict[str, Any]:
    if method == "dpo":
        chosen = {"dpo_beta": options.dpo_beta, "rpo_alpha": options.rpo_alpha}
        given = {name: value for name, value in chosen.items() if value is not None}
        return {"method": "dpo", **given}
    return {"method": "sft", "train_on_inputs": options.train_on_inputs}


def _scheduler(options: TogetherOptions) -> dict[str, Any] | None:
    kind, ratio = options.lr_scheduler, options.min_lr_ratio
    if kind is None and ratio is None:
        return None
    # Half a cycle is the default of together 3.1.1, which always sends one.
    cycles = {} if kind == "linear" else {"num_cycles": 0.5}
    return {
        "lr_scheduler_type": kind or "cosine",
        "lr_scheduler_args": {"min_lr_ratio": ratio or 0.0, **cycles},
    }


def saves_adapter(training_type: dict[str, Any] | None) -> bool:
    """Return whether a job's result is a LoRA adapter, which is also the default."""
    return training_type is None or training_type.get("type") != "Full"


# -- validation ------------------------------------------------------------------------


def config_issues(config: TrainingConfig, dataset: Dataset) -> Iterator[Issue]:
    """Yield what needs no server and the capabilities cannot express."""
    yield from option_issues(TogetherOptions, config.options)
    epochs, tuning = config.hyperparameters.epochs, config.tuning
    if epochs is not None and epochs != int(epochs):
        yield _issue("hyperparameters.epochs", f"{epochs:g} is not a whole number of epochs")
    if tuning is not None and tuning.alpha is not None and tuning.alpha != int(tuning.alpha):
        yield _issue("tuning.alpha", f"{tuning.alpha:g} is not a whole number")
    if len(config.data.validation) > 1:
        yield _issue("data.validation", "there can be only one validation file", "join the files")
    if config.options.get("n_evals") and not config.data.validation:
        yield _issue("options.n_evals", "evaluations need a validation file")
    for name in ("dpo_beta", "rpo_alpha"):
        if config.options.get(name) is not None and config.method != "dpo":
            yield _issue(f"options.{name}", f"{name} is for the method dpo", "remove it")
    for file in dataset.files:
        if file.packing != "plain":
            fix = "decompress or convert it to plain JSON Lines"
            yield _issue(f"data.{file.role}", f"{file.path.name} is {file.packing}", fix)


def limit_issues(config: TrainingConfig, limits: ModelLimits) -> Iterator[Issue]:
    """Yield the values that are out of bounds for the model."""
    hyper, tuning = config.hyperparameters, config.tuning
    dpo = config.method == "dpo"
    longest = limits.max_seq_length_dpo if dpo else limits.max_seq_length_sft
    least, most = limits.min_learning_rate, limits.max_learning_rate
    bounds: list[tuple[str, float | None, float, float]] = [
        ("hyperparameters.learning_rate", hyper.learning_rate, least, most),
        ("hyperparameters.epochs", hyper.epochs, 1, limits.max_num_epochs),
        ("hyperparameters.seq_len", hyper.seq_len, limits.min_max_seq_length, longest),
        ("options.n_evals", config.options.get("n_evals"), 0, limits.max_num_evals),
        (
            "options.n_checkpoints",
            config.options.get("n_checkpoints"),
            0,
            limits.max_num_checkpoints,
        ),
    ]
    batches: BatchLimits = limits.lora_training
    if tuning is not None and tuning.kind == "full":
        if limits.full_training is None or not limits.supports_full_training:
            yield _issue("tuning", f"{config.base_model} has no full fine-tuning", "use lora")
            return
        batches = limits.full_training
    elif tuning is not None:
        bounds.append(("tuning.rank", tuning.rank, 1, limits.lora_training.max_rank))
    most_rows = batches.max_batch_size_dpo if dpo else batches.max_batch_size
    bounds.append(
        ("hyperparameters.batch_size", hyper.batch_size, batches.min_batch_size, most_rows)
    )
    for field, value, lowest, highest in bounds:
        if isinstance(value, int | float) and not lowest <= value <= highest:
            fix = f"use {lowest:g} to {highest:g}"
            yield _issue(field, f"{value:g} is out of bounds for {config.base_model}", fix)


def _issue(field: str, message: str, fix: str | None = None) -> Issue:
    return Issue(code="not_accepted_by_together", message=message, field=field, fix=fix)
