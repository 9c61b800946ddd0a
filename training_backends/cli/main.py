"""Entry point of the `training-backends` program: commands, error output and exit codes."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.main import get_command

from training_backends import __version__
from training_backends.cli import (
    check,
    compare,
    data,
    doctor,
    evaluate,
    keys,
    launch,
    port,
    projects,
    quickstart,
    runs,
    serve,
)
from training_backends.cli.exit_codes import (
    ExitCode,
    Interrupted,
    PipeClosed,
    UsageError,
    exit_code_of,
)
from training_backends.core.errors import TrainingBackendError
from training_backends.core.escape import escape_controls

__all__ = ["app", "main"]

_FEW_COLLECTIONS: Final = 50_000
"""Objects; a tenth of a command's time is saved compared with Python's 700."""

# Plain help: importing rich would take longer than the rest of `--help`.
app = typer.Typer(
    name="training-backends",
    help="Fine-tune language models through one interface, on any backend.",
    no_args_is_help=True,
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
    """Fine-tune language models through one interface, on any backend."""
    del version
    if context.invoked_subcommand and "--help" not in sys.argv and "-h" not in sys.argv:
        _warn_about_dotenv()


def _warn_about_dotenv() -> None:
    with suppress(OSError):
        if not Path(".env").is_file():
            return
        # Imported only if the file exists, to keep startup fast.
        from training_backends.core.settings import ignored_variables

        if names := ignored_variables():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            typer.echo(f"note: .env files are not read; ignored: {shown}", err=True)


app.command()(quickstart.quickstart)
app.command()(check.backends)
app.command()(check.init)
app.command()(check.validate)
app.command()(check.estimate)
app.command()(port.port)
app.command()(launch.launch)
app.command(name="list")(runs.list_runs)
app.command()(runs.status)
app.command()(runs.logs)
app.command()(runs.metrics)
app.command()(compare.compare)
app.command()(runs.checkpoints)
app.command()(runs.wait)
app.command()(runs.stop)
app.command()(runs.pause)
app.command()(launch.resume)
app.command()(runs.download)
app.command()(runs.push)
app.command()(runs.generate)
app.command(name="eval")(evaluate.evaluate)
app.command()(runs.delete)
app.add_typer(data.data, name="data")
app.add_typer(keys.credentials, name="credentials")
app.command()(serve.serve)
app.add_typer(keys.keys, name="keys")
app.add_typer(projects.projects, name="projects")
app.add_typer(projects.audit, name="audit")
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line and exit with the documented exit code."""
    # What a command imports stays, and collections would search it again and again.
    gc.set_threshold(_FEW_COLLECTIONS)
    try:
        code = _command()(standalone_mode=False, complete_var="_TRAINING_BACKENDS_COMPLETE")
        # Here, so that a full disk is still reported.
        _flush()
        if code == ExitCode.INTERRUPTED:
            _end(Interrupted("Interrupted."))  # typer returns the code instead of raising
    except TrainingBackendError as error:
        _end(error)
    except typer.TyperException as error:
        _end(_wrong_usage(error), shown=True)
    except (KeyboardInterrupt, typer.Abort):
        # Before any request to a backend.
        _end(Interrupted("Interrupted."))
    except PipeClosed:
        code = ExitCode.DONE
        _flush()
    except Exception as error:
        _end(_unexpected(error))
    sys.exit(code)


@cache
def _command() -> Callable[..., Any]:
    """Build the command from the annotations of all functions, once."""
    return get_command(app)


def _flush() -> None:
    """Flush standard output, or discard it if the reader has gone."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise the interpreter would report what it cannot flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: TrainingBackendError, *, shown: bool = False) -> NoReturn:
    from training_backends.cli.views.console import write_json_line
    from training_backends.cli.views.render import error_document, show_error
    from training_backends.core.redaction import redact, redact_value, register_environment

    # The message may quote a key that was typed as the wrong argument.
    register_environment()
    error.message = redact(error.message)
    error.hint = error.hint and redact(error.hint)
    code = exit_code_of(error)
    # If nothing can be written, the exit code still reports the error.
    if "--json" in sys.argv[1:]:
        # On one line, so that it is also a valid last line of a JSON stream.
        with suppress(OSError, PipeClosed):
            write_json_line(redact_value(error_document(error, code)))
    with suppress(OSError):
        _flush()
    # Last, because rich exits and closes standard output if standard error is a closed pipe.
    with suppress(OSError, SystemExit):
        if isinstance(error, Interrupted):
            # Start a new line after the ^C echoed by the terminal.
            typer.echo(f"\n{escape_controls(error.message)}", err=True)
            for line in (error.hint or "").splitlines():
                typer.echo(f"  {escape_controls(line)}", err=True)
        elif not shown:
            show_error(error)
    raise SystemExit(code)


def _wrong_usage(error: Any) -> TrainingBackendError:
    """Print a usage error with the usage line, keys redacted, and return it as our own error."""
    from training_backends.core.redaction import redact, register_environment

    register_environment()
    # pydantic, which typer validates choices with, puts the kind of an error before its text.
    error.message = redact(str(error.message).removeprefix("Value error, "))
    shown = StringIO()
    error.show(shown)
    # typer escapes the arguments that it quotes itself; this covers messages of our commands.
    typer.echo(escape_controls(shown.getvalue(), keep="\n"), nl=False, err=True)
    return UsageError(error.format_message(), hint="Run the command with --help for its usage.")


def _unexpected(error: Exception) -> TrainingBackendError:
    """Convert an unexpected exception into an error message; log the traceback at debug level."""
    from training_backends.core.logging import configure_logs, get_logger, redact
    from training_backends.core.settings import Settings, load_settings

    with suppress(TrainingBackendError):
        settings = load_settings(Settings)
        configure_logs(log_format=settings.log_format, level=settings.log_level)
        get_logger().debug("unexpected_error", exc_info=error)
    text = redact(str(error)) or "no details available"
    if isinstance(error, OSError):
        return TrainingBackendError(
            f"Operating system error: {text}",
            hint="Check free disk space and file permissions.",
        )
    return TrainingBackendError(
        f"Unexpected error: {type(error).__name__}: {text}",
        hint="This is a bug; please report it with the output of the same command under "
        "TRAINING_BACKENDS_LOG_LEVEL=debug.",
    )
