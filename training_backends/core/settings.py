"""Settings from environment variables, then from the user's `config.toml`.

A `.env` file in the working directory is not read: it may come with a cloned repository, and a
setting such as a base URL decides where the user's keys are sent.

Each part of the package owns a section: a subclass of `SectionSettings` with its name. A backend's
section has the name of the backend, with `_` for `-`. Unknown names are errors that suggest the
closest known name, so that a misspelled setting is not silently ignored.
"""

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import platformdirs
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from training_backends.core.errors import ConfigError, Issue, suggest, validation_issues
from training_backends.core.plugins import installed_backends
from training_backends.core.redaction import redact, register_url

__all__ = [
    "Effective",
    "SectionSettings",
    "Settings",
    "config_file",
    "effective_settings",
    "ignored_variables",
    "load_settings",
]

_APP = "training-backends"
_PARTS = frozenset({"credentials", "gateway", "objects", "watch"})
"""Sections that do not belong to a backend."""
_PREFIX = "TRAINING_BACKENDS_"


def config_file() -> Path:
    """Return the path of the settings file, which may not exist."""
    return Path(platformdirs.user_config_dir(_APP)) / "config.toml"


class _SectionSource(TomlConfigSettingsSource):
    """One table of the settings file, or its top level."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path, section: str | None) -> None:
        self._section = section
        super().__init__(settings_cls, path)

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        if self._section is None:
            for key in values:
                if isinstance(values[key], dict):
                    _require_known(key, _known_sections(key), "section")
            table = {key: value for key, value in values.items() if not isinstance(value, dict)}
        else:
            table = values.get(self._section, {})
            if not isinstance(table, dict):
                raise ValueError(f"{self._section!r} must be a section: write [{self._section}]")
        for key in table:
            _require_known(key, self.settings_cls.model_fields, "setting")
        return table


class _UnknownName(ValueError):
    """An unknown section or setting."""


def _require_known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        fix = suggest(name, known, f"known: {', '.join(sorted(known))}")
        raise _UnknownName(f"unknown {what} {name!r} ({fix})")


def _known_sections(asked: str) -> Collection[str]:
    """Return the known section names; backends are only looked up if `asked` is not ours."""
    loaded = {kind.section for kind in SectionSettings.__subclasses__() if kind.section}
    if asked in _PARTS | loaded:
        return _PARTS | loaded
    return _PARTS | loaded | {name.replace("-", "_") for name in installed_backends()}


class SectionSettings(BaseSettings):
    """A section of the settings: `TRAINING_BACKENDS_<SECTION>__<FIELD>` and `[section]`."""

    section: ClassVar[str | None] = None

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive the environment prefix from the section's name."""
        super().__init_subclass__(**kwargs)
        suffix = f"{cls.section.upper()}__" if cls.section else ""
        cls.model_config["env_prefix"] = _PREFIX + suffix

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the settings file after the environment."""
        del dotenv_settings, file_secret_settings
        toml = _SectionSource(settings_cls, config_file(), cls.section)
        return (init_settings, env_settings, toml)


class Settings(SectionSettings):
    """Settings of the whole package."""

    home: Path = Path(platformdirs.user_data_dir(_APP))
    """Directory for all state."""
    store_url: str | None = None
    """SQLAlchemy URL of the run store; None: SQLite in `home`."""
    log_format: Literal["console", "json"] = "console"
    """Format of log lines."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Lowest level that is logged."""


class Effective(NamedTuple):
    """The effective value of a setting.

    Attributes:
        name: Name in the settings file, with its section.
        value: The value, with secrets redacted.
        origin: The environment variable, the settings file, or `default`.
    """

    name: str
    value: str
    origin: str


_S = TypeVar("_S", bound=SectionSettings)


def load_settings(kind: type[_S]) -> _S:
    """Load a section of the settings.

    Raises:
        ConfigError: A value is invalid or a name unknown; the issues name each variable.
    """
    try:
        _require_known_variables(kind)
        return kind()
    except ValidationError as error:
        fix = "correct it in the environment or in config.toml"
        issues = [
            replace(issue, field=_variable(kind, issue.field or ""), fix=fix)
            for issue in validation_issues(error)
        ]
        raise ConfigError("The settings are invalid.", issues=issues) from None
    except _UnknownVariable as error:
        fix = "correct it in the environment"
        issue = Issue(code="unknown_setting", message=str(error), field=error.variable, fix=fix)
        raise ConfigError("The settings are invalid.", issues=[issue]) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"The settings in {config_file()} are invalid: {error}") from None


def _variable(kind: type[SectionSettings], field: str) -> str:
    name = str(kind.model_config["env_prefix"]) + field.upper().replace(".", "__")
    return name if name in os.environ else name.removeprefix(_PREFIX).lower().replace("__", ".")


class _UnknownVariable(Exception):
    def __init__(self, variable: str, why: str) -> None:
        super().__init__(why)
        self.variable = variable


def _require_known_variables(kind: type[SectionSettings]) -> None:
    """Reject unknown environment variables with our prefix."""
    prefix = str(kind.model_config["env_prefix"])
    for variable in os.environ:
        name = variable.upper().removeprefix(prefix)
        if name == variable.upper():
            continue
        section, nested, _ = name.lower().partition("__")
        try:
            if kind.section is None and nested:
                _require_known(section, _known_sections(section), "section")
            else:
                _require_known(section, kind.model_fields, "setting")
        except _UnknownName as error:
            raise _UnknownVariable(variable, str(error)) from None


def ignored_variables() -> tuple[str, ...]:
    """Return the names of our settings found in a `.env` file of the working directory."""
    try:
        text = Path(_DOTENV).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(dict.fromkeys(_ASSIGNMENT.findall(text)))


_DOTENV = ".env"
_ASSIGNMENT = re.compile(
    rf"^[ \t]*(?:export[ \t]+)?({_PREFIX}\w{{1,60}})[ \t]*=",
    re.MULTILINE | re.IGNORECASE | re.ASCII,
)


def effective_settings(kind: type[SectionSettings]) -> list[Effective]:
    """Return all settings of a section with their effective values and origins.

    Raises:
        ConfigError: See `load_settings`.
    """
    loaded = load_settings(kind)
    prefix = f"{kind.section}." if kind.section else ""
    sources = {
        "environment": EnvSettingsSource(kind)(),
        str(config_file()): _SectionSource(kind, config_file(), kind.section)(),
    }
    found = []
    for name in kind.model_fields:
        origin = next((place for place, values in sources.items() if name in values), "default")
        if origin == "environment":
            origin = f"{kind.model_config['env_prefix']}{name.upper()}"
        value = getattr(loaded, name)
        register_url(str(value))
        found.append(Effective(prefix + name, redact(str(value)), origin))
    return found
