"""`init` writes a configuration that can be launched once its data exists."""

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
