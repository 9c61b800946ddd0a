"""Configuration files: what is read, and what is said of what is wrong."""

from itertools import pairwise
from pathlib import Path

import pytest

from training_backends import ConfigError, Issue
from training_backends.client.configfile import load_config

GOOD = """\
backend: local
model: tiny-mistral
data:
  train: train.jsonl
hyperparameters:
  epochs: 2
"""

ALIASES = "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmopqrstuvwx"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def issue_of(path: Path, *overrides: str) -> Issue:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.issues[0]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """A path in a configuration starts at the configuration's own directory."""
    file = load_config(write(tmp_path, GOOD))
    assert file.config.data.train[0].path == tmp_path / "train.jsonl"


def test_backend_is_read_beside_the_config(tmp_path: Path) -> None:
    """The file may name the backend."""
    assert load_config(write(tmp_path, GOOD)).backend == "local"


def test_override_wins_over_the_file(tmp_path: Path) -> None:
    """`--set` replaces what the file says."""
    file = load_config(write(tmp_path, GOOD), ["hyperparameters.epochs=5"])
    assert file.config.hyperparameters.epochs == 5


def test_override_reaches_a_new_place(tmp_path: Path) -> None:
    """`--set` makes the sections on its way."""
    file = load_config(write(tmp_path, GOOD), ["budget.max_cost=5 USD"])
    assert str(file.config.budget.max_cost) == "5.00 USD"


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    """A misspelt hyperparameter is found by its line, with the right name."""
    issue = issue_of(write(tmp_path, GOOD.replace("epochs", "n_epochs")))
    assert (issue.line, issue.field) == (6, "hyperparameters.n_epochs")
    assert issue.fix == "did you mean 'epochs'?"


def test_unknown_top_level_key_names_nearest(tmp_path: Path) -> None:
    """A misspelt field at the top is found too."""
    issue = issue_of(write(tmp_path, GOOD.replace("model:", "modle:")))
    assert "did you mean 'model'?" in {issue.fix} | {
        i.fix for i in _all_issues(write(tmp_path, GOOD.replace("model:", "modle:")))
    }


def _all_issues(path: Path) -> tuple[Issue, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return caught.value.issues


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", "not_a_mapping", None),
        ("- a\n- b\n", "not_a_mapping", None),
        ("model: [\n", "not_yaml", 2),
        ("model: a\nmodel: b\n", "duplicate_key", 2),
        (GOOD.replace("2", "-1"), "greater_than", 6),
        (GOOD.replace("  epochs: 2", "  epochs: 2\n  training_steps: 3"), "value_error", 5),
        ("backend: local\nmodel: m\n", "missing", None),
        (GOOD + "{[a]: b}: c\n", "not_yaml", 7),
        (GOOD + "suffix: !foo bar\n", "not_yaml", 7),
        (GOOD + "suffix: 2026-13-45\n", "not_yaml", None),
        ("a: " + "[" * 3000, "not_yaml", None),
        ("a: &a [*a]\n", "too_large", None),
        ("a: &a [1]\n" + ALIASES, "too_large", None),
    ],
)
def test_bad_file_is_explained(tmp_path: Path, text: str, code: str, line: int | None) -> None:
    """Each kind of fault has its code and, where there is one, its line."""
    issue = issue_of(write(tmp_path, text))
    assert (issue.code, issue.line) == (code, line)


def test_a_field_with_nothing_behind_it_is_not_given(tmp_path: Path) -> None:
    """`options:` alone is as if it were not there."""
    file = load_config(write(tmp_path, GOOD + "options:\nsuffix:\n"))
    assert (file.config.options, file.config.suffix) == ({}, None)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere is repeated in the error."""
    issue = issue_of(tmp_path / "none.yaml")
    assert (issue.code, issue.path) == ("missing_file", str(tmp_path / "none.yaml"))


def test_directory_is_no_configuration(tmp_path: Path) -> None:
    """A directory is told from a file."""
    assert issue_of(tmp_path).code == "not_a_file"


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """The position of the first bad byte is given."""
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\n")
    assert issue_of(path).code == "not_utf8"


@pytest.mark.parametrize("override", ["epochs", "=3", "model.x=1"])
def test_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    """`--set` needs a key, a value and a place that has fields."""
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, GOOD), [override])
