"""What a run measured: charts for people, CSV and JSON for programs."""

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from training_backends.cli.views import charts
from training_backends.cli.views.charts import chart
from training_backends.core.config import TrainingConfig
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.store import RunStore

Run = Any
AT = datetime(2026, 1, 1, tzinfo=UTC)
FALLING = {step: 5.0 / step for step in range(1, 41)}


@pytest.fixture
def measured(tmp_path: Path, make_config: Callable[..., TrainingConfig]) -> None:
    """A run `r` of forty steps, validated at every tenth."""
    home = tmp_path / "home"
    home.mkdir()
    store = RunStore(f"sqlite:///{home / 'runs.db'}")
    store.insert(TrainingRun(id="r", backend="local", config=make_config()))
    records = [
        LogRecord(
            at=AT,
            message="",
            source="metrics",
            step=step,
            fields={
                "train_loss": loss,
                "learning_rate": 0.1,
                **({"valid_loss": loss + 1} if step % 10 == 0 else {}),
            },
            cursor=str(step),
        )
        for step, loss in FALLING.items()
    ]
    store.observed("r", lambda run: run, records, after=None, cursor="40")
    store.close()


@pytest.mark.usefixtures("measured")
def test_csv_has_a_line_a_step(run: Run) -> None:
    """Numbers as they are, nothing where nothing was measured, and nothing else on the way."""
    done = run("metrics", "r", "--csv")
    assert done.err == ""
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [int(row["step"]) for row in rows] == list(FALLING)
    assert [float(row["train_loss"]) for row in rows] == list(FALLING.values())
    assert [row["valid_loss"] for row in rows[8:11]] == ["", "1.5", ""]


@pytest.mark.usefixtures("measured")
def test_metrics_are_chosen_by_name(run: Run) -> None:
    """In CSV and JSON alike; one that was not measured is said, with those that were."""
    done = run("metrics", "r", "--csv", "-m", "valid_loss", "-m", "train_loss")
    assert done.out.splitlines()[0] == "step,valid_loss,train_loss"
    done = run("metrics", "r", "--json", "--metric", "valid_loss")
    assert [point["step"] for point in done.document] == [10, 20, 30, 40]
    done = run("metrics", "r", "-m", "los")
    assert done.code == 3
    assert "train_loss" in done.err


@pytest.mark.usefixtures("measured")
def test_charts_are_drawn_without_a_terminal_too(run: Run) -> None:
    """Eighty columns, no colours, nothing on standard error; in ASCII where it must be."""
    done = run("metrics", "r", "--plot", PYTHONIOENCODING="utf-8")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "train_loss 0.125  " in done.out, "the losses share a chart"
    assert "valid_loss 1.125" in done.out
    assert "learning_rate" not in done.out
    assert "\x1b" not in done.out
    done = run("metrics", "r", "--plot", "-m", "learning_rate", PYTHONIOENCODING="ascii")
    assert done.out.isascii()
    assert "* learning_rate 0.1" in done.out


@pytest.mark.usefixtures("measured")
def test_only_one_form_at_a_time(run: Run) -> None:
    """Two of them are a mistake on the command line."""
    assert run("metrics", "r", "--plot", "--csv").code == 2
    assert json.loads(run("metrics", "r", "--csv", "--json").out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_terminal_is_filled_within_reason(width: int) -> None:
    """With colours, and never beyond the edge."""
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")
    charts.plot({"train_loss": FALLING}, out, all_given=False)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert "\x1b[" in text
    plain = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    charts.plot({"train_loss": FALLING}, plain, all_given=False)
    assert isinstance(plain.file, io.StringIO)
    assert "\x1b[" not in plain.file.getvalue()
    longest = max(map(len, plain.file.getvalue().splitlines()))
    assert longest <= min(width, 120) or width < 42


@pytest.mark.parametrize("values", [{1: 3.0}, {1: 0.0}, {5: 2.0, 6: 2.0}, {1: -1.0, 9: 1e9}])
def test_few_or_equal_values_are_drawn(values: dict[int, float]) -> None:
    """One point, a line that is level, a range of nine digits."""
    drawn = chart({"loss": values}, width=30, coloured=False, plain=False)
    assert len(drawn.splitlines()) == 16
    assert f"loss {values[max(values)]:.6g}" in drawn


def test_what_is_the_same_measure_shares_a_chart() -> None:
    """Whatever else was measured has its own, and all are drawn if they are asked for."""
    out = Console(file=io.StringIO(), width=80)
    names = ["train_loss", "valid_loss", "grad_norm", "valid_loss/topic"]
    charts.plot(dict.fromkeys(names, FALLING), out, all_given=True)
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue().count("(step)") == 3
