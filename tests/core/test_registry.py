"""Backends are found by entry point, and one that is broken hurts only who asks for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.plugins import Install, install_backend
from training_backends import (
    BackendNotInstalled,
    ConfigError,
    TrainingBackend,
    backend_class,
    installed_backends,
)
from training_backends.core.backend import BackendContext, CredentialSource
from training_backends.core.registry import create_backend
from training_backends.core.settings import Settings, load_settings

GOOD = """
from training_backends.core.backend import TrainingBackend
class Plugin(TrainingBackend):
    name = "plugin"
"""


def test_what_ships_with_the_package_is_registered_like_a_plugin() -> None:
    """No list of backends exists beside the entry points."""
    found = installed_backends()
    assert {"local", "mistral"} <= set(found)
    assert found["local"] == "training-backends"


def test_a_strangers_backend_is_found(install: Install) -> None:
    """A package of somebody else needs nothing but its entry point."""
    install("stranger", "plugin", GOOD)
    assert installed_backends()["plugin"] == "stranger"
    loaded = backend_class("plugin")
    assert issubclass(loaded, TrainingBackend)
    assert loaded.name == "plugin"


def test_a_package_installed_or_removed_later_is_noticed(install: Install) -> None:
    """The entry points that were read are kept only while nothing is installed."""
    site = install("stranger", "plugin", GOOD)
    assert "plugin" in installed_backends()
    install_backend(site, "second", "later", GOOD)
    assert installed_backends()["later"] == "second"
    shutil.rmtree(site / "second-1.0.dist-info")
    assert "later" not in installed_backends()


WITH_SETTINGS = """
from training_backends.core.settings import SectionSettings
from training_backends.testing.backend import ScriptedBackend

class DashSettings(SectionSettings):
    section = "{section}"
    url: str = "default"

class Plugin(ScriptedBackend):
    name = "with-dash"
    settings_model = DashSettings

    @classmethod
    def create(cls, context):
        backend = cls()
        backend.url = context.settings.url
        return backend
"""


class _NoSecrets(CredentialSource):
    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        raise NotImplementedError


CONTEXT = BackendContext(home=Path("unused"), credentials=_NoSecrets())


def test_a_backend_receives_its_settings(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded from its section, whose name a shell variable can have."""
    install("dashed", "with-dash", WITH_SETTINGS.format(section="with_dash"))
    monkeypatch.setenv("TRAINING_BACKENDS_WITH_DASH__URL", "mine")
    load_settings(Settings)  # knows the section
    assert vars(create_backend("with-dash", CONTEXT))["url"] == "mine"
    monkeypatch.setenv("TRAINING_BACKENDS_WITH_DASH__URI", "misspelt")
    with pytest.raises(ConfigError, match="invalid"):
        create_backend("with-dash", CONTEXT)


def test_a_section_with_another_name_than_its_backend_is_a_bug(install: Install) -> None:
    """Nobody would find it."""
    install("dashed_wrong", "with-dash", WITH_SETTINGS.format(section="dash"))
    with pytest.raises(TypeError, match=r"DashSettings\.section must be 'with_dash'"):
        create_backend("with-dash", CONTEXT)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_there_at_all", "not_there_at_all"),
        ("Other = 1", "Plugin"),
        ("raise RuntimeError('half-made')", "half-made"),
        ("class Plugin(:", "invalid syntax"),
        ("class Plugin: pass", "not a TrainingBackend"),
        ("Plugin = 3", "not a TrainingBackend"),
    ],
)
def test_a_broken_backend_is_wrapped(install: Install, source: str, reason: str) -> None:
    """Whatever its import raises becomes one error that names package and reason."""
    install("broken", "plugin", source)
    with pytest.raises(BackendNotInstalled, match=reason) as caught:
        backend_class("plugin")
    assert "broken" in str(caught.value)
    assert caught.value.backend == "plugin"
    sys.modules.pop("broken", None)


def test_a_broken_backend_hurts_nobody_else(install: Install) -> None:
    """It is listed without being loaded, and the others load."""
    install("broken", "plugin", "raise RuntimeError")
    install("stranger", "other", GOOD)
    assert {"plugin", "other"} <= set(installed_backends())
    assert backend_class("other").name == "plugin"


def test_a_name_that_two_packages_claim_is_refused(install: Install) -> None:
    """Neither wins by chance; both are named."""
    install("first", "plugin", GOOD)
    install("second", "plugin", GOOD)
    with pytest.raises(ConfigError, match="first and second"):
        backend_class("plugin")


def test_an_unknown_name_gets_the_nearest(install: Install) -> None:
    """A slip is answered with what was probably meant."""
    install("stranger", "plugin", GOOD)
    with pytest.raises(ConfigError) as caught:
        backend_class("plugni")
    (issue,) = caught.value.issues
    assert issue.field == "backend"
    assert "'plugin'" in (issue.fix or "")
    with pytest.raises(ConfigError) as caught:
        backend_class("xyzzy")
    assert "local" in (caught.value.issues[0].fix or "")


def test_one_backend_is_loaded_without_the_others() -> None:
    """Asking for one does not import another."""
    program = (
        "import sys\n"
        "from training_backends import backend_class\n"
        "backend_class('mistral')\n"
        "assert 'training_backends.backends.local.backend' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
