"""Views that follow runs: redrawn on a terminal, one line per change elsewhere."""

import io
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest
from rich.console import Console

from training_backends import Staleness, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.cli.views.render import time_left
from training_backends.cli.views.watch import RunsView, draw_progress, progress_line, repeated
from training_backends.core.run import utc_now

MakeRun = Callable[..., TrainingRun]


@pytest.fixture
def running(make_config: Callable[..., TrainingConfig]) -> MakeRun:
    """Make a run that has trained a quarter of its steps in a minute."""

    def make(**fields: Any) -> TrainingRun:
        now = utc_now()
        known: dict[str, Any] = {"started_at": now - timedelta(minutes=1), "last_seen_at": now}
        known |= {"step": 25, "total_steps": 100, "metrics": {"train_loss": 0.5}}
        run = TrainingRun(id="r", backend="local", config=make_config(), status="running")
        return run.model_copy(update={**known, **fields})

    return make


def test_the_time_left_follows_from_the_average_speed(running: MakeRun) -> None:
    """It is unknown for a run that continues another, or that has not started."""
    left = time_left(running())
    assert left is not None
    assert timedelta(seconds=175) < left <= timedelta(seconds=181)
    unknown: list[dict[str, Any]] = [
        {"resumed_from": "other"},
        {"step": None},
        {"total_steps": None},
        {"started_at": None},
        {"status": TrainingStatus.COMPLETED},
    ]
    assert [time_left(running(**fields)) for fields in unknown] == [None] * 5


def test_a_line_says_how_far_a_run_is(running: MakeRun) -> None:
    """What is not known is left out."""
    assert progress_line(running()).startswith("r  running, step 25/100, loss 0.5, ")
    pending = running(status=TrainingStatus.PENDING, step=None, metrics={})
    assert progress_line(pending) == "r  pending"


def test_without_a_terminal_only_changes_are_printed(running: MakeRun) -> None:
    """A status, a reason for an old record, and every twentieth of the steps."""
    out = io.StringIO()
    stale = Staleness(kind="unreachable", since=utc_now(), message="away")
    with RunsView(draw_progress, Console(file=out, width=200)) as view:
        for fields in (
            {},
            {"step": 26},
            {"step": 30},
            {"step": 30, "stale": stale},
            {"step": 100, "status": TrainingStatus.COMPLETED},
            {"step": 100, "status": TrainingStatus.COMPLETED},
        ):
            view.show([running(**fields)])
    words = [line.split(", loss")[0] for line in out.getvalue().splitlines()]
    assert words == [
        "r  running, step 25/100",
        "r  running, step 30/100",
        "r  running (unreachable), step 30/100",
        "r  completed, step 100/100",
    ]


def test_changes_are_json_lines(running: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """That a run was merely seen again is no change."""
    out = io.StringIO()
    first = running()
    later = first.model_copy(update={"last_seen_at": utc_now()})
    with RunsView(draw_progress, Console(file=out), json=True) as view:
        for run in (first, later, later.model_copy(update={"step": 26})):
            view.show([run])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [25, 26]
    assert out.getvalue() == ""


def test_a_terminal_shows_the_current_state_in_place(running: MakeRun) -> None:
    """Each view replaces the one before, without an alternate screen."""
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, color_system=None)
    with RunsView(draw_progress, terminal) as view:
        view.show([running()])
        view.show([running(step=26)])
    shown = out.getvalue()
    assert "step 25/100" in shown
    assert "step 26/100" in shown
    assert "\x1b[2K" in shown, "the first view was erased"
    assert "\x1b[?1049h" not in shown


@pytest.mark.anyio
async def test_the_state_is_shown_before_during_and_after_the_work() -> None:
    """The work's result is returned."""
    shown: list[int] = []
    enough = anyio.Event()

    async def show() -> None:
        shown.append(len(shown))
        if len(shown) == 2:
            enough.set()

    async def work() -> str:
        await enough.wait()
        return "done"

    assert await repeated(show, work) == "done"
    assert len(shown) >= 3
