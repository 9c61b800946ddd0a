"""`doctor`: settings with their origin, keys without their values, what works."""

from pathlib import Path
from typing import Any

Run = Any


def test_a_fresh_machine_is_sound(run: Run) -> None:
    """Exit code 0, and each setting tells where it comes from."""
    done = run("doctor", "--json", MISTRAL_API_KEY="")
    assert (done.code, done.document["ok"]) == (0, True)
    origins = {entry["name"]: entry["origin"] for entry in done.document["settings"]}
    assert origins["home"] == "TRAINING_BACKENDS_HOME"
    assert origins["gateway.port"] == "default"


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
    assert "failed mistral" in done.err
    assert "MISTRAL_API_KEY" in done.err
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


def test_a_gateway_s_damaged_store_is_found(run: Run, tmp_path: Path) -> None:
    """With the command that saves what can be read, which works."""
    root = tmp_path / "home" / "gateway"
    root.mkdir(parents=True)
    (root / "runs.db").write_bytes(b"no database" * 500)
    done = run("doctor", MISTRAL_API_KEY="")
    assert (done.code, "failed gateway" in done.err) == (1, True)
    assert f"TRAINING_BACKENDS_HOME={root} training-backends doctor --recover" in done.err
    run("doctor", "--recover", MISTRAL_API_KEY="", TRAINING_BACKENDS_HOME=str(root))
    assert run("doctor", MISTRAL_API_KEY="").code == 0
