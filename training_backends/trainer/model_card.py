"""Write the model card of a result: base model, data, metrics, configuration and license."""

import json
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

from yaml import YAMLError

from training_backends.core.config import TINY_MODEL
from training_backends.rundir.directory import (
    ADAPTER_CONFIG,
    MetricsRow,
    ResultRecord,
    RunDir,
    RunSpec,
)

__all__ = ["DataFacts", "Licence", "read_licence", "write_card"]

_METHODS: Final = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization",
    "classifier": "classifier training",
}
_TUNINGS: Final = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA (LoRA on a 4-bit base model)",
}
_LIBRARIES: Final = ("torch", "transformers", "peft", "accelerate")
_VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""
_LEFT_OUT: Final = {"slots_dir", "slots", "priority", "train", "validation", "run_id", "version"}
"""Spec fields that describe the machine, or that another section of the card shows."""


class DataFacts(NamedTuple):
    """A data file as the run read it."""

    name: str
    role: str
    rows: int
    size: int
    sha256: str


class Licence(NamedTuple):
    """A model's license, with the fields of a Hub model card."""

    name: str
    title: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        name = self.title or self.name
        return f"[{name}]({self.link})" if self.link and "://" in self.link else name


def read_licence(model: str) -> Licence | None:
    """Return the license from a model's card or config; None if neither names one."""
    return _from_card(_file(model, "README.md")) or _from_config(_file(model, "config.json"))


def _file(model: str, name: str) -> Path | None:
    """Return the local path of a model's file; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # slow import

    if model == TINY_MODEL:
        return None
    if (local := Path(model).expanduser()).is_dir():
        return local / name
    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None


def _from_card(path: Path | None) -> Licence | None:
    from huggingface_hub import ModelCard  # noqa: PLC0415

    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    try:
        text = path.read_text(encoding="utf-8") if path else ""
        data = ModelCard(text).data
    except (OSError, ValueError, YAMLError):
        return None
    keys = ("license", "license_name", "license_link")
    name, title, link = (getattr(data, key, None) for key in keys)
    names = [str(each) for each in name] if isinstance(name, list) else [str(name or "")]
    if not any(names):
        return None
    return Licence(", ".join(names), title and str(title), link and str(link))


def _from_config(path: Path | None) -> Licence | None:
    try:
        name = json.loads(path.read_bytes()).get("license") if path else None
    except (OSError, ValueError, AttributeError):
        return None
    return Licence(name) if isinstance(name, str) and name else None


def write_card(
    directory: Path, *, run: RunDir, spec: RunSpec, record: ResultRecord, data: Sequence[DataFacts]
) -> None:
    """Write README.md next to a finished model; it contains no local paths."""
    continues = spec.model != record.base_model  # an adapter
    spec = spec.model_copy(update={"model": record.base_model})
    licence = read_licence(spec.model)
    parts = [
        _head(spec, record, licence),
        f"# {run.path.name}\n",
        _origin(spec, record, continues=continues),
        _data(data) if data else "",
        _results(run, record),
        _configuration(spec),
        _use(directory, spec, record),
        _licence(spec, licence),
    ]
    (directory / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _base_name(spec: RunSpec) -> str:
    local = Path(spec.model).expanduser()
    return local.name if local.is_dir() else spec.model


def _is_on_hub(spec: RunSpec) -> bool:
    return spec.model != TINY_MODEL and not Path(spec.model).expanduser().is_dir()


def _head(spec: RunSpec, record: ResultRecord, licence: Licence | None) -> str:
    from huggingface_hub import ModelCardData  # noqa: PLC0415

    classifies = spec.method == "classifier"
    data = ModelCardData(
        base_model=spec.model if _is_on_hub(spec) else None,
        library_name="peft" if record.format == "adapter" else "transformers",
        license=licence.name if licence else None,
        license_name=licence.title if licence else None,
        license_link=licence.link if licence and "://" in (licence.link or "") else None,
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["training-backends", spec.method, spec.tuning.kind],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _origin(spec: RunSpec, record: ResultRecord, *, continues: bool) -> str:
    kind = "An adapter for" if record.format == "adapter" else "Fine-tuned from"
    package, libraries = (
        _version("training-backends"),
        ", ".join(filter(None, map(_version, _LIBRARIES))),
    )
    return (
        f"{kind} `{_base_name(spec)}`: {_METHODS[spec.method]}, {_TUNINGS[spec.tuning.kind]}"
        f"{', continuing an adapter' if continues else ''}.\n\n"
        f"{package or 'training-backends'} with {libraries}.\n"
    )


def _version(library: str) -> str | None:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return None


def _data(data: Sequence[DataFacts]) -> str:
    rows = [
        f"| {_cell(each.name)} | {each.role} | {each.rows:,} | {each.size:,} | `{each.sha256}` |"
        for each in data
    ]
    head = [
        "## Data\n",
        "| file | role | rows used | bytes | SHA-256 |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _results(run: RunDir, record: ResultRecord) -> str:
    first, last = _first(run), run.read_newest_metrics()
    if first is None or not last:
        return ""
    begin, end = first.measures(), last[-1].measures()
    shown = [name for name in end if name not in {"epoch", "tokens", "learning_rate"}]
    lines = [
        "## Metrics\n",
        f"{last[-1].step:,} steps, {end['tokens']:,.0f} tokens, {end['epoch']:.3g} epochs.\n",
        f"| | step {first.step:,} | step {last[-1].step:,} |",
        "| --- | --- | --- |",
        *(f"| {_cell(name)} | {_number(begin.get(name))} | {end[name]:.6g} |" for name in shown),
        "",
    ]
    checkpoints = [event for event, _ in run.read_events() if event.name == "checkpoint"]
    measured = {event.step: event.data.get("metrics") or {} for event in checkpoints}
    validated = {
        step: each for step, each in measured.items() if each.get("valid_loss") is not None
    }
    if validated:
        best = min(validated, key=lambda step: validated[step]["valid_loss"])
        lines.append(
            f"Lowest validation loss: {validated[best]['valid_loss']:.6g} at step {best}.\n"
        )
    if record.step is not None:
        lines.append(f"The weights are those of step {record.step:,}.\n")
    return "\n".join(lines)


def _first(run: RunDir) -> MetricsRow | None:
    return next((row for row, _ in run.read_metrics()), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _configuration(spec: RunSpec) -> str:
    shown = spec.model_dump(mode="json", exclude=_LEFT_OUT, exclude_none=True)
    shown["model"] = _base_name(spec)
    shown["train"] = [{"file": each.local_path.name, "weight": each.weight} for each in spec.train]
    shown["validation"] = [each.local_path.name for each in spec.validation]
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return f"## Configuration\n\n```json\n{text}\n```\n"


def _use(directory: Path, spec: RunSpec, record: ResultRecord) -> str:
    """Show how to serve the model with vLLM."""
    if spec.method == "classifier":
        return ""
    options, served, note = "", "DIR", "DIR is this directory."
    if record.format == "adapter":
        served = _base_name(spec)
        own = _rank(directory, spec)
        rank = next((rank for rank in _VLLM_RANKS if rank >= own), own)
        options = f" --enable-lora --max-lora-rank {rank} --lora-modules tuned=DIR"
        note += f" vLLM also needs the base model `{served}`."
    if _has_mistral_tokenizer(directory):
        options += " --tokenizer-mode mistral"
    return f"## Use\n\n{note}\n\n```sh\nvllm serve {served}{options}\n```\n"


def _rank(directory: Path, spec: RunSpec) -> int:
    """Return the adapter's rank, which is not the spec's if the run continued an adapter."""
    try:
        return int(json.loads((directory / ADAPTER_CONFIG).read_bytes())["r"])
    except (OSError, ValueError, KeyError):
        return spec.tuning.rank


def _has_mistral_tokenizer(directory: Path) -> bool:
    return (directory / "tekken.json").is_file() or any(directory.glob("tokenizer.model.v*"))


def _licence(spec: RunSpec, licence: Licence | None) -> str:
    if licence:
        what = f"The base model `{_base_name(spec)}` is licensed under: {licence}. "
        what += "Its terms may also apply to models derived from it."
    elif spec.model == TINY_MODEL:
        what = "The base model has random weights and no license."
    else:
        what = f"The files of `{_base_name(spec)}` do not name a license."
    return f"## License\n\n{what} The training data may have its own terms.\n"
