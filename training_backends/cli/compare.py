"""The `compare` command."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.completion import complete_run
from training_backends.cli.session import (
    CachedOption,
    JsonOption,
    complete_id,
    refreshed,
    with_client,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training_backends import AsyncTrainingClient, Metrics, TrainingRun

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN", help="Run ids, or unique prefixes.", autocompletion=complete_run
        ),
    ],
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="METRIC", help="Draw a metric of all runs, such as train_loss."
        ),
    ] = None,
    cached: CachedOption = False,
    json: JsonOption = False,
) -> None:
    """Show how runs differ in configuration, status and metrics."""
    from training_backends.cli.views import charts
    from training_backends.cli.views.console import stdout, write_json
    from training_backends.cli.views.render import show_age, show_comparison

    if len({*runs}) < 2:
        raise typer.BadParameter("give at least two runs", param_hint="RUN")

    async def read(
        client: "AsyncTrainingClient",
    ) -> "tuple[Mapping[str, str] | None, list[TrainingRun], list[Metrics]]":
        ids = list(dict.fromkeys([await complete_id(client, run) for run in runs]))
        missed = await refreshed(client, *ids, cached=cached)
        found = [await client.get(run_id) for run_id in ids]
        names = None if plot is None else [plot]
        drawn = [await client.metrics(run_id, names=names) for run_id in ids] if plot else []
        return missed, found, drawn

    missed, found, drawn = with_client(read)
    show_age(found, missed)
    rows = _differences(found)
    if json:
        document: dict[str, Any] = {"runs": [run.id for run in found], "differences": rows}
        if plot:
            document["metric"] = plot
            document["series"] = [{point.step: point.value for point in each} for each in drawn]
        write_json(document)
        return
    show_comparison([run.id for run in found], rows)
    if plot:
        series = {
            run.id: {point.step: point.value for point in each}
            for run, each in zip(found, drawn, strict=True)
            if each
        }
        charts.plot_together(series, stdout())


def _differences(found: "list[TrainingRun]") -> dict[str, list[Any]]:
    """Return what differs, by dotted name, with a value for each run; metrics are all shown."""
    configs = [_flat(run.config.model_dump(mode="json", exclude_defaults=True)) for run in found]
    rows: dict[str, list[Any]] = {
        name: [config.get(name) for config in configs]
        for name in dict.fromkeys(name for config in configs for name in config)
    }
    rows["backend"] = [run.backend for run in found]
    rows["status"] = [run.status.value for run in found]
    rows["step"] = [run.step for run in found]
    rows = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    for name in sorted({name for run in found for name in run.metrics}):
        rows[name] = [run.metrics.get(name) for run in found]
    return rows


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the values of a JSON document by their dotted names."""
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else key, each) for key, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        parts = [(f"{name}.{number}", each) for number, each in enumerate(value)]
    else:
        return {name: value}
    return {key: each for part, inner in parts for key, each in _flat(inner, part).items()}
