"""`data split`: both files, what to paste into a configuration, and the exit codes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("data_file")]

Run = Any


def test_both_sides_are_written(run: Run, tmp_path: Path, data_file: Path) -> None:
    """By the provider format's rule: 2,000 bytes leave 95 for the validation set."""
    done = run("data", "split", "data.jsonl")
    assert done.code == 0
    assert "data.train.jsonl  96 rows, 1.9 kB" in done.err
    assert "data.validation.jsonl  4 rows, 80 bytes" in done.err
    sides = [(tmp_path / f"data.{side}.jsonl").read_text() for side in ("train", "validation")]
    both = [line for side in sides for line in side.splitlines()]
    assert sorted(both) == data_file.read_text().splitlines()


def test_what_is_shown_can_be_pasted_into_a_configuration(run: Run) -> None:
    """It is YAML, with the paths as they were given."""
    shown = run("data", "split", "data.jsonl").out
    assert yaml.safe_load(shown) == {
        "data": {"train": ["data.train.jsonl"], "validation": ["data.validation.jsonl"]}
    }


def test_json_has_the_counts(run: Run) -> None:
    """One document, with the same paths for the configuration."""
    document = run("data", "split", "data.jsonl", "--rows", "10", "--json").document
    (file,) = document["files"]
    assert file["source"] == "data.jsonl"
    assert file["train"] == {"path": "data.train.jsonl", "rows": 90, "size": 1800}
    assert file["validation"] == {"path": "data.validation.jsonl", "rows": 10, "size": 200}
    assert document["data"]["validation"] == ["data.validation.jsonl"]


def test_a_set_too_large_for_the_provider_format_is_noted(run: Run) -> None:
    """It is written as asked for, and the service would refuse it."""
    done = run("data", "split", "data.jsonl", "--fraction", "0.2")
    assert done.code == 0
    assert "too large for mistral" in done.err
    assert "25.0%" in done.err
    again = run(
        "data", "split", "data.jsonl", "--fraction", "0.2", "--provider-format", "openai", "--force"
    )
    assert "too large" not in again.err


def test_a_seed_can_be_given(run: Run, tmp_path: Path) -> None:
    """The same gives the same, another gives others; files may lie elsewhere."""
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        done = run(
            "data", "split", "data.jsonl", "--rows", "9", "--seed", seed, "--dir", f"out/{name}"
        )
        assert done.code == 0
    a, b, c = ((tmp_path / "out" / n / "data.validation.jsonl").read_text() for n in "abc")
    assert a == b != c


def test_standard_input_is_split(run: Run, tmp_path: Path, data_file: Path) -> None:
    """Into files here, called after it."""
    done = run("data", "split", "-", "--rows", "5", stdin=data_file.read_text())
    assert done.code == 0
    assert len((tmp_path / "stdin.validation.jsonl").read_text().splitlines()) == 5
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"} == {
        "data.jsonl",
        "stdin.train.jsonl",
        "stdin.validation.jsonl",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.jsonl"], 3, "none.jsonl: no such file"),
        (["data.jsonl", "--rows", "100"], 3, "leaves no rows for training"),
        (["data.jsonl", "--fraction", "0.001"], 3, "no row fits in a validation set of 0 rows"),
        (["data.jsonl", "--rows", "0"], 2, "Invalid value for '--rows'"),
        (["data.jsonl", "--fraction", "2"], 2, "Invalid value for '--fraction'"),
        (["data.jsonl", "--rows", "2", "--fraction", "0.5"], 2, "Pass either --fraction or --rows"),
        (["data.jsonl", "--provider-format", "x"], 2, "Choose from mistral, openai"),
        (["data.jsonl", "--dir", "data.jsonl"], 1, "data.train.jsonl: Not a directory"),
    ],
)
def test_wrong_input_is_explained(
    run: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    """With the exit code that scripts know; nothing is written."""
    done = run("data", "split", *arguments)
    assert said in done.err
    assert done.code == code
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["data.jsonl"]


def test_nothing_is_written_over(run: Run, tmp_path: Path) -> None:
    """Unless it is asked for."""
    assert run("data", "split", "data.jsonl").code == 0
    again = run("data", "split", "data.jsonl", "--json")
    assert again.code == 3
    assert "data.train.jsonl already exists" in again.document["error"]["message"]
    assert run("data", "split", "data.jsonl", "--force").code == 0
