"""The program `training-backends`: its commands, and how errors become exit codes."""

import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from training_backends import __version__
from training_backends.cli import check, data, doctor, keys, quickstart, runs, serve
from training_backends.cli.exit_codes import ExitCode, Interrupted, UsageError, exit_code_of
from training_backends.core.errors import TrainingBackendError
from training_backends.core.escape import escape_controls

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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tuning that outlives the provider: one interface, any backend."""
    del version
    if context.invoked_subcommand and "--help" not in sys.argv and "-h" not in sys.argv:
        _say_what_is_ignored()


def _say_what_is_ignored() -> None:
    with suppress(OSError):
        if not Path(".env").is_file():
            return
        # The import takes time, so only where there is such a file.
        from training_backends.core.settings import ignored_variables

        if names := ignored_variables():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            typer.echo(f"note: .env in this directory is not read; ignored: {shown}", err=True)


app.command()(quickstart.quickstart)
app.command()(check.backends)
app.command()(check.validate)
app.command()(check.estimate)
app.command()(runs.launch)
app.command(name="list")(runs.list_runs)
app.command()(runs.status)
app.command()(runs.logs)
app.command()(runs.metrics)
app.command()(runs.wait)
app.command()(runs.stop)
app.command()(runs.resume)
app.command()(runs.download)
app.command()(runs.sample)
app.command()(runs.delete)
app.add_typer(data.data, name="data")
app.add_typer(keys.credentials, name="credentials")
app.command()(serve.serve)
app.add_typer(keys.keys, name="keys")
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line and end the process with the documented exit code."""
    try:
        code = app(standalone_mode=False)
        # While a full disk can still be reported.
        _flush()
        if code == ExitCode.INTERRUPTED:
            _end(Interrupted("Interrupted."))  # typer made a return value of it
    except TrainingBackendError as error:
        _end(error)
    except typer.TyperException as error:
        _end(_wrong_usage(error), shown=True)
    except (KeyboardInterrupt, typer.Abort):
        # Before anything was asked of a backend.
        _end(Interrupted("Interrupted."))
    except Exception as error:
        _end(_unexpected(error))
    sys.exit(code)


def _flush() -> None:
    with suppress(BrokenPipeError):
        if sys.stdout:
            sys.stdout.flush()


def _end(error: TrainingBackendError, *, shown: bool = False) -> NoReturn:
    from training_backends.cli.views.render import error_document, show_error, write_json_line
    from training_backends.core.redaction import redact, redact_value, register_environment

    # A key that was typed in the wrong place is not repeated.
    register_environment()
    error.message = redact(error.message)
    error.hint = error.hint and redact(error.hint)
    code = exit_code_of(error)
    # Where nothing can be written any more, the exit code still says it.
    if "--json" in sys.argv[1:]:
        # On one line, so that it is also a good last line of a stream.
        with suppress(OSError):
            write_json_line(redact_value(error_document(error, code)))
    # Last, because rich exits and closes standard output where nobody reads standard error.
    with suppress(OSError, SystemExit):
        if isinstance(error, Interrupted):
            # Below the ^C that the terminal has written.
            typer.echo(f"\n{escape_controls(error.message)}", err=True)
        elif not shown:
            show_error(error)
    raise SystemExit(code)


def _wrong_usage(error: Any) -> TrainingBackendError:
    """Show what is wrong with the command line, the usage line included; no key typed there."""
    from training_backends.core.redaction import redact, register_environment

    register_environment()
    error.message = redact(str(error.message))
    shown = StringIO()
    error.show(shown)
    # typer escapes the arguments that it quotes itself; this is for the messages of our commands.
    typer.echo(escape_controls(shown.getvalue(), keep="\n"), nl=False, err=True)
    return UsageError(error.format_message(), hint="--help shows what a command takes.")


def _unexpected(error: Exception) -> TrainingBackendError:
    """Say what nobody has foreseen without a traceback; the log has that, for debugging."""
    from training_backends.core.logging import configure_logs, get_logger, redact
    from training_backends.core.settings import Settings, load_settings

    with suppress(TrainingBackendError):
        settings = load_settings(Settings)
        configure_logs(log_format=settings.log_format, level=settings.log_level)
        get_logger().debug("unexpected_error", exc_info=error)
    text = redact(str(error)) or "no more is known"
    if isinstance(error, OSError):
        return TrainingBackendError(
            f"The system refused: {text}",
            hint="Check the disk and the permissions of what is named.",
        )
    return TrainingBackendError(
        f"Something unexpected happened: {type(error).__name__}: {text}",
        hint="This is a fault of the program. With TRAINING_BACKENDS_LOG_LEVEL=debug it shows "
        "where; please report it with that.",
    )
