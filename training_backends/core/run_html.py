"""A run as HTML, for notebooks."""

from collections.abc import Sequence
from html import escape
from typing import Any, Final

__all__ = ["run_html"]

_COLOURS: Final = {"completed": "#1a7f37", "failed": "#cf222e", "cancelled": "#6e7781"}
_IN_PROGRESS: Final = "#0969da"
_WIDTH, _HEIGHT = 160, 28
"""Pixels of the loss curve."""


def run_html(run: Any, losses: Sequence[float] | None = None) -> str:
    """Return a table with the status, the progress and the latest metrics of a `TrainingRun`.

    Without scripts and style sheets; every value is escaped.

    Args:
        losses: The loss at each step; None: at each checkpoint, as the run itself has it.
    """
    colour = _COLOURS.get(run.status, _IN_PROGRESS)
    rows = [
        ("status", f'<b style="color:{colour}">{escape(run.status)}</b>'),
        ("backend", escape(run.backend)),
        ("model", escape(run.config.model or "")),
    ]
    if run.step is not None:
        rows.append(("steps", _progress(run.step, run.total_steps)))
    rows += [(escape(name), f"{value:.6g}") for name, value in sorted(run.metrics.items())]
    title = "loss"
    if losses is None:
        title = "loss at checkpoints"
        losses = [it.metrics["train_loss"] for it in run.checkpoints if "train_loss" in it.metrics]
    if curve := _curve(losses):
        rows.append((title, curve))
    if run.result_model:
        rows.append(("result", _linked(run.result_uri, run.result_model)))
    if run.failure:
        rows.append(("failure", escape(run.failure.message)))
    if run.stale:
        rows.append(("out of date", escape(run.stale.message)))
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left">{name}</th>'
        f'<td style="text-align:left">{value}</td></tr>'
        for name, value in rows
        if value
    )
    caption = f'<caption style="text-align:left">run <code>{escape(run.id)}</code></caption>'
    return f"<table>{caption}{cells}</table>"


def _progress(step: int, total: int | None) -> str:
    if not total:
        return f"{step:,}"
    return f'<progress max="{total}" value="{min(step, total)}"></progress> {step:,} / {total:,}'


def _curve(values: Sequence[float]) -> str:
    """Return a line through the values as SVG; empty with fewer than two."""
    if len(values) < 2:
        return ""
    lowest, highest = min(values), max(values)
    spread = (highest - lowest) or 1.0
    points = " ".join(
        f"{_WIDTH * at / (len(values) - 1):.1f},{_HEIGHT * (highest - value) / spread:.1f}"
        for at, value in enumerate(values)
    )
    label = f"loss from {values[0]:.4g} to {values[-1]:.4g}"
    return (
        f'<svg role="img" aria-label="{label}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}"><polyline points="{points}" fill="none" '
        f'stroke="{_IN_PROGRESS}" stroke-width="1.5"/></svg>'
    )


def _linked(uri: str | None, name: str) -> str:
    if uri and uri.startswith(("https://", "http://")):
        return f'<a href="{escape(uri, quote=True)}" rel="noopener">{escape(name)}</a>'
    return escape(name)
