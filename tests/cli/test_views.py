"""`list`, `status` and `metrics` show how runs stand now, or say how old the view is."""

import csv
import io
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from training_backends import Place, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.backends.local.spec import build_spec
from training_backends.core.run import utc_now
from training_backends.rundir.directory import Event, ExitRecord, MetricsRow, RunDir
from training_backends.store import RunStore

Run = Any
MakeLive = Callable[..., TrainingRun]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    home = tmp_path / "home"
    home.mkdir()
    store = RunStore(f"sqlite:///{home / 'runs.db'}")
    yield store
    store.close()


@pytest.fixture
def live(store: RunStore, make_config: Callable[..., TrainingConfig]) -> MakeLive:
    """Store a run that was seen to train six hours ago."""

    def make(run_id: str, **fields: object) -> TrainingRun:
        known = {
            "backend": "local",
            "config": make_config(),
            "remote_id": run_id,
            "status": TrainingStatus.RUNNING,
            "last_seen_at": utc_now() - timedelta(hours=6),
        }
        run = TrainingRun.model_validate({"id": run_id, **known, **fields})
        store.insert(run)
        return run

    return make


@pytest.fixture
def ended(tmp_path: Path, live: MakeLive) -> None:
    """A run `r` that the store has as running, and that has completed since."""
    run = live("r")
    directory = RunDir(tmp_path / "home" / "runs" / "r")
    directory.write_spec(build_spec("r", run.config, tmp_path / "home" / "slots"))
    for step in (1, 2):
        row = MetricsRow(step=step, total_steps=2, epoch=1, train_loss=4 / step, learning_rate=0.1)
        directory.add_metrics(row)
    means = {"train_loss": 3.0}  # as an engine before this version told it
    directory.add_event(Event(name="checkpoint", step=2, data={"metrics": means}))
    directory.write_exit(ExitRecord(status="completed", code=0))


@pytest.mark.usefixtures("ended")
def test_a_list_shows_what_ended_since(run: Run) -> None:
    """With --cached it is as it was last seen, and how long ago that was is said."""
    cached = run("list", "--cached")
    assert "running (as of 6h ago)" in cached.out
    assert "note: run r was last updated 6h ago" in cached.err
    listed = run("list", "--json")
    assert [each["status"] for each in listed.document] == ["completed"]
    assert listed.err == ""
    assert [each["id"] for each in run("list", "-s", "completed", "--json").document] == ["r"]


@pytest.mark.usefixtures("ended")
def test_metrics_of_a_run_that_was_not_followed(run: Run) -> None:
    """The losses of the steps, whatever a checkpoint says; nothing false before they are read."""
    assert "No metrics yet; the run was last updated 6h ago" in run("metrics", "r", "--cached").err
    shown = run("metrics", "r", "--csv")
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert [(row["step"], row["train_loss"]) for row in rows] == [("1", "4.0"), ("2", "2.0")]


def test_a_finished_run_without_metrics_is_not_waited_for(run: Run, live: MakeLive) -> None:
    """No `yet` where nothing will come."""
    live("r", status=TrainingStatus.CANCELLED)
    assert "is cancelled and has no metrics" in run("metrics", "r").err


def test_a_backend_out_of_reach_does_not_fail_the_list(run: Run, live: MakeLive) -> None:
    """A note says why its rows may be old, and the rows are marked."""
    live("r", backend="mistral", remote_id="00000000-0000-4000-8000-000000000000")
    live("s", backend="not-installed")
    away = {"MISTRAL_API_KEY": "k", "TRAINING_BACKENDS_MISTRAL__BASE_URL": "http://127.0.0.1:9"}
    listed = run("list", **away)
    assert listed.code == 0
    assert "note: run r was last updated 6h" in listed.err
    assert "note: run s was last updated 6h" in listed.err
    assert "running (unreachable)" in listed.out, "the server does not answer"
    assert "running (as of 6h ago)" in listed.out, "this machine lacks the backend"


def test_a_run_of_another_home_is_shown_as_last_seen(run: Run, live: MakeLive) -> None:
    """With the home that could tell more."""
    live("r", place=Place(id="theirs", host="gpu-1", path=Path("/state")))
    shown = run("status", "r")
    assert shown.code == 0
    assert "running" in shown.out
    assert "this run can only be observed from gpu-1:/state" in shown.out
    assert "it can only be observed from gpu-1:/state" in run("list").err
    stopped = run("stop", "r")
    assert (stopped.code, "gpu-1" in stopped.err) == (9, True)
