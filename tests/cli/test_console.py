"""Tables, fields and units: fitted to a terminal, complete in a pipe."""

import io
from collections.abc import Callable
from datetime import timedelta

import pytest
from rich.console import Console

from training_backends import Money, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.cli.views.console import (
    Column,
    ago,
    metric_text,
    money_text,
    show_fields,
    show_table,
    time_text,
)
from training_backends.cli.views.render import show_log_record, show_metrics, show_run, show_runs
from training_backends.core.run import LogRecord, utc_now
from training_backends.store import MetricPoint

COLUMNS = (Column("id"), Column("model", drop=1, cut=True), Column("backend", drop=2))
ROW = ("261130-053525-e4bd47", "mistralai/Ministral-3-3B-Base-2512", "local")


def shown(show: Callable[[Console], object], width: int | None) -> list[str]:
    """Return the lines printed to a terminal of a width, or to a pipe for None."""
    out = Console(
        file=io.StringIO(),
        force_terminal=width is not None,
        width=width,
        soft_wrap=True,
        color_system=None,
    )
    show(out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


@pytest.mark.parametrize(
    ("width", "row"),
    [
        (None, "261130-053525-e4bd47  mistralai/Ministral-3-3B-Base-2512  local"),
        (80, "261130-053525-e4bd47  mistralai/Ministral-3-3B-Base-2512  local"),
        (60, "261130-053525-e4bd47  mistralai/Ministral-3-3B-Base-2512"),
        (40, "261130-053525-e4bd47  mistralai/Ministr…"),
        (24, "261130-053525-e4bd47"),
    ],
)
def test_a_narrow_table_loses_its_least_valuable_columns(width: int | None, row: str) -> None:
    """The highest `drop` goes first, a column is cut before it goes, an id never."""
    assert shown(lambda out: show_table(COLUMNS, [ROW], out), width)[1] == row


def test_a_table_names_the_columns_that_it_dropped() -> None:
    """A caller may say where to find them; a column without content is not missed."""
    out = Console(file=io.StringIO(), force_terminal=True, width=24)
    assert show_table(COLUMNS, [ROW], out) == ["backend", "model"]
    assert show_table(COLUMNS, [("a", "b", "")], out) == []


def test_fields_are_wrapped_between_words_on_a_terminal_only() -> None:
    """A pipe gets one line per field, and a word that is too long stays in one piece."""
    rows = [("note", "one two three four"), ("empty", ""), ("result", "ft:a-long-model-name")]
    assert shown(lambda out: show_fields(rows, out), 20) == [
        "  note    one two",
        "          three four",
        "  result  ft:a-long-model-name",
    ]
    assert len(shown(lambda out: show_fields(rows, out), None)) == 2


@pytest.mark.parametrize(
    ("age", "text"),
    [
        ({"seconds": 9}, "9s ago"),
        ({"minutes": 6, "seconds": 30}, "6m ago"),
        ({"hours": 5}, "5h ago"),
        ({"days": 3, "hours": 4}, "3d ago"),
        ({"seconds": -60}, "just now"),
    ],
)
def test_ages_are_given_in_their_largest_unit(age: dict[str, float], text: str) -> None:
    """A clock that is ahead makes no negative age."""
    moment = utc_now() - timedelta(**age)
    assert ago(moment) == text
    assert time_text(moment).startswith(f"{text} (2")
    assert time_text(None) == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("train_loss", 0.0394512345, "0.03945"),
        ("learning_rate", 2.9064e-05, "2.906e-05"),
        ("memory_bytes", 669_800_000.0, "669.8 MB"),
        ("memory_bytes", 1_200_000_000.0, "1.2 GB"),
        ("tokens_per_second", 1497.6, "1,498"),
        ("train_loss", float("nan"), "nan"),
        ("memory_bytes", float("inf"), "inf"),
    ],
)
def test_metrics_are_rounded_and_have_units(name: str, value: float, text: str) -> None:
    """4 significant digits, separated thousands, decimal bytes."""
    assert metric_text(name, value) == text


def test_dollars_are_written_with_their_sign() -> None:
    """Other currencies keep their code."""
    assert money_text(Money.model_validate("3.2 USD")) == "$3.20"
    assert money_text(Money.model_validate("3.2 CHF")) == "3.20 CHF"


def test_log_records_have_a_date_where_it_is_needed() -> None:
    """A file gets the date and zone; a terminal the date of any day but today."""
    at = utc_now()
    now, old = (
        LogRecord(at=moment, source="status", message="running", cursor="1")
        for moment in (at, at - timedelta(days=2))
    )
    stamp = at.astimezone().isoformat(timespec="seconds")
    assert shown(lambda out: show_log_record(now, out), None) == [f"{stamp} status     running"]
    assert shown(lambda out: show_log_record(old, out), 80)[0].startswith("20")
    assert len(shown(lambda out: show_log_record(now, out), 80)[0].split()[0]) in {8, 10}


@pytest.fixture
def runs(make_config: Callable[..., TrainingConfig]) -> list[TrainingRun]:
    """Runs with the longest words that the tool itself makes."""
    config = make_config(model="mistralai/Ministral-3-3B-Base-2512")
    return [
        TrainingRun(
            id=f"261130-05352{number}-e4bd47",
            backend="mistral",
            config=config,
            status=status,
            raw_status=status.upper(),
            step=123_456,
            total_steps=200_000,
            created_at=utc_now() - timedelta(minutes=6),
        )
        for number, status in enumerate((TrainingStatus.INITIALIZING, TrainingStatus.COMPLETED))
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_runs_fit_the_terminal(runs: list[TrainingRun], width: int) -> None:
    """The id and the status are complete at any width."""
    lines = shown(lambda out: show_runs(runs, {}, out=out), width)
    assert max(map(len, lines)) <= width
    for run, line in zip(runs, lines[1:], strict=True):
        assert line.startswith(f"{run.id}  {run.status} ")
        assert "6m ago" in line


def test_piped_runs_are_complete(runs: list[TrainingRun]) -> None:
    """Nothing is cut where no terminal limits it, however long it is."""
    config = runs[0].config.model_copy(update={"model": "m" * 300})
    long = runs[0].model_copy(update={"config": config})
    lines = shown(lambda out: show_runs([long], {}, out=out), None)
    assert "m" * 300 in lines[1]
    assert lines[1].endswith("6m ago")


def test_a_run_is_not_described_twice(runs: list[TrainingRun]) -> None:
    """The provider's word and id are shown only if they tell something new."""
    run = runs[1].model_copy(update={"remote_id": runs[1].id})
    lines = shown(lambda out: show_run(run, out), 80)
    assert lines[0] == f"{run.id}  completed"
    assert not any("provider job id" in line for line in lines)
    other = run.model_copy(update={"raw_status": "SUCCESS", "remote_id": "job-1"})
    lines = shown(lambda out: show_run(other, out), 80)
    assert lines[0] == f"{run.id}  completed (SUCCESS)"
    assert any(line.split() == ["provider", "job", "id", "job-1"] for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_metrics_fit_the_terminal(
    runs: list[TrainingRun], width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses stay; a note on standard error names what has no room."""
    names = ("memory_bytes", "tokens_per_second", "grad_norm", "learning_rate", "train_loss")
    points = [
        MetricPoint(name=name, step=step, value=123_456.789, at=utc_now())
        for step in (1, 1000)
        for name in (*names, "valid_loss", "valid_mean_token_accuracy")
    ]
    lines = shown(lambda out: show_metrics(points, runs[0], out=out), width)
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:3] == ["step", "train_loss", "valid_loss"]
    assert ("no room for" in capsys.readouterr().err) is (width < 120)
