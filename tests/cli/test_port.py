"""`port` prints a configuration for another backend, and reports what changes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.commands import Run

MISTRAL = """\
backend: mistral
model: open-mistral-7b
data: {train: train.jsonl}
hyperparameters: {epochs: 2, learning_rate: 0.0001}
suffix: mine
"""


@pytest.fixture
def mistral_file(tmp_path: Path, train_file: Path) -> Path:
    """Write a configuration for the hosted Mistral service."""
    path = tmp_path / "mistral.yaml"
    path.write_text(MISTRAL.replace("train.jsonl", train_file.name))
    return path


@pytest.mark.usefixtures("mistral_file")
def test_the_yaml_alone_goes_to_standard_output(run: Run, tmp_path: Path) -> None:
    """`> new.yaml` works; the report and what is left to do go to standard error."""
    done = run("port", "mistral.yaml", "--to", "openai")
    assert done.code == 3
    assert yaml.safe_load(done.out) == {
        "backend": "openai",
        "data": {"train": str(tmp_path / "train.jsonl")},
        "hyperparameters": {"epochs": 2},
        "suffix": "mine",
    }
    assert '# model: "open-mistral-7b"  # choose the model of openai' in done.out
    assert "mapped hyperparameters.epochs, data.train.0, suffix" in done.err
    assert "lost hyperparameters.learning_rate: " in done.err
    assert "model: openai needs it" in done.err


@pytest.mark.usefixtures("mistral_file")
def test_a_new_file_with_a_chosen_model_is_complete(run: Run, tmp_path: Path) -> None:
    """Its paths are relative to it, and no file is overwritten."""
    words = ("port", "mistral.yaml", "--to", "together", "--model", "m", "-o", "new.yaml")
    done = run(*words)
    assert (done.code, done.out) == (0, "")
    new = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert (new["backend"], new["model"]) == ("together", "m")
    assert new["data"] == {"train": "train.jsonl"}
    assert "validate new.yaml" in done.err
    assert run(*words).code == 3


def test_one_document_has_the_report(run: Run, mistral_file: Path) -> None:
    """For scripts: the configuration, what became of each field, and the new files."""
    rows = [{"prompt": f"{n}?", "completion": "No."} for n in range(12)]
    data = mistral_file.with_name("train.jsonl")
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = run("port", "mistral.yaml", "--to", "local", "--model", "tiny-mistral", "--json")
    assert done.code == 0, done.err
    found = done.document
    new = str(mistral_file.with_name("train.local.jsonl"))
    assert found["config"]["backend"] == "local"
    assert found["config"]["data"] == {"train": [{"path": new}]}
    assert found["files"] == [new]
    assert [change["field"] for change in found["approximated"]] == ["model", "data.train.0"]
    assert [change["field"] for change in found["lost"]] == ["suffix"]
    assert "hyperparameters.learning_rate" in found["mapped"]


@pytest.mark.usefixtures("mistral_file")
def test_a_retired_backend_names_the_ways_on(run: Run) -> None:
    """The commands convert the same configuration for a backend that can run it."""
    done = run("validate", "mistral.yaml", "--json")
    assert done.code == 8
    hint = done.document["error"]["hint"]
    for backend in ("local", "openai", "together"):
        assert f"port mistral.yaml --to {backend}`" in hint
    assert "--to mistral" not in hint
    assert "\n" not in hint
