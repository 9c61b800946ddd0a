"""The configuration of a training run, the same for every backend."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from training_backends.core.errors import ConfigError, Issue, suggest, validation_issues
from training_backends.core.estimate import Budget, Duration
from training_backends.core.integrations import Integration, WandbIntegration

__all__ = [
    "TINY_MODEL",
    "TINY_POSITIONS",
    "ChatTemplate",
    "ClassifierTarget",
    "ConfigPath",
    "Data",
    "DataSource",
    "Hyperparameters",
    "Resources",
    "Result",
    "TrainingConfig",
    "Tuning",
    "absolute_options",
    "given_options",
    "option_issues",
]


_URI: Final = r"^[a-z][a-z0-9+.-]*://"
_FORMER_REMOTE: Final = "remote:"
"""Prefix of a provider's file id in the paths of earlier versions."""
TINY_MODEL: Final = "tiny-mistral"
"""Name of the demo model, which is created locally without network access."""
TINY_POSITIONS: Final = 32768
"""Context length of `TINY_MODEL`, in tokens."""
_MOST_TEMPLATE: Final = 1_000_000
"""Bytes; the longest templates of published models have 20,000."""
_NOT_A_NUMBER: Final = "expected a number, not true or false (in YAML also yes, no, on and off)"


_NUMBERS: Final = frozenset({int, float, int | None, float | None})


def _is_number(annotation: Any) -> bool:
    """Return whether a field of this type takes a single number."""
    return annotation in _NUMBERS


class _Model(BaseModel, frozen=True, extra="forbid"):
    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers; pydantic would read them as 1 and 0."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and _is_number(field.annotation):
            raise ValueError(_NOT_A_NUMBER)
        return value


class DataSource(_Model):
    """Where data comes from, and its sampling weight; may be written as just a path or URI."""

    path: Path | None = Field(default=None, description="A file on this machine.")
    uri: str | None = Field(
        default=None,
        pattern=_URI,
        description="An object elsewhere, for example `s3://bucket/train.jsonl`.",
    )
    remote_id: str | None = Field(
        default=None, min_length=1, description="Id of a file that the provider already has."
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Digest that the object at `uri` must have; recorded with each run.",
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="Sampling weight relative to the other files."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and re.match(_URI, value):
            return {"uri": value}
        if isinstance(value, str | Path):
            return {"path": value}
        path = value.get("path") if isinstance(value, dict) else None
        if info.mode == "json" and isinstance(path, str) and path.startswith(_FORMER_REMOTE):
            # Stored JSON of earlier versions, which had paths only.
            rest = {name: each for name, each in value.items() if name != "path"}
            return {**rest, "remote_id": path.removeprefix(_FORMER_REMOTE)}
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(each is not None for each in (self.path, self.uri, self.remote_id)) != 1:
            raise ValueError("give exactly one of path, uri and remote_id")
        if self.sha256 is not None and self.uri is None:
            raise ValueError("sha256 is the digest of an object at a uri")
        return self

    @property
    def kind(self) -> Literal["file", "uri", "remote"]:
        """The kind of place, as in `Capabilities.data`."""
        if self.path is not None:
            return "file"
        return "remote" if self.uri is None else "uri"

    @property
    def local_path(self) -> Path:
        """The path of data on this machine.

        Raises:
            ValueError: The data is elsewhere.
        """
        if self.path is None:
            raise ValueError(f"{self} is not a file on this machine")
        return self.path

    def __str__(self) -> str:
        return str(self.path or self.uri or self.remote_id)


class Data(_Model):
    """Training and validation data; paths are relative to the configuration file."""

    train: tuple[DataSource, ...] = ()
    validation: tuple[DataSource, ...] = ()

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path | dict) else value


class Tuning(_Model):
    """Full fine-tuning or a PEFT method; may be written as just the kind."""

    kind: Literal["full", "lora", "qlora"] = Field(
        description="All weights, a LoRA adapter, or an adapter of a base model in 4 bits."
    )
    rank: int = Field(default=16, ge=1, le=2**16, description="Rank of the adapter.")
    alpha: float | None = Field(default=None, gt=0, le=1e6, description="Default: twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of the adapter.")
    target_modules: tuple[str, ...] | None = Field(
        default=None, description="Names of the adapted layers; None: the backend's choice."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class ChatTemplate(_Model):
    """A Jinja template that renders conversations; may be written as just its path."""

    path: Path = Field(description="A file, instead of the model's own template.")
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Digest that the file must have; recorded with each run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    def read(self) -> str:
        """Return the text of the template. Blocking.

        Raises:
            ConfigError: The file cannot be read, is empty, or does not have the digest.
        """
        return self._read()[0]

    def pinned(self) -> Self:
        """Return the template with the digest of its file. Blocking.

        Raises:
            ConfigError: See `read`.
        """
        return self.model_copy(update={"sha256": self._read()[1]})

    def _read(self) -> tuple[str, str]:
        try:
            if self.path.exists() and not self.path.is_file():
                # Reading devices and pipes may block or never end.
                raise self._error("not_a_file", "not a regular file", "pass a Jinja template")
            with self.path.open("rb") as file:
                content = file.read(_MOST_TEMPLATE + 1)
            text = content.decode()
        except OSError as error:
            raise self._error("unreadable_file", str(error.strerror), "check the path") from error
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not UTF-8"
            raise self._error("not_utf8", message, "save the file as UTF-8") from error
        if len(content) > _MOST_TEMPLATE:
            message = f"the file is larger than {_MOST_TEMPLATE:,} bytes"
            raise self._error("too_large", message, "pass a Jinja template")
        if not text.strip():
            raise self._error("empty_file", "the file is empty", "pass a Jinja template")
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in {None, found}:
            message = f"the file has changed: its SHA-256 is {found}, not {self.sha256}"
            raise self._error("changed_file", message, "restore the file, or launch a new run")
        return text, found

    def _error(self, code: str, message: str, fix: str) -> ConfigError:
        issue = Issue(code=code, message=f"{self.path}: {message}", field="chat_template", fix=fix)
        return ConfigError("The chat template cannot be used.", issues=[issue])


_DESTINATION: Final = re.compile(r"^(s3|gs|az)://[^/\s?#]+(/[^\s?#]*)?$")


class Result(_Model):
    """What a run returns."""

    checkpoint: Literal["last", "best"] = Field(
        default="last",
        description="The trained model: the last state, or the checkpoint with the lowest "
        "validation loss.",
    )
    destination: str | None = Field(
        default=None,
        json_schema_extra={"pattern": _DESTINATION.pattern},
        description="Object store to which the trained model is copied when the run has completed, "
        "below a directory with the run's id: s3://bucket/prefix.",
    )

    @field_validator("destination")
    @classmethod
    def _is_object_store(cls, value: str | None) -> str | None:
        if value is not None and not _DESTINATION.fullmatch(value):
            raise ValueError("use a URL such as s3://bucket/prefix, gs://… or az://…")
        return value


class Resources(_Model):
    """What a run needs; None leaves the choice to the backend."""

    workers: int | None = Field(default=None, ge=1, description="Number of processes.")
    cpus: float | None = Field(default=None, gt=0, description="CPU cores of each worker.")
    gpus: int | None = Field(default=None, ge=0, description="GPUs of each worker.")
    accelerator: str | None = Field(
        default=None, min_length=1, description="The provider's name of the machine or GPU type."
    )
    nodes: int | None = Field(default=None, ge=1, description="Number of machines.")
    max_duration: Duration | None = Field(
        default=None, description="When the provider ends the run, for example '2h'."
    )


class Hyperparameters(_Model):
    """Hyperparameters; None leaves the value to the backend, which reports its choice."""

    learning_rate: float | None = Field(
        default=None, ge=1e-8, le=1, description="Peak learning rate, after a linear warm-up."
    )
    epochs: float | None = Field(
        default=None, gt=0, le=10_000, description="Passes over the training data."
    )
    training_steps: int | None = Field(
        default=None, ge=1, le=2**31, description="Optimizer steps, instead of `epochs`."
    )
    batch_size: int | None = Field(default=None, ge=1, le=2**16, description="Rows per step.")
    seq_len: int | None = Field(
        default=None, ge=100, le=2**24, description="Maximum tokens per row."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, le=1, description="Weight decay of the optimizer."
    )
    warmup_fraction: float | None = Field(
        default=None, ge=0, le=1, description="Share of the steps with a rising learning rate."
    )
    fim_ratio: float | None = Field(
        default=None, ge=0, le=1, description="Share of texts trained as fill-in-the-middle."
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Validations without a lower validation loss after which training stops.",
    )
    seed: int | None = Field(default=None, ge=0, description="Seed of all random choices.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.training_steps is not None:
            raise ValueError("give epochs or training_steps, not both")
        return self


class ClassifierTarget(_Model):
    """One target of a classifier."""

    name: str = Field(max_length=256, description="Key of the target in a row's `labels`.")
    labels: tuple[Annotated[str, Field(max_length=256)], ...] = Field(
        min_length=1, description="The labels to choose from."
    )
    weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of the target's loss.")
    loss_function: Literal["single_class", "multi_class"] | None = Field(
        default=None, description="One label per row, or any number; None: the backend's default."
    )


class TrainingConfig(_Model):
    """The configuration of a run. Immutable; `model_json_schema()` returns its JSON schema."""

    model: str | None = Field(
        default=None, min_length=1, description="Name of the base model, if the backend needs one."
    )
    method: str = Field(
        default="sft", min_length=1, description="`sft`, `dpo`, `classifier`, or the backend's own."
    )
    tuning: Tuning | None = Field(default=None, description="None: the backend's default.")
    data: Data = Data()
    chat_template: ChatTemplate | None = Field(
        default=None, description="None: the model's own template."
    )
    hyperparameters: Hyperparameters = Hyperparameters()
    result: Result = Result()
    suffix: str | None = Field(
        default=None, min_length=1, description="Part of the trained model's name."
    )
    classifier_targets: tuple[ClassifierTarget, ...] = ()
    resources: Resources = Resources()
    integrations: tuple[Integration, ...] = Field(
        default=(),
        description="Where the run is reported while it trains; see [Trackers](trackers.md).",
    )
    budget: Budget = Budget()
    tags: dict[str, str] = Field(
        default_factory=dict, description="Your own names and values, to find runs by."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Backend-specific options, checked by the backend."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_labels(cls, value: Any, info: ValidationInfo) -> Any:
        """Read stored JSON of earlier versions, in which the tags are named `labels`."""
        if info.mode == "json" and isinstance(value, dict) and "labels" in value:
            value = dict(value)
            value.setdefault("tags", value.pop("labels"))
        return value

    @model_validator(mode="after")
    def _targets_go_with_classifiers(self) -> Self:
        if self.classifier_targets and self.method != "classifier":
            raise ValueError("classifier_targets need method: classifier")
        return self

    @property
    def base_model(self) -> str:
        """The model, for backends that need one; the client has checked that it is set.

        Raises:
            ConfigError: It is not set.
        """
        if self.model is None:
            raise ConfigError("The configuration has no model.", hint="Set `model`.")
        return self.model

    @property
    def wandb(self) -> tuple[WandbIntegration, ...]:
        """The integrations with Weights & Biases, the only ones that hosted providers have."""
        return tuple(each for each in self.integrations if isinstance(each, WandbIntegration))

    def resolved(self, base: Path) -> Self:
        """Return the configuration with paths made absolute, relative to `base`."""

        def placed(path: Path) -> dict[str, Path]:
            return {"path": (base / path.expanduser()).absolute()}

        def absolute(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
            return tuple(
                source if source.path is None else source.model_copy(update=placed(source.path))
                for source in sources
            )

        data = self.data.model_copy(
            update={
                "train": absolute(self.data.train),
                "validation": absolute(self.data.validation),
            }
        )
        template = self.chat_template
        if template is not None:
            template = template.model_copy(update=placed(template.path))
        reported = tuple(each.resolved(base) for each in self.integrations)
        update = {"data": data, "chat_template": template, "integrations": reported}
        return self.model_copy(update=update)


class _RelativeToConfig:
    """Marks a path of `ConfigPath`."""


ConfigPath = Annotated[Path, _RelativeToConfig]
"""A path in a backend's options that is relative to the configuration file, as data paths are."""


def absolute_options(
    model: type[BaseModel], options: Mapping[str, Any], base: Path
) -> dict[str, Any]:
    """Return the options with each `ConfigPath`, or list of them, made absolute.

    Args:
        base: Directory that the paths are relative to.

    Raises:
        RuntimeError: A path begins with `~user`, and there is no such user.
    """

    def absolute(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [absolute(each) for each in value]
        if isinstance(value, str | Path):
            return str((base / Path(value).expanduser()).absolute())
        return value  # reported by the model

    paths = {name for name, field in model.model_fields.items() if _has_config_path(field)}
    return {name: absolute(value) if name in paths else value for name, value in options.items()}


def _has_config_path(field: FieldInfo) -> bool:
    inner = (getattr(each, "__metadata__", ()) for each in get_args(field.annotation))
    return _RelativeToConfig in (*field.metadata, *chain.from_iterable(inner))


def given_options(model: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop known options without a value; keep unknown ones, so that they are rejected."""
    return {
        name: value
        for name, value in options.items()
        if value is not None or name not in model.model_fields
    }


def option_issues(model: type[BaseModel], options: Mapping[str, Any]) -> Iterator[Issue]:
    """Yield an issue for each option that is unknown or invalid.

    Args:
        model: Schema of the options, see `TrainingBackend.options_model`.
    """
    for name, field in model.model_fields.items():
        if isinstance(options.get(name), bool) and _is_number(field.annotation):
            yield Issue(code="bool_type", message=_NOT_A_NUMBER, field=f"options.{name}")
    try:
        model.model_validate(options)
    except ValidationError as error:
        known = list(model.model_fields)
        otherwise = f"known options: {', '.join(known) or 'none'}"
        for issue in validation_issues(error, ["options"], unknown="unknown option"):
            name = (issue.field or "").removeprefix("options.")
            is_option = issue.code == "unknown_field" and "." not in name
            yield replace(issue, fix=suggest(name, known, otherwise)) if is_option else issue
