"""From a configuration to the spec of a training process, and what speaks against it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError

from training_backends.backends.local.settings import LocalOptions
from training_backends.core.config import (
    TINY_MODEL,
    TINY_POSITIONS,
    Hyperparameters,
    TrainingConfig,
    Tuning,
)
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.rundir.directory import RunSpec

__all__ = [
    "MODELS_OFFERED",
    "build_spec",
    "config_of",
    "defaults_taken",
    "find_issues",
    "has_gpu",
    "settled_model",
    "settled_values",
]

MODELS_OFFERED: Final = (
    f"{TINY_MODEL} (built in, no network), a model directory, or ORGANISATION/NAME on the hub"
)
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DEFAULT_EPOCHS: Final = 3.0
_ROWS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"sft": ("instruct", "pretrain"), "dpo": ("preference",), "classifier": ("classifier",)}
)
_METHODS: Final = {row: method for method, rows in _ROWS.items() for row in rows}
_SEEDS: Final = 2**32
# Where the driver shows itself: natively, under WSL, and AMD's, which torch calls cuda too.
_GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def find_issues(config: TrainingConfig, dataset: Dataset) -> Iterator[Issue]:
    """Yield everything in a configuration that this backend cannot honour."""
    yield from _model_issues(config)
    yield from _method_issues(config)
    yield from _hyperparameter_issues(config)
    yield from _option_issues(config)
    if config.integrations:
        yield _unsupported(
            "integrations", "nothing is reported to other services from here", "leave it out"
        )
    if config.suffix:
        yield Issue(
            code="unused_field",
            message="the result is a directory of its own, so the suffix is not used",
            field="suffix",
            severity="warning",
        )
    yield from _label_issues(config, dataset)
    for file in dataset.files:
        if file.sample_type and file.sample_type not in _ROWS[config.method]:
            wanted = " or ".join(_ROWS[config.method])
            yield Issue(
                code="unsupported_sample_type",
                message=f"the rows are {file.sample_type}; method {config.method} takes {wanted}",
                path=str(file.path),
                fix=f"use other rows, or method: {_METHODS[file.sample_type]}",
            )


def _model_issues(config: TrainingConfig) -> Iterator[Issue]:
    if not _is_model(config.model):
        near = get_close_matches(config.model, [TINY_MODEL], n=1, cutoff=0.8)
        yield Issue(
            code="unknown_model",
            message=f"there is no model {config.model!r} here",
            field="model",
            fix=f"did you mean {TINY_MODEL!r}?" if near else f"offered: {MODELS_OFFERED}",
        )
    kind = config.tuning.kind if config.tuning else None
    if kind in {"lora", "qlora"} and config.model == TINY_MODEL:
        yield _unsupported(
            "tuning.kind",
            f"{TINY_MODEL} starts from random weights, which an adapter cannot make up for",
            "use full, or leave tuning out",
        )
    elif kind == "qlora" and find_spec("bitsandbytes") is None:
        yield _unsupported(
            "tuning.kind",
            "qlora needs the package bitsandbytes",
            "use lora or full, or pip install 'training-backends[qlora]'",
        )


def has_gpu() -> bool:
    """Tell whether this machine shows a GPU, by its driver's device files."""
    return any(map(Path.exists, _GPU_DEVICES))


def _method_issues(config: TrainingConfig) -> Iterator[Issue]:
    given = config.hyperparameters
    if given.fim_ratio and (config.method != "sft" or config.model == TINY_MODEL):
        reason = f"method {config.method}" if config.method != "sft" else TINY_MODEL
        yield _unsupported(
            "hyperparameters.fim_ratio",
            f"{reason} cannot learn to fill in the middle of texts",
            "leave it out",
        )
    if config.method != "classifier":
        return
    if not config.classifier_targets:
        yield _unsupported(
            "classifier_targets", "a classifier needs them", "name each target and its labels"
        )
    names = Counter(target.name for target in config.classifier_targets)
    for index, target in enumerate(config.classifier_targets):
        field = f"classifier_targets[{index}]"
        if names[target.name] > 1:
            yield _unsupported(f"{field}.name", "two targets have this name", "rename one")
        if len({*target.labels}) == 1:
            yield _unsupported(
                f"{field}.labels",
                f"with one label, {target.labels[0]!r}, there is nothing to decide or to learn",
                "name at least two labels",
            )
        elif len({*target.labels}) < len(target.labels):
            yield _unsupported(f"{field}.labels", "a label stands there twice", "leave one out")
    if config.classifier_targets and not any(t.weight for t in config.classifier_targets):
        yield _unsupported(
            "classifier_targets", "every target has weight 0", "give one of them a weight"
        )


def _label_issues(config: TrainingConfig, dataset: Dataset) -> Iterator[Issue]:
    """Warn of targets for which all training rows give the same label."""
    for index, target in enumerate(config.classifier_targets):
        found = {
            each for file in dataset.train for each in file.summary.labels.get(target.name, ())
        }
        if len(found) == 1 and len(target.labels) > 1:
            yield Issue(
                code="one_label",
                message=f"every training row has the same label for it, {found.pop()!r}: "
                "there is nothing to learn",
                field=f"classifier_targets[{index}].labels",
                fix="add rows with the other labels",
                severity="warning",
            )


def _is_model(name: str) -> bool:
    if name == TINY_MODEL:
        return True
    directory = Path(name).expanduser()
    if directory.is_dir():
        return (directory / "config.json").is_file()
    return bool(_HUB_NAME.fullmatch(name))


def _hyperparameter_issues(config: TrainingConfig) -> Iterator[Issue]:
    given = config.hyperparameters
    if given.seed is not None and given.seed >= _SEEDS:
        yield _unsupported("hyperparameters.seed", "the seed is too large", "use less than 2^32")
    if config.model == TINY_MODEL and given.seq_len and given.seq_len > TINY_POSITIONS:
        yield _unsupported(
            "hyperparameters.seq_len",
            f"{TINY_MODEL} reads at most {TINY_POSITIONS} tokens",
            f"use {TINY_POSITIONS} or less",
        )


def _option_issues(config: TrainingConfig) -> Iterator[Issue]:
    options = LocalOptions.model_validate(config.options)
    kind = _settled_tuning(config).kind
    if options.packing and config.method != "sft":
        yield _unsupported(
            "options.packing", f"method {config.method} has nothing to pack", "leave it out"
        )
    unused = {"result": kind == "full"}
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
            message="a GPU is asked for and this machine shows none",
            field="options.device",
            fix="use auto or cpu",
            severity="warning",
        )
    batch_size = settled_values(config)["batch_size"]
    if options.num_processes > 1 and (options.device == "cpu" or not has_gpu()):
        yield Issue(
            code="no_gpu",
            message="without GPUs the processes share the processors, which gains nothing",
            field="options.num_processes",
            fix="leave it out",
            severity="warning",
        )
    if options.num_processes > batch_size:
        yield _unsupported(
            "options.num_processes",
            f"a batch of {batch_size:g} rows is not enough for so many",
            f"use {batch_size:g} or less, or a larger hyperparameters.batch_size",
        )
    if options.micro_batch_size and batch_size % options.micro_batch_size:
        yield _unsupported(
            "options.micro_batch_size",
            f"it does not divide the batch of {batch_size:g} rows",
            f"use a divisor of {batch_size:g}",
        )


def _unsupported(field: str, message: str, fix: str) -> Issue:
    return Issue(code="unsupported_field", message=message, field=field, fix=fix)


def settled_values(config: TrainingConfig) -> dict[str, float]:
    """Return every hyperparameter, ours where the configuration leaves it open."""
    given = config.hyperparameters
    tiny = config.model == TINY_MODEL
    # Preferences unlearn what the model knows if they are learnt as fast as answers are.
    slowly = 0.1 if config.method == "dpo" else 1.0
    ours: dict[str, float] = {
        "learning_rate": slowly * (2e-3 if tiny else 1e-4),
        "weight_decay": 0.1,
        "warmup_fraction": 0.05,
        "batch_size": 16 if tiny else 8,
        "seq_len": 1024 if tiny else 2048,
        "seed": 0,
    }
    if given.training_steps is None:
        ours["epochs"] = _DEFAULT_EPOCHS
    else:
        ours["training_steps"] = given.training_steps
    return {
        name: value if (own := getattr(given, name)) is None else own
        for name, value in ours.items()
    }


def defaults_taken(config: TrainingConfig) -> dict[str, float]:
    """Return the hyperparameters that the configuration leaves to this backend."""
    given = config.hyperparameters
    return {
        name: value
        for name, value in settled_values(config).items()
        if getattr(given, name) is None
    }


def settled_model(name: str) -> str:
    """Return the name of a model as a spec has it."""
    directory = Path(name).expanduser()
    # The process runs elsewhere, so a relative path would mean something else there.
    return str(directory.absolute()) if name != TINY_MODEL and directory.is_dir() else name


def _settled_tuning(config: TrainingConfig) -> Tuning:
    return config.tuning or Tuning(kind="full" if config.model == TINY_MODEL else "lora")


def build_spec(run_id: str, config: TrainingConfig, slots_dir: Path) -> RunSpec:
    """Make the spec of a valid configuration, with every default settled."""
    options = LocalOptions.model_validate(config.options)
    values = {
        "run_id": run_id,
        "model": settled_model(config.model),
        "method": config.method,
        "classifier_targets": config.classifier_targets,
        "tuning": _settled_tuning(config),
        "train": config.data.train,
        "validation": config.data.validation,
        "slots_dir": slots_dir,
        "slots": options.max_runs,
        "fim_ratio": config.hyperparameters.fim_ratio or None,
        **settled_values(config),
        **options.model_dump(exclude={"max_runs"}),
    }
    return RunSpec.model_validate(values)


def config_of(spec: RunSpec) -> TrainingConfig | None:
    """Make a configuration that gives the same spec again; None if none does.

    What the training process is not told, such as labels and the budget, is lost.
    """
    settled = spec.model_dump(exclude_none=True)
    values = {
        "model": spec.model,
        "method": spec.method,
        "classifier_targets": spec.classifier_targets,
        "tuning": spec.tuning,
        "data": {"train": spec.train, "validation": spec.validation},
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
        return None  # written by something else than this backend
