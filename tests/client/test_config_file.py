"""Configuration files: what is read, and what is said of what is wrong."""

import os
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from training_backends import ConfigError, Issue, TrainingConfig
from training_backends.client.config_file import load_config, to_config
from training_backends.core.config import ConfigPath

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


def test_labels_are_now_tags(tmp_path: Path) -> None:
    """A configuration of an earlier version is told the new name of the field."""
    issue = issue_of(write(tmp_path, GOOD + "labels: {team: a}\n"))
    assert (issue.code, issue.line, issue.field) == ("unknown_field", 7, "labels")
    assert issue.fix == "did you mean 'tags'?"


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
        (GOOD + "tuning: {rank: 4}\n", "missing", 7),
        (GOOD + "{[a]: b}: c\n", "not_yaml", 7),
        (GOOD + "suffix: !foo bar\n", "not_yaml", 7),
        (GOOD + "suffix: !!timestamp 2026-13-45\n", "not_yaml", None),
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


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("budgett:\n", "budgett"),
        ("tuning: {kind: lora, rnk: }\n", "tuning.rnk"),
        ("tags: {team: }\n", "tags.team"),
    ],
)
def test_an_unknown_field_without_a_value_is_an_error(
    tmp_path: Path, text: str, field: str
) -> None:
    """A misspelt name is found before its value is written."""
    issue = issue_of(write(tmp_path, GOOD + text))
    assert (issue.line, issue.field) == (7, field)


def test_a_decimal_comma_does_not_change_the_learning_rate(tmp_path: Path) -> None:
    """`1,0e-4` in braces is 1 and an unknown field `0e-4`."""
    text = GOOD.replace(":\n  epochs: 2", ": {epochs: 2, learning_rate: 1,0e-4}")
    assert issue_of(write(tmp_path, text)).field == "hyperparameters.0e-4"


@pytest.mark.parametrize("override", ["hyperparameters.batch_sise=", "budgett=null"])
def test_an_unknown_override_without_a_value_is_an_error(tmp_path: Path, override: str) -> None:
    """`--set` removes only what exists."""
    issue = issue_of(write(tmp_path, GOOD), override)
    assert (issue.path, issue.code) == ("--set", "unknown_field")


@pytest.mark.parametrize(
    ("written", "read"), [("010", "8"), ("12:30", "750"), ("-1:30", "-90"), ("1:30.5", "90.5")]
)
def test_a_number_to_another_base_is_an_error(tmp_path: Path, written: str, read: str) -> None:
    """What YAML 1.1 reads differently from people is not guessed, in the file or in --set."""
    in_file = issue_of(write(tmp_path, GOOD.replace("epochs: 2", f"epochs: {written}")))
    in_override = issue_of(write(tmp_path, GOOD), f"hyperparameters.epochs={written}")
    assert (in_file.code, in_file.line, in_override.path) == ("misread_number", 6, "--set")
    assert in_file.message == in_override.message == f"YAML reads {written} as {read}"


@pytest.mark.parametrize("word", ["true", "yes", "off"])
def test_a_truth_value_is_no_number(tmp_path: Path, word: str) -> None:
    """`seed: yes` does not train with seed 1."""
    issue = issue_of(write(tmp_path, GOOD), f"hyperparameters.seed={word}")
    assert (issue.field, "yes, no" in issue.message) == ("hyperparameters.seed", True)


@given(st.integers(min_value=1, max_value=2**31))
def test_a_decimal_number_is_read_as_it_is_written(number: int) -> None:
    """However it is grouped or signed."""
    with TemporaryDirectory() as directory:
        for text in (str(number), f"+{number}", f"{number:_}", hex(number)):
            override = f"hyperparameters.training_steps={text}"
            good = write(Path(directory), GOOD.replace("  epochs: 2\n", "  seed: 1\n"))
            file = load_config(good, [override])
            assert file.config.hyperparameters.training_steps == number


def test_a_mapping_is_checked_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths are relative to the working directory, and its issues name the field."""
    monkeypatch.chdir(tmp_path)
    config = to_config({"model": "m", "data": {"train": "a.jsonl"}, "suffix": None})
    assert type(config) is TrainingConfig
    assert config.data.train[0].path == tmp_path / "a.jsonl"
    with pytest.raises(ConfigError) as caught:
        to_config({"model": "m", "data": {"train": "a.jsonl"}, "sufix": None})
    assert [str(issue) for issue in caught.value.issues] == [
        "sufix: unknown field (did you mean 'suffix'?)"
    ]


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


def test_a_date_is_text(tmp_path: Path) -> None:
    """No field is a date, and a tag may well look like one."""
    file = load_config(write(tmp_path, GOOD + "tags: {made: 2026-11-21}\n"))
    assert file.config.tags == {"made": "2026-11-21"}


def test_what_set_gave_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """The line in the file holds another value than the one that is wrong."""
    path = write(tmp_path, GOOD)
    for override in ("hyperparameters.epochs=x", "hyperparameters={epochs: x}"):
        issue = issue_of(path, override)
        assert (issue.path, issue.line, issue.field) == ("--set", None, "hyperparameters.epochs")


def test_two_lengths_name_the_override(tmp_path: Path) -> None:
    """The file was good before the command line added a second length."""
    assert issue_of(write(tmp_path, GOOD), "hyperparameters.training_steps=5").path == "--set"


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    """Reading what nobody writes would never end."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert issue_of(path).code == "not_a_file"


def test_a_file_of_data_is_not_read_as_a_configuration(tmp_path: Path) -> None:
    """A mistaken path to gigabytes is refused after the first few."""
    assert issue_of(write(tmp_path, "#" * 4_000_001)).code == "too_large"


@pytest.mark.parametrize("override", ['model="a\\0"', 'data.train="a\\0.jsonl"'])
def test_control_characters_are_refused(tmp_path: Path, override: str) -> None:
    """The system takes no such path, and no such name is meant."""
    assert issue_of(write(tmp_path, GOOD), override).code == "control_character"


def test_a_home_that_is_not_there_is_named(tmp_path: Path) -> None:
    """`~name` of somebody whom this machine does not know."""
    issue = issue_of(write(tmp_path, GOOD), "data.train=~no-such-user/train.jsonl")
    assert issue.code == "no_such_home"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=train.jsonl", "expected a mapping"),
        ("classifier_targets=[{name: a, labels: []}]", "the list is empty"),
        ("model=7", "expected text"),
        ("data.train=[{path: 3}]", "expected a path"),
        ("budget.max_duration=0s", "must be greater than zero"),
        ("tags=5", "expected a mapping"),
    ],
)
def test_faults_are_told_without_python(tmp_path: Path, override: str, message: str) -> None:
    """No class name of this package or of the standard library is shown to people."""
    assert issue_of(write(tmp_path, GOOD), override).message == message


def test_bad_entries_are_not_an_empty_list_as_well(tmp_path: Path) -> None:
    """One fault is told once."""
    path = write(tmp_path, GOOD.replace("train.jsonl", "[4]"))
    assert [issue.field for issue in _all_issues(path)] == ["data.train.0"]


def test_issues_of_a_backend_find_their_line(tmp_path: Path) -> None:
    """What names a field only gets the file and the line; the rest stays."""
    file = load_config(write(tmp_path, GOOD), ["suffix=x"])
    issues = [
        Issue(code="c", message="m", field=field) for field in ("model", "suffix", "base_url", None)
    ]
    places = [(issue.path, issue.line) for issue in file.located(issues)]
    here = str(tmp_path / "run.yaml")
    assert places == [(here, 2), ("--set", None), (None, None), (None, None)]


class Placed(BaseModel):
    """Options with paths."""

    script: ConfigPath
    extra: tuple[ConfigPath, ...] = ()
    home: ConfigPath | None = None
    name: Path = Path()


def test_paths_in_options_are_relative_to_the_file(tmp_path: Path) -> None:
    """Only those that the backend declares; without a file they are relative to the directory."""
    options = {"script": "a.py", "extra": ["b", "/c"], "home": "~", "name": "kept", "other": "d"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "options": options}))
    expected = {
        **options,
        "script": str(tmp_path / "a.py"),
        "extra": [str(tmp_path / "b"), "/c"],
        "home": str(Path.home()),
    }
    assert to_config(file, Placed).options == expected
    assert to_config(load_config(file), Placed).options == expected
    assert to_config(to_config(file, Placed), Placed).options == expected
    assert to_config(file).options == options
    mapped = to_config({"model": "m", "options": options}, Placed).options
    assert mapped["script"] == str(Path.cwd() / "a.py")
    file.write_text("options: {script: ~nobody-here/a.py}")
    with pytest.raises(ConfigError) as caught:
        to_config(file, Placed)
    assert (caught.value.issues[0].field, caught.value.issues[0].line) == ("options", 1)
