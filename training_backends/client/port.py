"""Convert a configuration to another backend, and report what changes."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import yaml
from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.config_file import ConfigLike, to_config
from training_backends.client.run_record import unfit_fields
from training_backends.core.backend import TrainingBackend
from training_backends.core.capabilities import SuffixRule
from training_backends.core.config import TrainingConfig, option_issues
from training_backends.core.errors import ConfigError, Issue, TrainingBackendError
from training_backends.core.escape import plural
from training_backends.core.plugins import installed_backends
from training_backends.datasets.convert import Converted, convert
from training_backends.datasets.write import name_of, refuse_existing

__all__ = ["Change", "Ported", "backends_for", "port", "to_yaml"]

_NEAREST_TUNING: Final[Mapping[str, str]] = MappingProxyType({"qlora": "lora"})
"""The kind that trains the same weights, for a backend without the first."""
_SAME_OPTIONS: Final[Sequence[frozenset[str]]] = (frozenset({"beta", "dpo_beta"}),)
"""Names of one option at several backends."""
_MULTIPLIER: Final = "learning_rate_multiplier"


class Change(NamedTuple):
    """What became of a field.

    Attributes:
        field: Dotted path in the original configuration, for example `hyperparameters.epochs`.
        message: What it became, or why it has no equivalent.
    """

    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ported:
    """A configuration converted to another backend.

    Attributes:
        backend: The target backend.
        config: The converted configuration; `model` is None where it must be chosen.
        former_model: The original model, if `model` must be chosen.
        mapped: Fields with the same meaning at the target.
        approximated: Fields that were converted, or whose meaning may differ.
        lost: Fields without an equivalent.
        files: The converted data files.
        issues: What must be corrected before a launch.
    """

    backend: str
    config: TrainingConfig
    former_model: str | None = None
    mapped: tuple[str, ...] = ()
    approximated: tuple[Change, ...] = ()
    lost: tuple[Change, ...] = ()
    files: tuple[Path, ...] = ()
    issues: tuple[Issue, ...] = ()


async def port(
    client: AsyncTrainingClient,
    config: ConfigLike,
    *,
    to: str,
    source: str | None = None,
    model: str | None = None,
    directory: Path,
) -> Ported:
    """Convert a configuration to another backend; nothing is uploaded or started.

    Data files whose rows the target does not take are converted to new files.

    Args:
        to: The target backend.
        source: The backend that the configuration was written for, if known.
        model: The target's model; None: it must be chosen, unless the backend stays the same.
        directory: Where converted data files are written.

    Raises:
        ConfigError: The target does not support the method, or a converted data file already
            exists.
        DatasetError: A data file to be converted cannot be read.
    """
    target = await to_thread.run_sync(client.backend, to)
    origin = await _source(client, source)
    given = await to_thread.run_sync(
        to_config, config, None if origin is None else origin.options_model
    )
    length = await _length(client, given, origin) if _needs_length(given, target) else None
    draft = _port_fields(given, target, origin, model=model, length=length)
    if any(issue.field == "method" for issue in draft.issues()):
        raise ConfigError(
            f"{to} cannot run this configuration.", issues=draft.issues("method"), backend=to
        )
    if target.capabilities.inspects:
        await _port_data(client, draft, directory)
    return draft.ported()


async def backends_for(
    client: AsyncTrainingClient, config: TrainingConfig, *, source: str
) -> list[str]:
    """Return the other installed backends that can run the configuration once it is ported.

    Judged by their capabilities alone; the model has to be chosen in any case.
    """
    origin = await _source(client, source)
    found = []
    for name in sorted(installed_backends()):
        try:
            target = await to_thread.run_sync(client.backend, name)
        except TrainingBackendError:
            continue
        draft = _port_fields(config, target, origin, model=None, length=None)
        # `port` joins files.
        obstacles = [
            issue
            for issue in draft.issues()
            if issue.field != "model" and issue.code != "too_many_files"
        ]
        if name != source and not obstacles:
            found.append(name)
    return found


def to_yaml(ported: Ported, directory: Path | None = None) -> str:
    """Return a configuration file; a model to be chosen is a comment.

    Args:
        directory: The file's directory: paths in it are written relative to it.
    """
    values = _values(ported.config)
    if cost := values.get("budget", {}).get("max_cost"):
        values["budget"]["max_cost"] = f"{cost['amount']} {cost['currency']}"
    for name, sources in values.get("data", {}).items():
        short = [_short(source, directory) for source in sources]
        values["data"][name] = short[0] if len(short) == 1 else short
    if template := values.get("chat_template"):
        values["chat_template"] = _short(template, directory)
    head = _dumped({"backend": ported.backend})
    if ported.former_model is not None:
        # As JSON, so that the name stays on its line.
        former = json.dumps(ported.former_model, ensure_ascii=False)
        head += f"# model: {former}  # choose the model of {ported.backend}\n"
    return head + (_dumped(values) if values else "")


def _short(source: dict[str, Any], directory: Path | None) -> Any:
    if "path" in source and directory is not None:
        path = Path(source["path"])
        if path.is_relative_to(directory):
            source = {**source, "path": str(path.relative_to(directory))}
    only = next(iter(source)) if len(source) == 1 else None
    return source[only] if only in {"path", "uri"} else source


def _dumped(values: Any) -> str:
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


async def _source(client: AsyncTrainingClient, name: str | None) -> TrainingBackend | None:
    """Return the original backend, or None if it is unknown or not installed any more."""
    if name is None:
        return None
    try:
        return await to_thread.run_sync(client.backend, name)
    except TrainingBackendError:
        return None


# -- the length of a run -----------------------------------------------------------------------


class _Length(NamedTuple):
    """The length of a run in both units, as far as known, and how it was found."""

    steps: int | None
    epochs: float | None
    basis: str


def _takes(target: TrainingBackend, name: str) -> bool:
    known = target.capabilities.hyperparameters
    return known is None or name in known


def _needs_length(config: TrainingConfig, target: TrainingBackend) -> bool:
    hyper = config.hyperparameters
    return (hyper.epochs is not None and not _takes(target, "epochs")) or (
        hyper.training_steps is not None and not _takes(target, "training_steps")
    )


async def _length(
    client: AsyncTrainingClient, config: TrainingConfig, source: TrainingBackend | None
) -> _Length | None:
    """Return the length of a run by the rows of its data, else by its backend's estimate."""
    hyper = config.hyperparameters
    dataset = await client.inspect(config)
    rows = sum(file.rows for file in dataset.train)
    if hyper.batch_size and rows and len(dataset.train) == len(config.data.train):
        basis = f"{plural(rows, 'row')}, {hyper.batch_size} per step"
        if hyper.training_steps is not None:
            return _Length(None, hyper.training_steps * hyper.batch_size / rows, basis)
        if hyper.epochs is not None:
            return _Length(math.ceil(hyper.epochs * rows / hyper.batch_size), None, basis)
    if source is None:
        return None
    try:
        found = await client.estimate(config, backend=source.name)
    except TrainingBackendError:
        return None
    return _Length(found.steps, found.epochs, f"the estimate of {source.name}")


# -- the fields --------------------------------------------------------------------------------


def _values(config: TrainingConfig) -> dict[str, Any]:
    """Return the fields that were set to something other than their default."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return values


@dataclass(slots=True)
class _Draft:
    """A configuration that is being converted: `values` shrinks and changes field by field."""

    target: TrainingBackend
    values: dict[str, Any]
    former_model: str | None = None
    mapped: list[str] = field(default_factory=list)
    approximated: list[Change] = field(default_factory=list)
    lost: list[Change] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    more_issues: list[Issue] = field(default_factory=list)

    @property
    def config(self) -> TrainingConfig:
        return TrainingConfig.model_validate_json(json.dumps(self.values))

    def keep(self, name: str) -> None:
        self.mapped.append(name)

    def change(self, name: str, message: str) -> None:
        self.approximated.append(Change(name, message))

    def lose(self, name: str, message: str | None = None) -> None:
        self.lost.append(Change(name, message or f"{self.target.name} does not support it"))

    def issues(self, *fields: str) -> list[Issue]:
        found = [*unfit_fields(self.target, self.config), *self.more_issues]
        return [issue for issue in found if not fields or issue.field in fields]

    def ported(self) -> Ported:
        return Ported(
            backend=self.target.name,
            config=self.config,
            former_model=self.former_model,
            mapped=tuple(self.mapped),
            approximated=tuple(self.approximated),
            lost=tuple(self.lost),
            files=tuple(self.files),
            issues=tuple(self.issues()),
        )


def _port_fields(
    config: TrainingConfig,
    target: TrainingBackend,
    source: TrainingBackend | None,
    *,
    model: str | None,
    length: _Length | None,
) -> _Draft:
    """Convert everything but the content of the data files."""
    draft = _Draft(target, _values(config))
    same = source is not None and source.name == target.name
    _port_model(draft, model, same=same)
    for name in ("method", "classifier_targets", "budget", "tags"):
        if name in draft.values:
            draft.keep(name)
    _port_tuning(draft)
    _port_hyperparameters(draft, length)
    _port_sources(draft, source, same=same)
    _port_template(draft)
    _port_result(draft, config)
    _port_suffix(draft, target.capabilities.suffix)
    _port_resources(draft, same=same)
    _port_integrations(draft, config)
    _port_options(draft, config, source)
    return draft


def _port_model(draft: _Draft, model: str | None, *, same: bool) -> None:
    former = draft.values.get("model")
    if model is not None:
        draft.values["model"] = model
        if former not in {None, model}:
            draft.change("model", f"{model} instead of {former}, as chosen")
    elif former is not None and (same or not draft.target.capabilities.needs_model):
        draft.keep("model")
    elif former is not None:
        draft.former_model = draft.values.pop("model")
        draft.lose("model", f"{draft.target.name} has its own model names: choose one in `model`")


def _port_tuning(draft: _Draft) -> None:
    tuning, kinds = draft.values.get("tuning"), draft.target.capabilities.tunings
    if tuning is None:
        return
    kind = tuning["kind"]
    if kind in kinds:
        draft.keep("tuning")
    elif (nearest := _NEAREST_TUNING.get(kind)) in kinds:
        tuning["kind"] = nearest
        draft.change("tuning.kind", f"{kind} became {nearest}")
    else:
        del draft.values["tuning"]
        draft.lose("tuning")


def _port_hyperparameters(draft: _Draft, length: _Length | None) -> None:
    hyper = draft.values.get("hyperparameters", {})
    for name in [*hyper]:
        place = f"hyperparameters.{name}"
        if _takes(draft.target, name):
            draft.keep(place)
            continue
        value = hyper.pop(name)
        if name == "training_steps" and _takes(draft.target, "epochs"):
            _port_steps(draft, hyper, value, length)
        elif name == "epochs" and _takes(draft.target, "training_steps"):
            _port_epochs(draft, hyper, value, length)
        elif name == "learning_rate" and _MULTIPLIER in draft.target.options_model.model_fields:
            draft.lose(
                place,
                f"{draft.target.name} takes options.{_MULTIPLIER}, relative to its own rate, "
                "which is unknown; not set",
            )
        else:
            draft.lose(place)
    if not hyper:
        draft.values.pop("hyperparameters", None)


def _port_steps(draft: _Draft, hyper: dict[str, Any], steps: int, length: _Length | None) -> None:
    place = "hyperparameters.training_steps"
    if length is None or not length.epochs:
        unknown = "the rows and the batch size are not both known"
        draft.lose(place, f"{draft.target.name} takes epochs instead, and {unknown}: set them")
        return
    # A whole number, which every backend accepts.
    epochs = max(1, round(length.epochs))
    hyper["epochs"] = epochs
    exact = "" if epochs == length.epochs else f", rounded from {_apart(length.epochs, epochs)}"
    became = f"{plural(steps, 'step')} became {plural(epochs, 'epoch')}{exact}"
    draft.change(place, f"{became} ({length.basis})")


def _apart(value: float, rounded: int) -> str:
    """Return a number with as few digits, at least 3, as tell it from the rounded one."""
    texts = (f"{value:.{digits}g}" for digits in range(3, 17))
    return next((text for text in texts if float(text) != rounded), repr(value))


def _port_epochs(
    draft: _Draft, hyper: dict[str, Any], epochs: float, length: _Length | None
) -> None:
    place = "hyperparameters.epochs"
    if length is None or not length.steps:
        unknown = "the rows and the batch size are not both known"
        draft.lose(
            place, f"{draft.target.name} takes training_steps instead, and {unknown}: set them"
        )
        return
    hyper["training_steps"] = length.steps
    became = f"{epochs:g} epochs became {plural(length.steps, 'step')}"
    draft.change(place, f"{became} ({length.basis})")


def _port_sources(draft: _Draft, source: TrainingBackend | None, *, same: bool) -> None:
    """Remove the data and weights that the target cannot use."""
    capabilities = draft.target.capabilities
    data = draft.values.get("data", {})
    if data.get("validation") and not capabilities.validation_files:
        del data["validation"]
        draft.lose("data.validation")
    for part, sources in data.items():
        data[part] = [
            each
            for index, each in enumerate(sources)
            if _is_usable(draft, f"data.{part}.{index}", each, source, same=same)
        ]
        for index, each in enumerate(sources):
            unweighted = not (capabilities.weights and part == "train")
            if unweighted and "weight" in each and each in data[part]:
                del each["weight"]
                draft.lose(f"data.{part}.{index}.weight")
    for part in [part for part, sources in data.items() if not sources]:
        del data[part]
    if not data:
        draft.values.pop("data", None)


def _is_usable(
    draft: _Draft,
    place: str,
    each: Mapping[str, Any],
    source: TrainingBackend | None,
    *,
    same: bool,
) -> bool:
    """Report whether the target can read a data source, and return it."""
    kind = next(kind for name, kind in _KINDS.items() if name in each)
    taken = draft.target.capabilities.data
    if kind not in taken and not (kind == "uri" and "file" in taken):
        draft.lose(place, f"{draft.target.name} does not take this kind of data")
    elif kind == "remote" and not same:
        owner = source.name if source else "the original provider"
        draft.lose(place, f"only {owner} has the file {each['remote_id']}")
    else:
        draft.keep(place)
        return True
    return False


_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {"path": "file", "uri": "uri", "remote_id": "remote"}
)
"""The kind of a data source, as in `Capabilities.data`, by the field that is set."""


def _port_template(draft: _Draft) -> None:
    if "chat_template" not in draft.values:
        return
    if draft.target.capabilities.chat_template:
        draft.keep("chat_template")
    else:
        del draft.values["chat_template"]
        draft.lose("chat_template", f"{draft.target.name} only has the model's own template")


def _port_result(draft: _Draft, config: TrainingConfig) -> None:
    if "result" not in draft.values:
        return
    if config.result.checkpoint in draft.target.capabilities.result_checkpoints:
        draft.keep("result.checkpoint")
    else:
        del draft.values["result"]
        draft.lose("result.checkpoint")


def _port_suffix(draft: _Draft, rule: SuffixRule | None) -> None:
    suffix = draft.values.get("suffix")
    if suffix is None:
        return
    if rule is None:
        del draft.values["suffix"]
        draft.lose("suffix")
        return
    alphabet = suffix if rule.alphabet is None else rule.alphabet
    other = "-" if "-" in alphabet else ""
    fit = "".join(char if char in alphabet else other for char in suffix)[: rule.max_length]
    if fit == suffix:
        draft.keep("suffix")
    elif fit:
        draft.values["suffix"] = fit
        draft.change("suffix", f"{suffix!r} became {fit!r}")
    else:
        del draft.values["suffix"]
        draft.lose("suffix", f"{draft.target.name} accepts none of its characters")


def _port_resources(draft: _Draft, *, same: bool) -> None:
    resources = draft.values.get("resources", {})
    for name in [*resources]:
        if name not in draft.target.capabilities.resources:
            del resources[name]
            draft.lose(f"resources.{name}")
        elif name == "accelerator" and not same:
            former = resources.pop(name)
            draft.lose(f"resources.{name}", f"{former} is another provider's name: choose one")
        else:
            draft.keep(f"resources.{name}")
    if not resources:
        draft.values.pop("resources", None)


def _port_integrations(draft: _Draft, config: TrainingConfig) -> None:
    kept = []
    for index, entry in enumerate(config.integrations):
        place = f"integrations.{index}"
        if entry.type not in draft.target.capabilities.integrations:
            draft.lose(place, f"{draft.target.name} does not report to {entry.type}")
            continue
        values = draft.values["integrations"][index]
        for name in {*values} - {"type", *draft.target.capabilities.integration_fields}:
            del values[name]
            draft.lose(f"{place}.{name}")
        kept.append(values)
        draft.keep(place)
    if kept:
        draft.values["integrations"] = kept
    else:
        draft.values.pop("integrations", None)


def _port_options(draft: _Draft, config: TrainingConfig, source: TrainingBackend | None) -> None:
    options = draft.values.pop("options", {})
    target = draft.target
    kept: dict[str, Any] = {}
    if source is not None and source.options_model is target.options_model:
        kept = options
        for name in options:
            draft.keep(f"options.{name}")
        options = {}
    tolerated = source.tolerated_bad_rows(config) if source is not None and options else 0.0
    for name, value in options.items():
        place = f"options.{name}"
        tolerating = target.options_tolerating(tolerated) if tolerated else {}
        if source is not None and tolerating and name in source.options_tolerating(tolerated):
            found = tolerating
        else:
            found = dict.fromkeys(_names_at(target, name), value)
        if found and not [*option_issues(target.options_model, {**kept, **found})]:
            kept |= found
            words = ", ".join(f"options.{other}" for other in found)
            became = "kept" if name in found else f"became {words}"
            draft.change(place, f"{became}; check that it means the same")
        else:
            draft.lose(place, f"{target.name} has no such option")
    if kept:
        draft.values["options"] = kept


def _names_at(target: TrainingBackend, name: str) -> Iterator[str]:
    """Yield the target's name of an option, if it has it."""
    names = next((names for names in _SAME_OPTIONS if name in names), frozenset({name}))
    known = target.options_model.model_fields
    yield from [name] if name in known else sorted(names & known.keys())[:1]


# -- the data ----------------------------------------------------------------------------------


async def _port_data(client: AsyncTrainingClient, draft: _Draft, directory: Path) -> None:
    """Convert the files whose rows the target does not take, and join what it takes as one."""
    config, capabilities = draft.config, draft.target.capabilities
    dataset = await client.inspect(config, backend=draft.target.name)
    bad = {file.path for file in dataset.files if file.bad_rows}
    read = {file.path for file in dataset.files}
    limit = capabilities.max_train_files
    jobs: list[tuple[str, list[int]]] = []
    for part in ("train", "validation"):
        sources: Sequence[Any] = getattr(config.data, part)
        local = [n for n, each in enumerate(sources) if each.path in read]
        if part == "train" and limit is not None and len(sources) > limit:
            if len(local) == len(sources) and limit == 1:
                jobs.append((part, local))
            continue
        jobs += [(part, [n]) for n in local if sources[n].path in bad]
    outputs: list[Path] = []
    for part, numbers in jobs:
        first = name_of(getattr(config.data, part)[numbers[0]].local_path)
        joined = ".joined" if len(numbers) > 1 else ""
        output = directory / f"{first}{joined}.{draft.target.name}.jsonl"
        if output in outputs:  # files of one name in different directories
            output = output.with_name(f"{first}.{part}-{numbers[0]}.{draft.target.name}.jsonl")
        outputs.append(output)
    refuse_existing(*outputs, hint="Move it away, or write to another directory with --output.")
    for (part, numbers), output in zip(jobs, outputs, strict=True):
        paths = [getattr(config.data, part)[n].path for n in numbers]
        found = await to_thread.run_sync(
            partial(
                convert,
                paths,
                output,
                provider_format=capabilities.provider_format,
                targets=config.classifier_targets,
            )
        )
        _note_file(draft, part, numbers, found)


def _note_file(draft: _Draft, part: str, numbers: Sequence[int], found: Converted) -> None:
    """Report a conversion and use the new file, if there is one."""
    place = f"data.{part}" if len(numbers) > 1 else f"data.{part}.{numbers[0]}"
    target = draft.target.name
    if found.invalid:
        formats = ", ".join(draft.target.capabilities.provider_format.formats)
        message = (
            f"{plural(found.invalid, 'row')} cannot be converted for {target}, which takes "
            f"{formats}: {found.first_error}"
        )
        draft.lose(place, message)
        fix = "correct the rows; `training-backends data inspect` lists them"
        draft.more_issues.append(
            Issue(code="unconverted_rows", message=message, field=place, fix=fix)
        )
    if found.path is None:
        return
    draft.files.append(found.path)
    converted = {f"data.{part}.{number}" for number in numbers}
    draft.mapped = [name for name in draft.mapped if name not in converted]
    sources = draft.values["data"][part]
    new = {"path": str(found.path.absolute())}
    if len(numbers) > 1:
        if any("weight" in source for source in sources):
            draft.lose(f"{place}.weight")
        draft.values["data"][part] = [new]
        what = f"{len(numbers)} files joined"
    else:
        sources[numbers[0]] |= new
        what = "converted"
    draft.change(place, f"{what} to {found.path.name}" + "".join(f"; {n}" for n in found.notes))
