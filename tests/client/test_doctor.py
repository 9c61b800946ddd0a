"""What works, what does not, and what nobody has set up."""

from datetime import timedelta

import pytest

from tests.client.conftest import MakeConfig
from tests.plugins import Install
from training_backends import AsyncTrainingClient, CredentialVault
from training_backends.client import boundary
from training_backends.client.doctor import check_clock, check_extras, diagnose, known_settings
from training_backends.core.run import utc_now
from training_backends.core.settings import SectionSettings

PLUGIN = """
import anyio
from training_backends.testing.backend import ScriptedBackend

class Plugin(ScriptedBackend):
    name = "plugin"
"""
CREATE = """
    @classmethod
    def create(cls, context):
        raise KeyError("region")
"""
ABSTRACT = PLUGIN.replace("ScriptedBackend", "TrainingBackend").replace(
    "testing.backend", "core.backend"
)
CAPABILITIES = """
    @property
    def capabilities(self):
        raise KeyError("region")
"""
HEALTH = """
    async def health(self):
        raise KeyError("region")
"""
NOTHING = """
    async def health(self):
        return None
"""
HANGING = """
    async def health(self):
        await anyio.sleep_forever()
"""

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("seconds", "state"), [(0, "ok"), (29, "ok"), (90, "failed"), (-90, "failed")]
)
async def test_clocks_that_disagree_are_told(seconds: int, state: str) -> None:
    """Whichever of them is ahead."""
    assert check_clock("the server of mistral", timedelta(seconds=seconds)).state == state


async def test_a_missing_extra_says_how_to_install_it() -> None:
    """It need not be there, so nothing has failed."""
    found = {check.name: check for check in check_extras(lambda name: name != "uvicorn")}
    gateway = found["extra gateway"]
    assert (gateway.state, "uvicorn" in gateway.message) == ("unused", True)
    assert "training-backends[gateway]" in str(gateway.hint)
    assert found["extra tokens"].state == "ok"


async def test_what_nobody_has_set_up_has_not_failed(client: AsyncTrainingClient) -> None:
    """No key, no keyring, no run: a fresh machine is sound."""
    checks = await diagnose(client, CredentialVault(home=client.home))
    assert {check.name: check.state for check in checks}["mistral"] == "unused"
    assert all(check.state != "failed" for check in checks)


async def test_a_server_of_ones_own_has_to_work(
    client: AsyncTrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever names one means it, so a missing key is a failure then."""
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", "http://127.0.0.1:9")
    checks = await diagnose(client, CredentialVault(home=client.home))
    (mistral,) = [check for check in checks if check.name == "mistral"]
    assert (mistral.state, "MISTRAL_API_KEY" in str(mistral.hint)) == ("failed", True)


@pytest.mark.parametrize(("hours", "state"), [(2, "failed"), (-24, "ok")])
async def test_a_run_from_the_future_tells_of_the_clock(
    hours: int, state: str, client: AsyncTrainingClient, make_config: MakeConfig
) -> None:
    """This machine's clock was set back since; that a run was last seen long ago is natural."""
    run = await client.launch(make_config(), backend="scripted")
    seen = utc_now() + timedelta(hours=hours)
    client._store.update(run.id, lambda now: now.model_copy(update={"last_seen_at": seen}))
    checks = await diagnose(client, CredentialVault(home=client.home))
    (clock,) = [check for check in checks if check.name == "clock"]
    assert (clock.state, "behind" in clock.message) == (state, state == "failed")


async def test_settings_of_backends_are_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tree: the package's parts and every installed backend."""
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__ATTEMPTS", "7")

    class Extra(SectionSettings):
        section = "extra"
        depth: int = 3

    found = {entry.name: entry for entry in known_settings(Extra)}
    assert found["mistral.attempts"][1:] == ("7", "TRAINING_BACKENDS_MISTRAL__ATTEMPTS")
    assert {"home", "watch.lost_after", "credentials.keyring", "extra.depth"} <= found.keys()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (PLUGIN + CREATE, "'create': KeyError"),
        (ABSTRACT, "'create': TypeError"),
        (PLUGIN + CAPABILITIES, "'capabilities': KeyError"),
        (PLUGIN + HEALTH, "'health': KeyError"),
        (PLUGIN + NOTHING, "'health': TypeError: returned NoneType, not Health"),
        (PLUGIN + HANGING, "did not finish 'health' within"),
    ],
)
async def test_a_broken_plugin_is_one_failed_line(
    source: str,
    reason: str,
    install: Install,
    client: AsyncTrainingClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It names plugin and package; everything else is looked at all the same."""
    monkeypatch.setattr(boundary, "TIME_LIMITS", {"health": 2.0})
    install("acme", "plugin", source)
    checks = await diagnose(client, CredentialVault(home=client.home))
    (failed,) = [check for check in checks if check.state == "failed"]
    assert failed.name == "plugin"
    assert failed.message.startswith("The backend 'plugin' of acme ")
    assert reason in failed.message
    assert {"run store", "local", "mistral", "extra gateway"} <= {check.name for check in checks}


async def test_settings_of_a_broken_plugin_hide_no_others(install: Install) -> None:
    """Its own check says what is wrong with it."""
    install("acme", "plugin", "raise KeyError")
    found = {entry.name for entry in known_settings()}
    assert {"home", "mistral.attempts"} <= found
