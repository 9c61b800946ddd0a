"""Settings come from the environment and the settings file, in this order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import PositiveFloat

from training_backends import ConfigError
from training_backends.backends.local.settings import LocalSettings
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core import settings
from training_backends.core.settings import SectionSettings, Settings, load_settings
from training_backends.gateway.settings import GatewaySettings


class PartSettings(SectionSettings):
    """The settings of a made-up part."""

    section: ClassVar[str | None] = "part"

    patience: PositiveFloat = 30.0
    where: str = "default"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a directory in which a test may write a `.env`."""
    monkeypatch.chdir(tmp_path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to read everything, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def write_file(text: str) -> None:
    path = settings.config_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file counts only where no variable is set."""
    assert load_settings(PartSettings).where == "default"
    write_file('[part]\nwhere = "file"\npatience = 1\n')
    assert load_settings(PartSettings).where == "file"
    monkeypatch.setenv("TRAINING_BACKENDS_PART__WHERE", "environment")
    loaded = load_settings(PartSettings)
    assert (loaded.where, loaded.patience) == ("environment", 1.0)


def test_the_top_of_the_file_is_not_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and the top level do not mix."""
    monkeypatch.delenv("TRAINING_BACKENDS_HOME")
    write_file('home = "/srv/runs"\nlog_format = "json"\n[part]\nwhere = "file"\n')
    top = load_settings(Settings)
    assert (top.home, top.log_format) == (Path("/srv/runs"), "json")
    assert load_settings(PartSettings).where == "file"


def test_the_home_comes_from_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRAINING_BACKENDS_HOME moves all state."""
    monkeypatch.setenv("TRAINING_BACKENDS_HOME", str(tmp_path / "state"))
    assert load_settings(Settings).home == tmp_path / "state"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home must not put all state into the current directory."""
    monkeypatch.setenv("TRAINING_BACKENDS_HOME", "")
    monkeypatch.setenv("TRAINING_BACKENDS_STORE_URL", "")
    loaded = load_settings(Settings)
    assert loaded.home.is_absolute()
    assert loaded.store_url is None


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("TRAINING_BACKENDS_LOG_LEVEL", "loud", "TRAINING_BACKENDS_LOG_LEVEL"),
        ("TRAINING_BACKENDS_LOG_FORMAT", "xml", "TRAINING_BACKENDS_LOG_FORMAT"),
    ],
)
def test_a_wrong_value_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str
) -> None:
    """The user sees which variable to correct."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings(Settings)
    assert [issue.field for issue in caught.value.issues] == [field]


def test_a_wrong_value_of_the_file_names_its_key() -> None:
    """What does not come from a variable is named as the file has it."""
    write_file('[part]\npatience = "long"\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(PartSettings)
    assert [issue.field for issue in caught.value.issues] == ["part.patience"]


@pytest.mark.parametrize("text", ["not toml", "[part\n", 'a = "\x00"'])
def test_a_file_that_is_no_toml_is_named(text: str) -> None:
    """The error names the file."""
    write_file(text)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_settings(Settings)


def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission is a matter of the settings too."""
    write_file("")
    settings.config_file().chmod(0)
    monkeypatch.chdir("/")  # a directory that everybody may look into
    with as_nobody(), pytest.raises(ConfigError, match=r"config\.toml"):
        load_settings(Settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hoem = 'there'", "did you mean 'home'"),
        ("[part]\nwheer = 'a'", "did you mean 'where'"),
        ("part = 5", "write \\[part\\]"),
    ],
)
def test_a_misspelt_setting_of_the_file_is_refused(text: str, said: str) -> None:
    """A setting that is not known does not silently vanish."""
    write_file(text)
    with pytest.raises(ConfigError, match=said):
        load_settings(PartSettings if "part" in text else Settings)


@pytest.mark.parametrize(
    ("variable", "kind", "near"),
    [
        ("TRAINING_BACKENDS_HOEM", Settings, "home"),
        ("TRAINING_BACKENDS_MISTRL__BASE_URL", Settings, "mistral"),
        ("TRAINING_BACKENDS_PART__PATIENSE", PartSettings, "patience"),
    ],
)
def test_a_misspelt_variable_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, kind: type[SectionSettings], near: str
) -> None:
    """It would be a setting that is not obeyed."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError) as caught:
        load_settings(kind)
    (issue,) = caught.value.issues
    assert (issue.field, near in issue.message) == (variable, True)


@pytest.mark.parametrize(
    "name", ["MISTRAL__BASE_URL", "LOCAL__HUB_URL", "GATEWAY__HOST", "GATEWAY__API_KEY", "HOME"]
)
def test_a_dotenv_in_the_working_directory_sets_nothing(name: str) -> None:
    """It comes with a cloned repository, and must not decide where keys are sent."""
    kinds = (Settings, MistralSettings, LocalSettings, GatewaySettings)
    before = [load_settings(kind) for kind in kinds]
    Path(".env").write_text(f"TRAINING_BACKENDS_{name}=https://attacker.example\nNO_SUCH=1\n")
    assert [load_settings(kind) for kind in kinds] == before
    assert settings.ignored_variables() == (f"TRAINING_BACKENDS_{name}",)


def test_the_ignored_names_of_a_dotenv_are_known() -> None:
    """However they are written; a value is never shown."""
    assert settings.ignored_variables() == ()
    Path(".env").write_bytes(
        b"\xff\n  export training_backends_log_level = debug\n"
        b"OTHER='TRAINING_BACKENDS_HOME=/x'\n# TRAINING_BACKENDS_STORE_URL=y\n"
        b"TRAINING_BACKENDS_HOEM=TRAINING_BACKENDS_WATCH__X=1\nTRAINING_BACKENDS_HOEM=2\n"
    )
    names = ("training_backends_log_level", "TRAINING_BACKENDS_HOEM")
    assert settings.ignored_variables() == names
    Path(".env").unlink()
    Path(".env").mkdir()
    assert settings.ignored_variables() == ()


def test_a_misspelt_section_of_the_file_names_the_nearest() -> None:
    """All that stands in it would be lost."""
    write_file("[gatewya]\nport = 1\n")
    with pytest.raises(ConfigError, match="gateway"):
        load_settings(Settings)


def test_variables_of_others_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our own prefix is looked at."""
    monkeypatch.setenv("TRAINING_BACKEND_HOME", "1")
    monkeypatch.setenv("MISTRAL_API_KEY", "1")
    assert load_settings(Settings).log_level == "warning"


def test_each_setting_tells_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the source that counts, with what is secret left out."""
    write_file('store_url = "sqlite:///a.db"\nlog_format = "json"\n')
    monkeypatch.setenv("TRAINING_BACKENDS_STORE_URL", "postgresql://me:hunter22@db/runs")
    found = {entry.name: entry for entry in settings.effective_settings(Settings)}
    assert found["store_url"].origin == "TRAINING_BACKENDS_STORE_URL"
    assert "hunter22" not in found["store_url"].value
    assert found["log_format"][1:] == ("json", str(settings.config_file()))
    assert found["log_level"][1:] == ("warning", "default")
