"""The command line: exit codes, one JSON document, and what is said of wrong input."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import needs_torch
from training_backends import __version__

pytestmark = pytest.mark.e2e

Run = Any


def test_version_is_printed(run: Run) -> None:
    """The version is the package's."""
    assert run("--version").out == f"training-backends {__version__}\n"


def test_an_unknown_command_is_a_usage_error(run: Run) -> None:
    """Exit code 2, as everywhere."""
    assert run("lauch").code == 2


def test_backends_are_listed_from_the_registry(run: Run) -> None:
    """The built-in backends are listed with what they can do."""
    found = {entry["name"]: entry for entry in run("backends", "--json").document}
    assert found["local"]["capabilities"]["resumes"] == "checkpoint"
    assert found["mistral"]["capabilities"]["quotes"] is True
    assert ("missing" in found["local"]) is (find_spec("torch") is None)
    _, first, second, *_ = run("backends").out.split("(training-backends)")
    assert "row formats" not in first, "the command backend reads no rows"
    assert "row formats" in second


def test_a_good_configuration_is_ready(run: Run, config_file: Path) -> None:
    """`validate` ends with 0 and says so."""
    done = run("validate", config_file.name)
    assert (done.code, done.err) == (0, "")
    assert "ready to launch" in done.out


def test_validate_gives_one_document(run: Run, config_file: Path) -> None:
    """`--json` puts the files and issues on standard output."""
    document = run("validate", config_file.name, "--json").document
    assert (document["ok"], document["files"][0]["rows"]) == (True, 20)


def test_an_estimate_counts_tokens(run: Run, config_file: Path) -> None:
    """The tokens are those of the data, not a guess a sample."""
    document = run("estimate", config_file.name, "--json").document
    assert (document["basis"], document["steps"]) == ("exact", 4)
    assert 600 < document["data_tokens"] < 1200


def test_a_missing_file_is_invalid(run: Run) -> None:
    """Exit code 3, and the path is repeated."""
    done = run("launch", "none.yaml")
    assert done.code == 3
    assert "none.yaml: no such file" in done.err


def test_an_unknown_key_names_line_and_nearest(run: Run, config_file: Path) -> None:
    """A misspelt hyperparameter does not vanish."""
    config_file.write_text(config_file.read_text().replace("training_steps", "n_epochs"))
    done = run("validate", config_file.name)
    assert done.code == 3
    assert (
        "run.yaml:6: hyperparameters.n_epochs: unknown field (did you mean 'epochs'?)" in done.err
    )


def test_an_error_is_one_json_document_too(run: Run, config_file: Path) -> None:
    """A script reads the reason where it reads the result."""
    error = run("validate", config_file.name, "--backend", "mistrl", "--json").document["error"]
    assert (error["type"], error["exit_code"]) == ("ConfigError", 3)
    assert error["issues"][0]["fix"] == "did you mean 'mistral'?"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b'{"messages": [}\n', "train.jsonl:1"),
        (b'{"foo": 1}\n', "train.jsonl:1"),
        (b"\xff\xfe\n", "UTF-8"),
    ],
)
def test_bad_data_is_named_by_line(
    run: Run, config_file: Path, train_file: Path, content: bytes, said: str
) -> None:
    """Nothing is launched on data that cannot be used."""
    train_file.write_bytes(content)
    done = run("launch", config_file.name)
    assert done.code == 3
    assert said in done.err


def test_missing_data_is_named(run: Run, config_file: Path, train_file: Path) -> None:
    """The path in the configuration leads nowhere."""
    train_file.unlink()
    done = run("validate", config_file.name)
    assert done.code == 3
    assert "train.jsonl" in done.out


def test_a_failed_launch_leaves_no_run(run: Run, config_file: Path, train_file: Path) -> None:
    """What never began is not in the list."""
    train_file.write_text("")
    run("launch", config_file.name, "--id", "mine")
    assert run("list", "--json").document == []


def test_an_unknown_run_is_not_found(run: Run) -> None:
    """Exit code 5."""
    assert run("status", "none").code == 5


def test_an_unknown_model_names_what_is_offered(run: Run, config_file: Path) -> None:
    """The local backend says what it can train."""
    done = run("validate", config_file.name, "--set", "model=tiny-mistrel")
    assert done.code == 3
    assert "did you mean 'tiny-mistral'?" in done.out


def test_no_key_says_where_to_put_one(run: Run, config_file: Path) -> None:
    """Exit code 4, with the variable, the command and the way without a key."""
    given = ("-b", "mistral", "--yes", "--set", "hyperparameters.batch_size=")
    here = "http://127.0.0.1:9"
    done = run("launch", config_file.name, *given, TRAINING_BACKENDS_MISTRAL__BASE_URL=here)
    assert done.code == 4
    for hint in ("MISTRAL_API_KEY", "credentials set mistral", "local"):
        assert hint in done.err


def test_the_default_url_of_mistral_is_not_ready_to_launch(run: Run, config_file: Path) -> None:
    """Exit code 8 without a key too, with what to use instead: the hosted service is retired."""
    done = run("validate", config_file.name, "-b", "mistral", "--set=hyperparameters.batch_size=")
    assert done.code == 8
    assert "ready to launch" not in done.out
    assert "training-backends serve" in done.err


def test_a_key_is_not_sent_over_plain_http(run: Run, config_file: Path) -> None:
    """Another host is refused before anything is sent."""
    done = run(
        "launch",
        config_file.name,
        "--backend=mistral",
        "--yes",
        "--set=hyperparameters.batch_size=",
        MISTRAL_API_KEY="k" * 32,
        TRAINING_BACKENDS_MISTRAL__BASE_URL="http://192.0.2.1",
    )
    assert done.code in {3, 4}
    assert "http://192.0.2.1" in done.err
    assert "k" * 32 not in done.err


def test_nobody_to_ask_needs_consent(run: Run, config_file: Path) -> None:
    """What may cost money is not started from a pipe without --yes or a budget."""
    done = run("launch", config_file.name, "--backend=mistral", MISTRAL_API_KEY="k" * 32)
    assert done.code == 2
    assert "--yes" in done.err


def test_a_server_that_is_away_is_unavailable(run: Run, config_file: Path) -> None:
    """Exit code 8 after the retries."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    done = run(
        "launch",
        config_file.name,
        "--backend=mistral",
        "--yes",
        "--set=hyperparameters.batch_size=",
        MISTRAL_API_KEY="k" * 32,
        TRAINING_BACKENDS_MISTRAL__BASE_URL=f"http://127.0.0.1:{port}",
        TRAINING_BACKENDS_MISTRAL__ATTEMPTS="2",
    )
    assert done.code == 8


def test_a_taken_port_is_named(run: Run) -> None:
    """`serve` says which port, and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, TRAINING_BACKENDS_GATEWAY__API_KEY="x" * 20)
    assert done.code == 3
    assert f"Port {port}" in done.err
    assert "--port 0" in done.err


def test_an_exit_code_needs_no_standard_error(tmp_path: Path) -> None:
    """A closed pipe takes the message away, not the code or the document."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stderr:
        done = subprocess.run(
            [sys.executable, "-m", "training_backends", "status", "nothing", "--json"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            check=False,
            timeout=100,
        )
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["exit_code"] == 5


def test_a_gateway_without_a_key_does_not_start(run: Run) -> None:
    """A server that nobody could use, or everybody, is refused."""
    done = run("serve", "--port", "0")
    assert done.code == 3
    assert "keys create" in done.err


def test_gateway_keys_are_made_listed_and_revoked(run: Run) -> None:
    """A key is shown once; afterwards only its id."""
    made = run("keys", "create", "--name", "ci", "--json").document
    listed = run("keys", "list", "--json")
    assert made["key"].startswith("tb-")
    assert made["key"] not in listed.out
    assert run("keys", "revoke", made["id"], "--json").document["active"] is False


def test_a_keyring_that_is_not_there_is_explained(run: Run) -> None:
    """Storing a key without a keyring fails with exit code 4 and loses nothing silently."""
    done = run("credentials", "set", "mistral", stdin="secret-value\n")
    assert done.code == 4
    assert "environment variable" in done.err
    assert "secret-value" not in done.err


def test_a_key_from_the_environment_is_listed_without_its_value(run: Run) -> None:
    """People see where a key comes from."""
    done = run("credentials", "list", "--json", MISTRAL_API_KEY="k" * 32)
    assert done.document[0]["provider"] == "mistral"
    assert "k" * 32 not in done.out + done.err


def test_bad_status_is_a_usage_error(run: Run) -> None:
    """The words that exist are listed."""
    done = run("list", "--status", "done")
    assert done.code == 2
    assert "completed" in done.err


def test_wrong_settings_name_their_variable(run: Run) -> None:
    """A value that does not fit is found by its name."""
    done = run("list", TRAINING_BACKENDS_LOG_LEVEL="loud")
    assert done.code == 3
    assert "TRAINING_BACKENDS_LOG_LEVEL" in done.err


def test_quickstart_does_not_write_into_another_directory(run: Run, tmp_path: Path) -> None:
    """What lies there already is left alone."""
    needs_torch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    done = run("quickstart", "--dir", "mine")
    assert done.code == 3
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--json", "--status", "done"),
        ("launch", "--json", "--nope"),
        ("lauch", "--json"),
        ("wait", "--json"),
        ("launch", "run.yaml", "--id", "", "--json"),
    ],
)
def test_a_usage_error_is_one_json_document_too(
    run: Run, config_file: Path, arguments: tuple[str, ...]
) -> None:
    """A script that misspells an option reads why where it reads everything else."""
    del config_file
    done = run(*arguments)
    assert (done.code, done.document["error"]["exit_code"]) == (2, 2)
    assert done.document["error"]["type"] == "UsageError"


def test_an_error_ends_a_stream_of_json_lines(run: Run) -> None:
    """The error of `logs --json` is a line like the records before it."""
    done = run("logs", "none", "--json")
    assert len(done.out.splitlines()) == 1
    assert done.document["error"]["exit_code"] == 5


def test_the_unforeseen_is_said_without_a_traceback(run: Run) -> None:
    """Exit code 1 in plain words; the log shows where it was when it is asked to."""
    # A home that can be no directory, met by a command that does not look for that.
    home = {"TRAINING_BACKENDS_HOME": "/dev/null/password=secret-word"}
    done = run("keys", "list", "--json", **home)
    shown = run("keys", "list", TRAINING_BACKENDS_LOG_LEVEL="debug", **home)
    assert (done.code, done.document["error"]["exit_code"]) == (1, 1)
    assert "Traceback" not in done.err
    assert "secret-word" not in done.out + done.err + shown.err


def test_output_that_cannot_be_written_is_an_error(run: Run, config_file: Path) -> None:
    """A full disk behind `>` is not taken for a success."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "training_backends", "list", "--json"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=config_file.parent,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_json_is_written_whatever_the_terminal_can_show(run: Run, config_file: Path) -> None:
    """Where only ASCII can be written, the document is escaped and stays the same."""
    done = run(
        "validate", config_file.name, "--set", "model=ä🦄", "--json", PYTHONIOENCODING="ascii"
    )
    assert done.code == 3
    assert "ä🦄" in done.document["issues"][0]["message"]


def test_what_a_backend_refuses_is_named_by_file_and_line(run: Run, config_file: Path) -> None:
    """The backend knows the values, the file knows where they stand."""
    config_file.write_text(config_file.read_text().replace("tiny-mistral", "tiny-mistrel"))
    done = run("validate", config_file.name)
    launched = run("launch", config_file.name)
    assert "run.yaml:2: model: unknown model" in done.out
    assert "run.yaml:2: model: unknown model" in launched.err


def test_what_the_command_line_gave_is_named_so(run: Run, config_file: Path) -> None:
    """A value from `--set` or `--backend` is not blamed on a line of the file."""
    overridden = run("validate", config_file.name, "--set", "model=tiny-mistrel")
    other = run("validate", config_file.name, "--backend", "mistrl")
    assert "--set: model: unknown model" in overridden.out
    assert "run.yaml:" not in other.err


def test_an_empty_filter_is_not_taken_for_an_empty_store(run: Run) -> None:
    """Nobody is sent to the quickstart because of a filter."""
    assert "quickstart" in run("list").err
    assert "quickstart" not in run("list", "--backend", "local").err


def test_retries_are_not_told_in_the_words_of_a_library(run: Run, config_file: Path) -> None:
    """A server that is away is one clear line, not one a request."""
    done = run(
        "validate",
        config_file.name,
        "--backend=mistral",
        "--set=hyperparameters.batch_size=",
        MISTRAL_API_KEY="k" * 32,
        TRAINING_BACKENDS_MISTRAL__BASE_URL="http://127.0.0.1:9",
        TRAINING_BACKENDS_MISTRAL__ATTEMPTS="2",
    )
    assert "could not check with the server" in done.out
    assert "stamina" not in done.out + done.err
