"""The program `training-backends`: its commands, and how errors become exit codes."""

import sys
from typing import Annotated

import typer

from training_backends import __version__
from training_backends.cli import access, plan, quickstart, runs, serve
from training_backends.cli.exit_codes import ExitCode, exit_code_of
from training_backends.core.errors import TrainingBackendError

__all__ = ["app", "main"]

# Plain help: rendering it with rich would cost more than all the rest of `--help`.
app = typer.Typer(
    name="training-backends",
    help="Fine-tuning that outlives the provider: one interface, any backend.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"training-backends {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tuning that outlives the provider: one interface, any backend."""


app.command()(quickstart.quickstart)
app.command()(plan.backends)
app.command()(plan.validate)
app.command()(plan.estimate)
app.command()(runs.launch)
app.command(name="list")(runs.list_runs)
app.command()(runs.status)
app.command()(runs.logs)
app.command()(runs.wait)
app.command()(runs.stop)
app.command()(runs.resume)
app.command()(runs.download)
app.command()(runs.delete)
app.add_typer(access.credentials, name="credentials")
app.command()(serve.serve)
app.add_typer(access.keys, name="keys")


def main() -> None:
    """Run the command line and end the process with the documented exit code."""
    try:
        app()
    except TrainingBackendError as error:
        from training_backends.cli.render import show_error

        code = exit_code_of(error)
        show_error(error, code, as_json="--json" in sys.argv[1:])
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None
