"""`compare` and `list --tag`: what differs between runs, and which belong together."""

import json
from pathlib import Path
from typing import Any

import pytest

from training_backends import LogRecord, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.core.run import utc_now
from training_backends.store import RunStore

pytestmark = pytest.mark.e2e

Run = Any


@pytest.fixture(autouse=True)
def stored(tmp_path: Path) -> None:
    """Store two finished runs that differ in their learning rate and losses."""
    (tmp_path / "home").mkdir()
    store = RunStore(f"sqlite:///{tmp_path / 'home' / 'runs.db'}")
    for run_id, rate, losses in (("one", 1e-4, (4.0, 2.0)), ("two", 2e-4, (4.0, 1.0))):
        given = {
            "model": "m",
            "data": {"train": "a.jsonl"},
            "hyperparameters": {"learning_rate": rate, "training_steps": 2},
            "tags": {"team": "support", "name": run_id},
        }
        config = TrainingConfig.model_validate(given)
        run = TrainingRun(
            id=run_id,
            backend="local",
            config=config,
            status=TrainingStatus.COMPLETED,
            metrics={"train_loss": losses[-1]},
        )
        store.insert(run)
        records = [
            LogRecord(
                at=utc_now(),
                message="",
                source="metrics",
                step=step,
                fields={"train_loss": loss},
                cursor=str(step),
            )
            for step, loss in enumerate(losses, 1)
        ]
        store.note(run_id, lambda run: run, records)
    store.close()


def test_only_what_differs_is_shown(run: Run) -> None:
    """With all metrics, as a column for each run."""
    rows = [line.split() for line in run("compare", "one", "two", "--cached").out.splitlines()]
    assert rows == [
        ["one", "two"],
        ["hyperparameters.learning_rate", "0.0001", "0.0002"],
        ["tags.name", "one", "two"],
        ["train_loss", "2", "1"],
    ]


def test_json_has_the_values_as_they_are(run: Run) -> None:
    """With the series of a metric that is asked for."""
    done = run("compare", "one", "two", "--cached", "--plot", "train_loss", "--json")
    document = json.loads(done.out)
    assert document["differences"]["hyperparameters.learning_rate"] == [1e-4, 2e-4]
    assert document["series"] == [{"1": 4.0, "2": 2.0}, {"1": 4.0, "2": 1.0}]


def test_a_metric_of_all_runs_is_drawn_in_one_chart(run: Run) -> None:
    """With the last value of each."""
    shown = run("compare", "one", "two", "--cached", "--plot", "train_loss").out
    assert "one 2" in shown
    assert "two 1" in shown


def test_one_run_cannot_be_compared(run: Run) -> None:
    """Twice the same is one run."""
    assert run("compare", "one", "one").code == 2


def test_runs_are_found_by_their_tags(run: Run) -> None:
    """All of the tags must match."""
    found = run("list", "--cached", "--tag", "team=support", "--tag", "name=two", "--json")
    assert [each["id"] for each in json.loads(found.out)] == ["two"]


def test_a_tag_needs_a_value(run: Run) -> None:
    """A typing error finds no other runs."""
    assert run("list", "--tag", "team").code == 2
