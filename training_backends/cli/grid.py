"""Small sweeps: `launch --grid`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from training_backends.cli.consent import agreement, is_under_way, need_consent
from training_backends.cli.session import command, located, next_commands, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, Estimate, TrainingRun
    from training_backends.cli.exit_codes import Interrupted
    from training_backends.client.config_file import ConfigFile

__all__ = ["Cell", "Sweep", "read_grid"]

MOST_RUNS: Final = 64
"""More need a scheduler, which decides what to try next."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        values: The value of each field of the grid, as YAML.
    """

    run_id: str
    file: "ConfigFile"
    values: dict[str, str]


def read_grid(
    path: Path, overrides: Sequence[str], grid: Sequence[str], sweep_id: str
) -> list[Cell]:
    """Return the runs of a grid: the product of its values, the last field varying fastest.

    Raises:
        ConfigError: One of the configurations is invalid.
    """
    from training_backends.client.config_file import load_config

    fields: dict[str, list[str]] = {}
    for text in grid:
        name, values = _values(text)
        if name in fields:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--grid")
        fields[name] = values
    cells = [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]
    if len(cells) > MOST_RUNS:
        raise typer.BadParameter(
            f"these are {len(cells)} runs; at most {MOST_RUNS} are allowed", param_hint="--grid"
        )
    return [
        Cell(
            f"{sweep_id}-{number}",
            load_config(
                path,
                overrides,
                grid=[
                    *(f"{name}={value}" for name, value in values.items()),
                    f'tags.grid="{sweep_id}"',
                ],
            ),
            values,
        )
        for number, values in enumerate(cells, 1)
    ]


def _values(text: str) -> tuple[str, list[str]]:
    """Return a field and the YAML of each of its values, as `--set` takes it."""
    import yaml

    name, separator, given = text.partition("=")
    listed = f"[{given}]"
    try:
        node = yaml.compose(listed, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    values = [
        listed[each.start_mark.index : each.end_mark.index]
        for each in getattr(node, "value", ())
        if isinstance(each, yaml.Node)
    ]
    if not (separator and name.strip() and all(values) and values):
        raise typer.BadParameter(f"{text!r} is not FIELD=V1,V2", param_hint="--grid")
    return name.strip(), values


@dataclass
class Sweep:
    """Launches the runs of a grid, one after the other, after one confirmation of all costs.

    Attributes:
        again: Arguments of the command that continues it.
        current: Id of the run that is being launched.
        launched: The runs that are launched.
    """

    sweep_id: str
    cells: list[Cell]
    backend: str
    option: str | None
    again: list[str]
    yes: bool
    quiet: bool
    json: bool
    current: str = ""
    launched: "list[TrainingRun] | None" = None

    def run(self) -> "list[TrainingRun]":
        """Launch all runs that are not launched yet, and return all.

        Raises:
            BudgetExceeded: The sum of the estimates exceeds `budget.max_cost`, or the costs were
                not confirmed; nothing was started.
        """
        from training_backends import TrainingBackendError

        try:
            with located(self.cells[0].file, self.option):
                return with_client(self._launch, interrupted=self._interrupted)
        except TrainingBackendError as error:
            if self.launched:
                hint = f"{len(self.launched)} of {len(self.cells)} runs were launched. "
                hint += f"Continue: {command(*self.again)}"
                error.hint = f"{error.hint} {hint}" if error.hint else hint
            raise

    async def _launch(self, client: "AsyncTrainingClient") -> "list[TrainingRun]":
        from training_backends.cli.views.launch import LaunchView
        from training_backends.client.journal import LaunchWatch

        budget = self.cells[0].file.config.budget
        new = [cell for cell in self.cells if not await is_under_way(client, cell.run_id)]
        if new:
            need_consent(client, self.backend, new[0].file.config, yes=self.yes)
        expected = {
            cell.run_id: await client.estimate(cell.file, backend=self.backend) for cell in new
        }
        if new:
            subject = f"this sweep of {len(new)} runs" if new[1:] else "this run"
            ask = agreement(new[0].file.config, yes=self.yes, subject=subject)
            await LaunchWatch(confirm=ask).decide(_sum([*expected.values()]), budget)
        self.launched = []
        quotes: list[Estimate] = []
        for cell in self.cells:
            self.current = cell.run_id
            with LaunchView(quiet=self.quiet or self.json) as view:

                async def confirm(estimate: "Estimate", cell: Cell = cell) -> bool:
                    # The sum was confirmed; only a provider's higher quote is asked for again.
                    quotes.append(estimate)
                    budget.check(_sum(quotes))
                    if not _is_higher(estimate, expected.get(cell.run_id)):
                        return True
                    config = cell.file.config
                    return await view.asking(agreement(config, yes=self.yes))(estimate)

                run = await client.launch(
                    cell.file,
                    backend=self.backend,
                    run_id=cell.run_id,
                    on_progress=view.progress,
                    on_update=view.update,
                    on_notice=view.notice,
                    confirm=confirm,
                )
            self.launched.append(run)
            if not self.json:
                typer.echo(run.id)
                sys.stdout.flush()
        return self.launched

    def show(self, runs: "Sequence[TrainingRun]") -> None:
        """Print the values of each run, and the commands that show all of them."""
        from training_backends.cli.views.console import Column, show_table, stderr, write_json

        if self.json:
            document = [
                {"values": cell.values, **run.model_dump(mode="json")}
                for cell, run in zip(self.cells, runs, strict=True)
            ]
            write_json({"grid": self.sweep_id, "runs": document})
            return
        if self.quiet:
            return
        columns = [Column("run"), Column("status"), *map(Column, self.cells[0].values)]
        rows = [
            [run.id, run.status, *cell.values.values()]
            for cell, run in zip(self.cells, runs, strict=True)
        ]
        show_table(columns, rows, stderr())
        ids = [run.id for run in runs]
        lines = [f"List: {command('list', '--tag', f'grid={self.sweep_id}')}"]
        if len(ids) > 1:
            lines.append(f"Compare: {command('compare', *ids)}")
        if active := [run.id for run in runs if not run.status.is_terminal]:
            lines += next_commands(*active)[:1]
        for line in lines:
            stderr().print(f"  {line}", markup=False)

    def _interrupted(self) -> "Interrupted":
        from training_backends.cli.exit_codes import Interrupted

        count = len(self.launched or ())
        return Interrupted(
            f"Interrupted; {count} of {len(self.cells)} runs were launched and keep running.",
            hint=f"Continue: {command(*self.again)}",
            run_id=self.current or None,
        )


def _sum(estimates: "Sequence[Estimate]") -> "Estimate":
    """Return the cost of several runs; unknown if that of one is unknown."""
    from training_backends.core.estimate import CostItem, Estimate, PriceSource, add_up

    totals = [estimate.totals for estimate in estimates]
    if not all(totals):
        return Estimate()
    source = PriceSource(name="sum of all runs", as_of=date.today())  # noqa: DTZ011
    highest = add_up(money for estimate in estimates for money in estimate.highest_totals)
    amounts = add_up(money for total in totals for money in total)
    found = Estimate(
        costs=tuple(CostItem(name="runs", amount=money, source=source) for money in amounts)
    )
    if len(amounts) > 1 or highest == amounts:
        return found
    return found.model_copy(update={"cost_interval": (amounts[0], highest[0])})


def _is_higher(quote: "Estimate", expected: "Estimate | None") -> bool:
    if expected is None:
        return True
    known = {money.currency: money.amount for money in expected.totals}
    # An unknown price was confirmed as such.
    return bool(known) and any(
        money.amount > known.get(money.currency, 0) for money in quote.totals
    )
