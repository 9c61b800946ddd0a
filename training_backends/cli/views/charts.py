"""Metrics of a run as CSV and as charts in the terminal."""

import csv
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from typing import TYPE_CHECKING, Final

from rich.console import Console

from training_backends.cli.views.console import write
from training_backends.core.errors import ConfigError, Issue
from training_backends.core.escape import escape_controls

if TYPE_CHECKING:
    from training_backends.store import MetricPoint

__all__ = ["Series", "by_name", "chart", "choose", "plot", "plot_together", "write_csv"]

Series = Mapping[int, float]
"""A metric's values by step."""

_FORCE: Final = "FORCE_COLOR"
_SHOWN: Final = ("train_loss", "valid_loss", "valid_mean_token_accuracy")
"""Metrics drawn by default."""
_COLOURS: Final = ("bright_blue", "bright_yellow", "bright_green", "bright_magenta")
_SIGNS: Final = "*o+x"
_AXIS: Final = 23
"""Columns that plotille needs beside the plot: the y axis and the label of the x axis."""
_WIDEST, _NARROWEST, _HEIGHT = 120, 20, 12
_WITHOUT_TERMINAL: Final = 80


def by_name(points: "Iterable[MetricPoint]") -> dict[str, dict[int, float]]:
    """Group points by metric; the last value of a step wins."""
    found: dict[str, dict[int, float]] = {}
    for point in points:
        found.setdefault(point.name, {})[point.step] = point.value
    return found


def choose(series: Mapping[str, Series], names: Sequence[str]) -> dict[str, Series]:
    """Return the named metrics in the order given, or all of them if none are named.

    Raises:
        ConfigError: The run has no metric with one of these names.
    """
    for name in names:
        if name not in series:
            known = ", ".join(series) or "none"
            fix = f"available: {known}"
            issue = Issue(code="unknown_metric", message=f"no metric {name!r}", fix=fix)
            raise ConfigError(f"The run has no metric {name!r}.", issues=[issue])
    return {name: series[name] for name in names or series}


def write_csv(series: Mapping[str, Series]) -> None:
    """Write one row per step to standard output; missing values are empty."""
    text = StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["step", *map(escape_controls, series)])
    for step in sorted({step for values in series.values() for step in values}):
        out.writerow([step, *(values.get(step, "") for values in series.values())])
    write(text.getvalue())


def plot(series: Mapping[str, Series], out: Console, *, all_given: bool) -> None:
    """Draw one chart per measure, as wide as the terminal; train and validation share a chart.

    Args:
        all_given: Draw all metrics; otherwise the losses and the accuracy, if present.
    """
    shown = series if all_given else {name: series[name] for name in _SHOWN if name in series}
    if not shown:
        shown = series
    for names in _together(shown):
        _draw({name: shown[name] for name in names}, out)


def plot_together(series: Mapping[str, Series], out: Console) -> None:
    """Draw one metric of several runs in one chart."""
    if series:
        _draw(series, out)


def _draw(series: Mapping[str, Series], out: Console) -> None:
    width = min(out.width if out.is_terminal else _WITHOUT_TERMINAL, _WIDEST) - _AXIS
    coloured = out.is_terminal and not out.no_color
    with _colours(coloured):
        text = chart(
            series,
            width=max(width, _NARROWEST),
            coloured=coloured,
            plain=not _can_show_dots(out),
        )
    write(f"{text}\n\n", out.file)


@contextmanager
def _colours(wanted: bool) -> Iterator[None]:
    """Force colors in plotille, which asks standard output for them, not the console."""
    before = os.environ.get(_FORCE)
    if wanted:
        os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FORCE, None)
        else:
            os.environ[_FORCE] = before


def _can_show_dots(out: Console) -> bool:
    try:
        "\u28ff".encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _together(names: Collection[str]) -> list[list[str]]:
    """Group training and validation values of the same measure."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.removeprefix("train_").removeprefix("valid_"), []).append(name)
    return list(found.values())


def chart(series: Mapping[str, Series], *, width: int, coloured: bool, plain: bool) -> str:
    """Draw metrics by step, below a legend with the last value of each.

    Args:
        width: Columns of the plot, without the axis.
        plain: Use ASCII only.
    """
    import plotille

    figure = plotille.Figure()
    figure.width, figure.height = width, _HEIGHT
    figure.color_mode, figure.with_colors = "names", coloured
    figure.origin = False
    figure.x_label, figure.y_label = "step", ""
    first, last = _span(step for values in series.values() for step in values)
    low, high = _span(value for values in series.values() for value in values.values())
    figure.set_x_limits(min_=first, max_=last)
    figure.set_y_limits(min_=low, max_=high)
    digits = 0 if last - first > width // 10 else 1
    figure.x_ticks_fkt = lambda tick, _: f"{tick:.{digits}f}"
    figure.y_ticks_fkt = lambda tick, _: f"{tick:>10.4g}"
    names = []
    for (name, values), colour, sign in zip(
        series.items(), cycle(_COLOURS), cycle(_SIGNS), strict=False
    ):
        steps = sorted(values)
        lone = plain or len(steps) == 1
        figure.plot(
            steps,
            [values[step] for step in steps],
            lc=colour,
            marker=sign if lone else None,
            interp=None if plain else "linear",
        )
        label = f"{sign if lone else '―'} {escape_controls(name)} {values[steps[-1]]:.6g}"
        names.append(plotille.color(label, fg=colour, mode="names", no_color=not coloured))
    # Drop the first line, the arrow of an unlabelled axis, and turn blank Braille into spaces.
    _, _, drawn = str(figure.show()).partition("\n")
    text = "  ".join(names) + "\n" + drawn.replace("\u2800", " ")
    return "\n".join(line.rstrip() for line in text.splitlines())


def _span(numbers: Iterable[float]) -> tuple[float, float]:
    """Return the minimum and maximum, widened if they are equal."""
    found = list(numbers)
    least, most = min(found), max(found)
    return (least, most) if most > least else (least, least + (abs(least) or 1.0))
