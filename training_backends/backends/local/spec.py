"""Build the spec of a training process from a configuration, and find unsupported settings."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError

from training_backends.backends.local.interpreter import THIS_INTERPRETER, Interpreter
from training_backends.backends.local.settings import LocalOptions
from training_backends.core.config import (
    TINY_MODEL,
    TINY_POSITIONS,
    Hyperparameters,
    TrainingConfig,
    Tuning,
)
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue, suggest
from training_backends.rundir.directory import ADAPTER_CONFIG, RunSpec, adapter_base

__all__ = [
    "base_of",
    "build_spec",
    "config_of",
    "defaults_taken",
    "find_issues",
    "has_gpu",
    "resolved_model",
    "resolved_values",
]

_MODELS_OFFERED: Final = (
    f"{TINY_MODEL} (built in, offline), the directory of a model or an adapter, "
    "or ORGANIZATION/NAME on the Hub"
)
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DEFAULT_EPOCHS: Final = 3.0
_ROWS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"sft": ("instruct", "pretrain"), "dpo": ("preference",), "classifier": ("classifier",)}
)
_METHODS: Final = {row: method for method, rows in _ROWS.items() for row in rows}
_SEEDS: Final = 2**32
# NVIDIA, NVIDIA under WSL, and AMD, which torch also calls cuda.
_GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def find_issues(
    config: TrainingConfig, dataset: Dataset, interpreter: Interpreter | None = THIS_INTERPRETER
) -> Iterator[Issue]:
    """Yield everything in a configuration that this backend does not support.

    Args:
        interpreter: Python environment that trains; None: one that is not on this machine.
    """
    yield from _model_issues(config, interpreter)
    yield from _method_issues(config)
    yield from _hyperparameter_issues(config)
    yield from _option_issues(config)
    yield from _label_issues(config, dataset)
    for file in dataset.files:
        if file.sample_type and file.sample_type not in _ROWS[config.method]:
            supported = " or ".join(_ROWS[config.method])
            yield Issue(
                code="unsupported_sample_type",
                message=f"method {config.method} takes {supported} rows, not {file.sample_type}",
                path=str(file.path),
                fix=f"use other rows, or method: {_METHODS[file.sample_type]}",
            )


def _model_issues(config: TrainingConfig, interpreter: Interpreter | None) -> Iterator[Issue]:
    if not _is_model(config.base_model):
        yield Issue(
            code="unknown_model",
            message=f"unknown model {config.base_model!r}",
            field="model",
            fix=suggest(
                config.base_model, [TINY_MODEL], f"supported: {_MODELS_OFFERED}", cutoff=0.8
            ),
        )
    if config.chat_template is not None and config.base_model == TINY_MODEL:
        yield _unsupported(
            "chat_template", f"the template of {TINY_MODEL} is built in", "remove it"
        )
    kind = config.tuning.kind if config.tuning else None
    if kind in {"lora", "qlora"} and config.base_model == TINY_MODEL:
        yield _unsupported(
            "tuning.kind",
            f"{TINY_MODEL} has random weights and only supports full fine-tuning",
            "use full, or remove tuning",
        )
    elif kind == "qlora" and interpreter and not interpreter.has("bitsandbytes"):
        yield _unsupported(
            "tuning.kind",
            "qlora requires bitsandbytes",
            "use lora or full, or pip install 'training-backends[qlora]'",
        )

    if config.tuning and kind in {"lora", "qlora"} and _is_adapter(config.base_model):
        for name in sorted(config.tuning.model_fields_set - {"kind"}):
            yield Issue(
                code="unused_field",
                message="has no effect: training continues the adapter with its own value",
                field=f"tuning.{name}",
                severity="warning",
            )


def _is_adapter(model: str) -> bool:
    return (Path(model).expanduser() / ADAPTER_CONFIG).is_file()


def base_of(model: str) -> str:
    """Return the base model of an adapter's directory; other models unchanged.

    Raises:
        ValueError: The adapter's configuration cannot be read.
    """
    return adapter_base(Path(model).expanduser()) if _is_adapter(model) else model


def has_gpu() -> bool:
    """Return whether this machine has a GPU, by its driver's device files."""
    return any(map(Path.exists, _GPU_DEVICES))


def _method_issues(config: TrainingConfig) -> Iterator[Issue]:
    given = config.hyperparameters
    if given.fim_ratio and (config.method != "sft" or config.base_model == TINY_MODEL):
        reason = f"method {config.method}" if config.method != "sft" else TINY_MODEL
        yield _unsupported(
            "hyperparameters.fim_ratio",
            f"{reason} does not support fill-in-the-middle",
            "remove it",
        )
    if given.early_stopping_patience and not config.data.validation:
        yield Issue(
            code="missing_field",
            message="early stopping needs validation data",
            field="hyperparameters.early_stopping_patience",
            fix="set data.validation, or remove it",
        )
    if config.method != "classifier":
        return
    if not config.classifier_targets:
        yield _unsupported(
            "classifier_targets", "required for a classifier", "list each target and its labels"
        )
    names = Counter(target.name for target in config.classifier_targets)
    for index, target in enumerate(config.classifier_targets):
        field = f"classifier_targets[{index}]"
        if names[target.name] > 1:
            yield _unsupported(f"{field}.name", "duplicate target name", "rename one")
        if len({*target.labels}) == 1:
            yield _unsupported(
                f"{field}.labels",
                f"a single label ({target.labels[0]!r}) leaves nothing to classify",
                "list at least two labels",
            )
        elif len({*target.labels}) < len(target.labels):
            yield _unsupported(f"{field}.labels", "duplicate label", "remove one")
    if config.classifier_targets and not any(t.weight for t in config.classifier_targets):
        yield _unsupported(
            "classifier_targets", "every target has weight 0", "set the weight of at least one"
        )


def _label_issues(config: TrainingConfig, dataset: Dataset) -> Iterator[Issue]:
    """Warn about targets for which all training rows have the same label."""
    for index, target in enumerate(config.classifier_targets):
        found = {
            each for file in dataset.train for each in file.summary.labels.get(target.name, ())
        }
        if len(found) == 1 and len(target.labels) > 1:
            yield Issue(
                code="one_label",
                message=f"every training row has the same label, {found.pop()!r}: "
                "the classifier would learn nothing",
                field=f"classifier_targets[{index}].labels",
                fix="add rows with the other labels",
                severity="warning",
            )


def _is_model(name: str) -> bool:
    if name == TINY_MODEL:
        return True
    directory = Path(name).expanduser()
    if directory.is_dir():
        return any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    return bool(_HUB_NAME.fullmatch(name))


def _hyperparameter_issues(config: TrainingConfig) -> Iterator[Issue]:
    given = config.hyperparameters
    if given.seed is not None and given.seed >= _SEEDS:
        yield _unsupported("hyperparameters.seed", "the seed is too large", "use less than 2^32")
    if config.base_model == TINY_MODEL and given.seq_len and given.seq_len > TINY_POSITIONS:
        yield _unsupported(
            "hyperparameters.seq_len",
            f"{TINY_MODEL} supports at most {TINY_POSITIONS} tokens",
            f"use {TINY_POSITIONS} or less",
        )


def _option_issues(config: TrainingConfig) -> Iterator[Issue]:
    options = LocalOptions.model_validate(config.options)
    kind = _resolved_tuning(config).kind
    if options.packing and config.method != "sft":
        yield _unsupported(
            "options.packing", f"method {config.method} does not support packing", "remove it"
        )
    unused = {"result": kind == "full"}
    unused["sharding"] = options.num_processes == 1
    unused |= dict.fromkeys(("dpo_beta", "dpo_label_smoothing"), config.method != "dpo")
    for name in unused:
        if unused[name] and name in options.model_fields_set:
            yield Issue(
                code="unused_field",
                message="has no effect on this run",
                field=f"options.{name}",
                severity="warning",
            )
    if options.device == "cuda" and not has_gpu():
        yield Issue(
            code="no_gpu",
            message="no GPU found on this machine",
            field="options.device",
            fix="use auto or cpu",
            severity="warning",
        )
    batch_size = resolved_values(config)["batch_size"]
    if options.num_processes > 1 and (options.device == "cpu" or not has_gpu()):
        yield Issue(
            code="no_gpu",
            message="without GPUs, several processes share the CPUs and are no faster",
            field="options.num_processes",
            fix="remove it",
            severity="warning",
        )
    if options.num_processes > batch_size:
        yield _unsupported(
            "options.num_processes",
            f"more processes than the {batch_size:g} rows of a batch",
            f"use {batch_size:g} or less, or a larger hyperparameters.batch_size",
        )
    if options.micro_batch_size and batch_size % options.micro_batch_size:
        yield _unsupported(
            "options.micro_batch_size",
            f"does not divide batch_size ({batch_size:g})",
            f"use a divisor of {batch_size:g}",
        )


def _unsupported(field: str, message: str, fix: str) -> Issue:
    return Issue(code="unsupported_field", message=message, field=field, fix=fix)


def resolved_values(config: TrainingConfig) -> dict[str, float]:
    """Return every hyperparameter, with defaults for those not set."""
    given = config.hyperparameters
    tiny = config.base_model == TINY_MODEL
    # DPO at the learning rate of SFT makes the model forget what it knows.
    slowly = 0.1 if config.method == "dpo" else 1.0
    defaults: dict[str, float] = {
        "learning_rate": slowly * (2e-3 if tiny else 1e-4),
        "weight_decay": 0.1,
        "warmup_fraction": 0.05,
        "batch_size": 16 if tiny else 8,
        "seq_len": 1024 if tiny else 2048,
        "seed": 0,
    }
    if given.training_steps is None:
        defaults["epochs"] = _DEFAULT_EPOCHS
    else:
        defaults["training_steps"] = given.training_steps
    return {
        name: value if (own := getattr(given, name)) is None else own
        for name, value in defaults.items()
    }


def defaults_taken(config: TrainingConfig) -> dict[str, float]:
    """Return the hyperparameters for which defaults are used."""
    given = config.hyperparameters
    return {
        name: value
        for name, value in resolved_values(config).items()
        if getattr(given, name) is None
    }


def resolved_model(name: str) -> str:
    """Return a model's name as stored in a spec."""
    directory = Path(name).expanduser()
    # The process runs in another directory, where a relative path would not resolve.
    return str(directory.absolute()) if name != TINY_MODEL and directory.is_dir() else name


def _resolved_tuning(config: TrainingConfig) -> Tuning:
    return config.tuning or Tuning(kind="full" if config.base_model == TINY_MODEL else "lora")


def build_spec(
    run_id: str, config: TrainingConfig, slots_dir: Path | None, *, source: RunSpec | None = None
) -> RunSpec:
    """Build the spec of a valid configuration, with every default resolved.

    Args:
        source: The spec of the run to be resumed, which has the text of the chat template.

    Raises:
        ConfigError: The chat template cannot be read, or has changed.
    """
    template = config.chat_template
    if template is None or (source and source.chat_template == template):
        text = source and source.chat_template_text
    else:
        text = template.read()
    options = LocalOptions.model_validate(config.options)
    values = {
        "run_id": run_id,
        "model": resolved_model(config.base_model),
        "method": config.method,
        "classifier_targets": config.classifier_targets,
        "chat_template": template,
        "chat_template_text": text,
        "result_checkpoint": config.result.checkpoint,
        "tuning": _resolved_tuning(config),
        "train": config.data.train,
        "validation": config.data.validation,
        "integrations": config.integrations,
        "slots_dir": slots_dir,
        "slots": options.max_runs,
        "fim_ratio": config.hyperparameters.fim_ratio or None,
        "early_stopping_patience": config.hyperparameters.early_stopping_patience,
        **resolved_values(config),
        **options.model_dump(exclude={"max_runs"}),
    }
    return RunSpec.model_validate(values)


def config_of(spec: RunSpec) -> TrainingConfig | None:
    """Reconstruct a configuration with the same spec; None if there is none.

    What the spec does not include, such as tags and budget, is lost.
    """
    settled = spec.model_dump(exclude_none=True)
    values = {
        "model": spec.model,
        "method": spec.method,
        "classifier_targets": spec.classifier_targets,
        "tuning": spec.tuning,
        "chat_template": spec.chat_template,
        "result": {"checkpoint": spec.result_checkpoint},
        "data": {"train": spec.train, "validation": spec.validation},
        "integrations": spec.integrations,
        "hyperparameters": {
            name: settled[name] for name in Hyperparameters.model_fields if name in settled
        },
    }
    given = {name: settled[name] for name in LocalOptions.model_fields if name in settled}
    try:
        options = LocalOptions.model_validate({**given, "max_runs": spec.slots})
        chosen = options.model_dump(exclude_defaults=True)
        return TrainingConfig.model_validate({**values, "options": chosen})
    except ValidationError:
        return None  # not written by this backend
