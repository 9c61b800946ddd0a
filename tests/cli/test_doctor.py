"""`doctor`: settings with their origin, keys without their values, what works."""

from pathlib import Path
from typing import Any

import pytest

from tests.plugins import Install

pytestmark = pytest.mark.slow

Run = Any


def test_a_fresh_machine_is_sound(run: Run) -> None:
    """Exit code 0, and each setting tells where it comes from."""
    done = run("doctor", "--json", MISTRAL_API_KEY="")
    assert (done.code, done.document["ok"]) == (0, True)
    origins = {entry["name"]: entry["origin"] for entry in done.document["settings"]}
    assert origins["home"] == "TRAINING_BACKENDS_HOME"
    assert origins["gateway.port"] == "default"


def test_settings_with_their_defaults_are_shown_when_asked(run: Run) -> None:
    """What somebody has set is seen at a glance."""
    short, long = run("doctor", MISTRAL_API_KEY=""), run("doctor", "--all", MISTRAL_API_KEY="")
    assert "TRAINING_BACKENDS_HOME" in short.out
    assert "gateway.port" not in short.out
    assert "gateway.port" in long.out


def test_a_misspelt_setting_ends_every_command(run: Run) -> None:
    """Before anything is done with settings that nobody meant."""
    done = run("list", TRAINING_BACKENDS_STORE_ULR="sqlite:///other.db")
    assert done.code == 3
    assert "did you mean 'store_url'?" in done.err


def test_a_server_out_of_reach_has_failed(run: Run) -> None:
    """It is set up, so it has to work; the key is not shown."""
    done = run(
        "doctor",
        MISTRAL_API_KEY="k" * 32,
        TRAINING_BACKENDS_MISTRAL__BASE_URL="http://127.0.0.1:9",
        TRAINING_BACKENDS_MISTRAL__ATTEMPTS="1",
    )
    assert done.code == 1
    assert "failed  mistral" in done.out
    assert "MISTRAL_API_KEY" in done.out
    assert "k" * 32 not in done.out + done.err


def test_a_damaged_store_is_set_aside_when_asked(run: Run, tmp_path: Path) -> None:
    """Not before; and afterwards everything works again."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "runs.db").write_bytes(b"no database" * 500)
    assert run("list").code == 1
    assert run("doctor", MISTRAL_API_KEY="").code == 1
    done = run("doctor", "--recover", "--json", MISTRAL_API_KEY="")
    assert done.code == 0
    assert Path(done.document["recovery"]["damaged"]).exists()
    assert run("list").code == 0


def test_a_plugin_without_verbs_breaks_no_command(run: Run, install: Install) -> None:
    """It cannot be instantiated: one failed line among the others."""
    install("my_package", "mine", "from training_backends import TrainingBackend as Plugin")
    checked = run("doctor", "--json", MISTRAL_API_KEY="")
    states = {check["name"]: check["state"] for check in checked.document["checks"]}
    assert (checked.code, states["mine"], states["mistral"]) == (1, "failed", "unused")
    listed = run("backends", "--json")
    errors = {entry["name"]: entry.get("error") for entry in listed.document}
    assert (listed.code, errors["local"]) == (0, None)
    assert "'mine' of my_package failed in 'create': TypeError" in errors["mine"]
    shown = run("backends")
    assert shown.code == 0
    assert "unavailable" in shown.out


def test_a_broken_plugin_has_an_exit_code_of_its_own(
    run: Run, install: Install, config_file: Path
) -> None:
    """As a backend that cannot be reached; whose bug it is stands in the message."""
    install("acme", "plugin", "from training_backends import TrainingBackend as Plugin")
    done = run("validate", config_file.name, "--backend", "plugin", "--json")
    assert (done.code, done.document["error"]["type"]) == (8, "BackendBroken")
    assert "report it" in done.document["error"]["hint"]


def test_what_a_dotenv_says_is_ignored_and_shown(run: Run, tmp_path: Path) -> None:
    """Each command says so once; `doctor` says from where and what to do instead."""
    names = "TRAINING_BACKENDS_MISTRAL__BASE_URL", "TRAINING_BACKENDS_GATEWAY__HOST"
    (tmp_path / ".env").write_text("".join(f"{name}=attacker.example\n" for name in names))
    done = run("doctor", "--json", MISTRAL_API_KEY="")
    assert done.code == 0
    settings = {entry["name"]: entry["origin"] for entry in done.document["settings"]}
    assert settings["mistral.base_url"] == settings["gateway.host"] == "default"
    (check,) = [check for check in done.document["checks"] if check["name"] == ".env"]
    assert all(name in check["message"] for name in (*names, str(tmp_path / ".env")))
    done = run("keys", "list")
    assert done.err.count(".env files are not read") == 1
    assert all(name in done.err for name in names)
    assert "attacker" not in done.err


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "http://corp:hunter2hunter/x@proxy.example:8080"),
        ("HTTPS_PROXY", "http://127.0.0.1:port"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
    ],
)
def test_a_network_variable_that_cannot_be_used_is_a_failed_line(
    run: Run, variable: str, value: str
) -> None:
    """All else is still shown."""
    done = run("doctor", "--json", MISTRAL_API_KEY="k" * 32, **{variable: value})
    assert done.code == 1
    checks = {check["name"]: check for check in done.document["checks"]}
    assert checks["mistral"]["state"] == "failed"
    assert variable in checks["mistral"]["message"]
    assert checks["run store"]["state"] == "ok"
    assert "hunter2" not in done.out + done.err


def test_a_gateway_s_damaged_store_is_found(run: Run, tmp_path: Path) -> None:
    """With the command that saves what can be read, which works."""
    root = tmp_path / "home" / "gateway"
    root.mkdir(parents=True)
    (root / "runs.db").write_bytes(b"no database" * 500)
    done = run("doctor", MISTRAL_API_KEY="")
    assert (done.code, "failed  gateway" in done.out) == (1, True)
    assert f"TRAINING_BACKENDS_HOME={root} training-backends doctor --recover" in done.out
    run("doctor", "--recover", MISTRAL_API_KEY="", TRAINING_BACKENDS_HOME=str(root))
    assert run("doctor", MISTRAL_API_KEY="").code == 0
