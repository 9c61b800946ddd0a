"""How often a run is observed."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import Checkpoint, Estimate, TrainingConfig, TrainingRun
from training_backends.client.observe import expected_end
from training_backends.client.poller import due_at, interval

BOUNDS = (timedelta(seconds=1), timedelta(minutes=1))
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def run(make_config: Callable[..., TrainingConfig]) -> TrainingRun:
    return TrainingRun(
        id="mine", backend="b", config=make_config(), created_at=BEGAN, started_at=BEGAN
    )


def after(**time: float) -> datetime:
    return BEGAN + timedelta(**time)


def test_a_young_run_is_looked_at_often(run: TrainingRun) -> None:
    """Right after its start, as often as the provider likes at most."""
    assert interval(run, after(seconds=3), BOUNDS) == BOUNDS[0]


def test_a_run_that_stands_still_is_looked_at_ever_less(run: TrainingRun) -> None:
    """The longer nothing changes, the longer the pause, up to its bound."""
    pauses = [interval(run, after(minutes=m), BOUNDS) for m in (1, 2, 5, 100)]
    assert pauses == [timedelta(seconds=s) for s in (6, 12, 30, 60)]


def test_a_change_makes_looks_frequent_again(run: TrainingRun) -> None:
    """What has just moved may move again."""
    moved = run.model_copy(update={"changed_at": after(hours=5)})
    assert interval(moved, after(hours=5, seconds=2), BOUNDS) == BOUNDS[0]


def test_a_run_about_to_end_is_looked_at_often(run: TrainingRun) -> None:
    """By the provider's estimate it has half a minute left."""
    soon = run.model_copy(update={"estimate": Estimate(duration=timedelta(hours=2))})
    assert interval(soon, after(hours=1, minutes=59, seconds=30), BOUNDS) == timedelta(seconds=3)


def test_the_end_follows_from_the_pace_so_far(run: TrainingRun) -> None:
    """A quarter of the steps in an hour: four hours in all."""
    point = Checkpoint(step=25, at=after(hours=1))
    quarter = run.model_copy(update={"step": 25, "total_steps": 100, "checkpoints": (point,)})
    assert expected_end(quarter) == after(hours=4)


def test_a_run_never_seen_is_due_now(run: TrainingRun) -> None:
    """There is nothing to wait for."""
    assert due_at(run, after(hours=1), BOUNDS) == after(hours=1)


@given(st.text("abcdef0123456789", min_size=1), st.integers(0, 10**6))
def test_looks_are_spread_and_all_agree_on_them(name: str, seconds: int) -> None:
    """Within a fifth around the interval, and the same for everybody who asks."""
    seen = after(seconds=seconds)
    config = TrainingConfig.model_validate({"model": "m", "data": {"train": "/t.jsonl"}})
    run = TrainingRun(id=name, backend="b", config=config, created_at=BEGAN, last_seen_at=seen)
    wait = (due_at(run, seen, BOUNDS) - seen) / interval(run, seen, BOUNDS)
    assert 0.79 <= wait <= 1.21
    assert due_at(run, after(days=99), BOUNDS) == due_at(run, seen, BOUNDS)
