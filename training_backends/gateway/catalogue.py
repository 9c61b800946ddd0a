"""The model catalogue: names that the gateway offers and the models that the backend trains.

The built-in names are those that the hosted service fine-tuned, mapped to the open weights
they referred to at the time (the provider's model overview of 2024-10; ids as published on the
Hugging Face Hub). Names without published weights and the vision model are not offered. A TOML
file adds or replaces names:

    [models.my-model]
    target = "my-org/my-model"      # the model that the backend trains
    job_types = ["completion"]      # default; add "classifier" for a text model
    context_length = 32768          # default
    licence = "Apache-2.0"          # shown to clients
    tuning = "qlora"                # as in a training configuration; default: the backend's
    options.num_processes = 4       # backend options, as in a training configuration
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from training_backends.core.config import Tuning, option_issues
from training_backends.core.errors import ConfigError, Issue, validation_issues
from training_backends.protocols.mistral.status import JobType

__all__ = ["BUILT_IN", "Catalogue", "Offer"]

_ANY: frozenset[JobType] = frozenset({"completion", "classifier"})
"""Any dense text model; a classifier is the same model with classification heads."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One model in the catalogue.

    Attributes:
        name: Model name that clients use.
        target: Model that the backend trains.
        job_types: Supported job types.
        context_length: Context window in tokens.
        licence: Short name of the license of the weights.
        tuning: PEFT method or full fine-tuning; None: the backend's default.
        options: Backend options for this model.
    """

    name: str
    target: str
    job_types: frozenset[JobType] = frozenset({"completion"})
    context_length: int = 32768
    licence: str = ""
    tuning: Tuning | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


BUILT_IN = (
    Offer(
        name="tiny-mistral",
        target="tiny-mistral",
        job_types=_ANY,
        context_length=2048,
        licence="randomly initialized, no weights to license",
    ),
    Offer(
        name="open-mistral-7b",
        target="mistralai/Mistral-7B-v0.3",
        job_types=_ANY,
        licence="Apache-2.0",
    ),
    Offer(
        name="open-mistral-nemo",
        target="mistralai/Mistral-Nemo-Base-2407",
        job_types=_ANY,
        context_length=131072,
        licence="Apache-2.0",
    ),
    Offer(
        name="ministral-8b-latest",
        target="mistralai/Ministral-8B-Instruct-2410",
        job_types=_ANY,
        context_length=131072,
        licence="Mistral Research License",
    ),
    Offer(
        name="mistral-small-latest",
        target="mistralai/Mistral-Small-Instruct-2409",
        job_types=_ANY,
        licence="Mistral Research License",
    ),
    Offer(
        name="mistral-large-latest",
        target="mistralai/Mistral-Large-Instruct-2407",
        job_types=_ANY,
        context_length=131072,
        licence="Mistral Research License",
    ),
    Offer(
        name="codestral-latest",
        target="mistralai/Codestral-22B-v0.1",
        job_types=_ANY,
        licence="Mistral Non-Production License",
    ),
)


class _Entry(BaseModel, extra="forbid", strict=True):
    target: str = Field(min_length=1)
    job_types: list[JobType] = Field(default=["completion"], min_length=1)
    context_length: int = Field(default=32768, ge=1)
    licence: str = ""
    tuning: Tuning | None = Field(default=None, strict=False)
    options: dict[str, Any] = Field(default_factory=dict)


class Catalogue:
    """All offered models by name.

    Args:
        path: Catalogue file, used in error messages.
    """

    def __init__(self, offers: Mapping[str, Offer], path: Path | None = None) -> None:
        self._offers = dict(offers)
        self._path = path

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Load the built-in models and those of a TOML file.

        Raises:
            ConfigError: The file cannot be read or an entry is invalid; the issues give file
                and key.
        """
        offers = {offer.name: offer for offer in BUILT_IN}
        if path is not None:
            offers.update(_read(path))
        return cls(offers, path)

    def check_options(self, model: type[BaseModel]) -> None:
        """Validate the options of all models against the backend's options.

        Args:
            model: `options_model` of the training backend.

        Raises:
            ConfigError: Some options are invalid; the issues give file and key.
        """
        issues = [
            replace(issue, path=str(self._path), field=f"models.{offer.name}.{issue.field}")
            for offer in self.all()
            if offer.options
            for issue in option_issues(model, offer.options)
        ]
        if self._path and issues:
            raise _error(self._path, issues)

    def get(self, name: str) -> Offer | None:
        """Return the model with this name, or None."""
        return self._offers.get(name)

    def extended(self, offer: Offer) -> Self:
        """Return a catalogue that also has this model."""
        return type(self)({**self._offers, offer.name: offer}, self._path)

    def names(self, job_type: str) -> list[str]:
        """Return the names of the models that support a job type."""
        return [offer.name for offer in self.all() if job_type in offer.job_types]

    def all(self) -> list[Offer]:
        """Return all models, built-in ones first."""
        return list(self._offers.values())


def _read(path: Path) -> dict[str, Offer]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(path, [_issue(path, None, f"cannot be read: {error.strerror}")]) from error
    except ValueError as error:
        raise _error(path, [_issue(path, None, f"is not TOML: {error}")]) from error
    tables = document.pop("models", {})
    issues = [_issue(path, key, "unknown key; expected [models.<name>] tables") for key in document]
    if not isinstance(tables, dict):
        raise _error(path, [_issue(path, "models", "expected [models.<name>] tables")])
    offers: dict[str, Offer] = {}
    for name, table in tables.items():
        found = _offer(path, name, table)
        if isinstance(found, Offer):
            offers[name] = found
        else:
            issues.extend(found)
    if issues:
        raise _error(path, issues)
    return offers


def _offer(path: Path, name: str, table: Any) -> Offer | list[Issue]:
    if not _NAME.fullmatch(name):
        wanted = "use at most 100 letters, digits, dots, dashes and underscores"
        return [_issue(path, f"models.{name}", wanted)]
    try:
        entry = _Entry.model_validate(table)
    except ValidationError as error:
        issues = validation_issues(error, ["models", name])
        return [replace(issue, code="catalogue", path=str(path)) for issue in issues]
    return Offer(
        name=name,
        target=entry.target,
        job_types=frozenset(entry.job_types),
        context_length=entry.context_length,
        licence=entry.licence,
        tuning=entry.tuning,
        options=entry.options,
    )


def _issue(path: Path, key: str | None, message: str) -> Issue:
    return Issue(code="catalogue", message=message, path=str(path), field=key)


def _error(path: Path, issues: list[Issue]) -> ConfigError:
    return ConfigError(
        f"Invalid model catalogue {path}.",
        issues=issues,
        hint="Fix the file, or unset TRAINING_BACKENDS_GATEWAY__CATALOGUE.",
    )
