"""The group `data`: look at data files, and write them anew."""

import typer

from training_backends.cli import cutting, inspection

__all__ = ["data"]

data = typer.Typer(
    help="Inspect, repair, split and shard data files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data.command()(inspection.inspect)
data.command()(cutting.repair)
data.command()(cutting.split)
data.command()(cutting.shard)
