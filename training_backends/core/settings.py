"""Settings from the environment, `.env` and `config.toml`, in this order of precedence.

Each part of the package owns one section: a subclass of `SectionSettings` with its name.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import platformdirs
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from training_backends.core.errors import ConfigError, Issue

__all__ = ["SectionSettings", "Settings", "config_file", "load_settings"]

_APP = "training-backends"
_PREFIX = "TRAINING_BACKENDS_"


def config_file() -> Path:
    """Return where the settings file lies, whether or not it is there."""
    return Path(platformdirs.user_config_dir(_APP)) / "config.toml"


class _SectionSource(TomlConfigSettingsSource):
    """One table of the settings file, or its top level."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path, section: str | None) -> None:
        self._section = section
        super().__init__(settings_cls, path)

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        if self._section is None:
            table = {key: value for key, value in values.items() if not isinstance(value, dict)}
        else:
            table = values.get(self._section, {})
            if not isinstance(table, dict):
                raise ValueError(f"{self._section!r} is a section: write [{self._section}]")
        known = self.settings_cls.model_fields
        for key in table:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"there is no setting {key!r} ({fix})")
        return table


class SectionSettings(BaseSettings):
    """The settings of one part: `TRAINING_BACKENDS_<SECTION>__<FIELD>` and `[section]`."""

    section: ClassVar[str | None] = None

    model_config = SettingsConfigDict(
        env_file=".env",
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
        """Put the settings file behind the environment and `.env`."""
        del file_secret_settings
        toml = _SectionSource(settings_cls, config_file(), cls.section)
        return (init_settings, env_settings, dotenv_settings, toml)


class Settings(SectionSettings):
    """What concerns the whole package."""

    home: Path = Path(platformdirs.user_data_dir(_APP))
    """Directory for all state."""
    store_url: str | None = None
    """SQLAlchemy URL of the run store; None: SQLite in `home`."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


_S = TypeVar("_S", bound=SectionSettings)


def load_settings(kind: type[_S]) -> _S:
    """Read one section.

    Raises:
        ConfigError: A value does not fit; the issues name each variable.
    """
    try:
        return kind()
    except ValidationError as error:
        issues = [
            Issue(
                code=detail["type"],
                message=detail["msg"].removeprefix("Value error, "),
                field=_variable(kind, detail["loc"]),
                fix="correct it in the environment, .env or config.toml",
            )
            for detail in error.errors(include_input=False, include_url=False)
        ]
        raise ConfigError("The settings cannot be used.", issues=issues) from None
    except (ValueError, OSError) as error:
        source = ".env" if isinstance(error, UnicodeDecodeError) else str(config_file())
        raise ConfigError(f"The settings in {source} cannot be used: {error}") from None


def _variable(kind: type[SectionSettings], location: tuple[int | str, ...]) -> str:
    name = str(kind.model_config["env_prefix"]) + "__".join(str(part).upper() for part in location)
    return name if name in os.environ else name.removeprefix(_PREFIX).lower().replace("__", ".")
