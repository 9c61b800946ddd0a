"""Tab completion, asked for as the shells do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Run
from training_backends import TrainingConfig, TrainingRun
from training_backends.store import RunStore


@pytest.fixture(autouse=True)
def stored(tmp_path: Path, make_config: Callable[..., TrainingConfig]) -> None:
    """Store two runs."""
    (tmp_path / "home").mkdir()
    store = RunStore(f"sqlite:///{tmp_path / 'home' / 'runs.db'}")
    for run_id in ("first", "second"):
        store.insert(TrainingRun(id=run_id, backend="local", config=make_config()))
    store.close()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("status ", ["second", "first"]),
        ("logs fi", ["first"]),
        ("stop s", ["second"]),
        ("wait first s", ["second"]),
        ("launch run.yaml -b l", ["local"]),
        ("list --status c", ["completed", "cancelled"]),
        ("data inspect --provider-format t", ["together"]),
        ("data repair x.jsonl --provider-format o", ["openai"]),
        ("credentials set m", ["mistral"]),
        ("sta", ["status"]),
    ],
)
def test_the_shell_is_offered_what_fits(run: Run, words: str, values: list[str]) -> None:
    """Run ids, backends, statuses and provider formats, from what was typed so far."""
    line = f"training-backends {words}"
    place = str(len(line.split()) - (not line.endswith(" ")))
    bash = {"_TRAINING_BACKENDS_COMPLETE": "complete_bash"}
    done = run(COMP_WORDS=line, COMP_CWORD=place, **bash)
    assert (done.code, done.out.split(), done.err) == (0, values, "")


def test_a_key_to_revoke_is_completed_by_its_id(run: Run) -> None:
    """Shells that show descriptions show the name of the key, and the model of a run."""
    key = json.loads(run("keys", "create", "--name", "ci", "--json").out)["id"]
    zsh = {"_TRAINING_BACKENDS_COMPLETE": "complete_zsh"}
    keys = run(_TYPER_COMPLETE_ARGS="training-backends keys revoke ", **zsh)
    runs = run(_TYPER_COMPLETE_ARGS="training-backends status f", **zsh)
    assert f'"{key}":"ci"' in keys.out
    assert '"first":"pending, tiny-mistral"' in runs.out


def test_completion_is_silent_where_nothing_can_be_read(run: Run) -> None:
    """A broken home does not write into the line that is typed."""
    bash = {"_TRAINING_BACKENDS_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    home = {"TRAINING_BACKENDS_HOME": "/dev/null/x"}
    done = run(COMP_WORDS="training-backends status ", **bash, **home)
    assert (done.code, done.out.strip(), done.err) == (0, "", "")
