"""`init` writes a configuration that can be launched once its data exists."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import needs_torch

Run = Any


@pytest.mark.parametrize("backend", ["local", "mistral"])
@pytest.mark.usefixtures("train_file")
def test_what_init_writes_is_valid(run: Run, tmp_path: Path, backend: str) -> None:
    """Its comments name the commands to run next."""
    if backend == "local":
        needs_torch()
    away = {
        "TRAINING_BACKENDS_MISTRAL__BASE_URL": "http://127.0.0.1:9",
        "TRAINING_BACKENDS_MISTRAL__ATTEMPTS": "1",
    }
    written = run("init", "my.yaml", "--backend", backend, "--json")
    assert (written.code, written.document) == (0, {"path": "my.yaml"})
    assert "training-backends launch my.yaml --follow" in (tmp_path / "my.yaml").read_text()
    valid = run("validate", "my.yaml", "--json", **away)
    assert (valid.code, valid.document["backend"]) == (0, backend)


def test_init_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    """Exit code 3, and the file is as it was."""
    (tmp_path / "run.yaml").write_text("mine")
    done = run("init", "--backend", "mistral")
    assert done.code == 3
    assert "run.yaml already exists" in done.err
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_the_schema_is_printed(run: Run, tmp_path: Path) -> None:
    """Of all backends, or of the one that is named; nothing is written."""
    of_all = run("init", "--schema").document
    of_one = run("init", "--schema", "--backend", "mistral").document
    assert of_all["properties"]["options"] != of_one["properties"]["options"]
    assert not (tmp_path / "run.yaml").exists()


def test_the_schema_is_written_for_editors(run: Run, tmp_path: Path) -> None:
    """The first line names the file beside it, which editors read without a network."""
    done = run("init", "--backend", "mistral", "--with-schema", "--json")
    assert done.document == {"path": "run.yaml", "schema": "run.schema.json"}
    first, *_ = (tmp_path / "run.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=run.schema.json"
    schema = json.loads((tmp_path / "run.schema.json").read_text())
    assert schema == run("init", "--schema", "--backend", "mistral").document
