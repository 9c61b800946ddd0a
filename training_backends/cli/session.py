"""Shared setup of all commands: options, settings, logging, client and Ctrl-C handling."""

import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from training_backends.cli.completion import complete_backend, complete_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training_backends import AsyncTrainingClient, BackendRetired, TrainingConfig, TrainingRun
    from training_backends.cli.exit_codes import Interrupted
    from training_backends.client.config_file import ConfigFile

__all__ = [
    "BackendOption",
    "CachedOption",
    "ConfigArgument",
    "ExactRunArgument",
    "JsonOption",
    "RunArgument",
    "SetOption",
    "add_ways_on",
    "backend_of",
    "command",
    "complete_id",
    "exit_with",
    "keeps_running",
    "located",
    "next_commands",
    "refreshed",
    "run_async",
    "short_path",
    "with_client",
]

T = TypeVar("T")

_REFRESH: Final = 5.0
"""Seconds that commands which show runs wait for a backend."""

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML configuration of the run.")
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run id, or a unique prefix.", autocompletion=complete_run),
]
ExactRunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run id (prefixes are not accepted).", autocompletion=complete_run
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="Backend; default: the one in CONFIG.",
        autocompletion=complete_backend,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of CONFIG (repeatable)."),
]
CachedOption = Annotated[
    bool, typer.Option("--cached", help="Use stored data; do not contact the backend.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def run_async(
    work: Callable[[], Awaitable[T]],
    *,
    interrupted: "Callable[[], Interrupted] | None" = None,
) -> T:
    """Run `work` in an event loop with logging configured.

    Args:
        interrupted: Returns the error that is raised on Ctrl-C; default: a plain `Interrupted`.
    """
    import anyio

    from training_backends.cli.exit_codes import Interrupted
    from training_backends.core.logging import configure_logs
    from training_backends.core.settings import Settings, load_settings

    settings = load_settings(Settings)
    configure_logs(log_format=settings.log_format, level=settings.log_level)
    try:
        return anyio.run(work)
    except BaseExceptionGroup as group:
        raise _only(group) from None
    except (KeyboardInterrupt, typer.Abort):
        raise (interrupted() if interrupted else Interrupted("Interrupted.")) from None


def with_client(
    work: "Callable[[AsyncTrainingClient], Awaitable[T]]",
    *,
    interrupted: "Callable[[], Interrupted] | None" = None,
) -> T:
    """Run `work` with a client and close the client afterwards; see `run_async`."""

    async def run() -> T:
        from training_backends import AsyncTrainingClient
        from training_backends.cli.vault import terminal_vault

        async with AsyncTrainingClient(credentials=terminal_vault()) as client:
            return await work(client)

    return run_async(run, interrupted=interrupted)


def command(*arguments: str) -> str:
    """Return a command line of this program, to be pasted into the same shell."""
    started = Path(sys.argv[0])
    if started.name != "training-backends":
        program = "python -m training_backends"
    elif (found := which(started.name)) and started in {Path(started.name), Path(found)}:
        program = started.name
    else:
        program = shlex.quote(str(short_path(started.absolute())))
    return f"{program} {shlex.join(arguments)}"


def short_path(path: Path) -> Path:
    """Return the path relative to the working directory if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def next_commands(*run_ids: str) -> list[str]:
    """Return one line per command that follows, shows or stops active runs."""
    if len(run_ids) > 1:
        follow = {"Wait": command("wait", *run_ids)}
    else:
        follow = {
            "Follow": command("logs", *run_ids, "--follow"),
            "Status": command("status", *run_ids),
        }
    stop = [f"Stop: {command('stop', run_id)}" for run_id in run_ids]
    return [*(f"{name}: {line}" for name, line in follow.items()), *stop]


def keeps_running(*run_ids: str) -> "Interrupted":
    """Return the error for Ctrl-C in a command that follows runs."""
    from training_backends.cli.exit_codes import Interrupted

    if len(run_ids) != 1:
        text = "Interrupted; the runs keep running."
        return Interrupted(text, hint="\n".join(next_commands(*run_ids)))
    (run_id,) = run_ids
    hint = "\n".join(next_commands(run_id))
    return Interrupted(f"Interrupted; run {run_id} keeps running.", hint=hint, run_id=run_id)


@contextmanager
def located(file: "ConfigFile", backend: str | None) -> Iterator[None]:
    """Add the file and line of the configuration to a backend's issues.

    The hint for a retired backend names the backends that can run the configuration instead.
    """
    from training_backends import BackendRetired, ConfigError

    try:
        yield
    except BackendRetired as error:
        add_ways_on(error, str(file.path), file.config, backend or file.backend or "")
        raise
    except ConfigError as error:
        # A backend given with --backend has no line in the file.
        if backend is None or all(issue.field != "backend" for issue in error.issues):
            error.issues = tuple(file.located(error.issues))
        raise


def add_ways_on(
    error: "BackendRetired", given: str, config: "TrainingConfig", backend: str
) -> None:
    """Add the commands that convert a configuration to another installed backend to the hint.

    Args:
        given: The configuration file or run, as on the command line.
    """
    from training_backends.client.port import backends_for

    names = with_client(lambda client: backends_for(client, config, source=backend))
    if names:
        commands = ", ".join(f"`{command('port', given, '--to', name)}`" for name in names)
        ways = f"Convert it to another backend: {commands}."
        error.hint = f"{error.hint} {ways}" if error.hint else ways


async def complete_id(client: "AsyncTrainingClient", given: str) -> str:
    """Return the run id that equals `given` or is the only one to start with it.

    Only for read-only commands: a prefix may match another run tomorrow.

    Raises:
        RunNotFound: No run matches, or several do.
    """
    from training_backends import RunNotFound

    try:
        return (await client.get(given)).id
    except RunNotFound as error:
        if len(error.candidates) == 1:
            return error.candidates[0]
        if not error.candidates:
            raise
        raise RunNotFound(
            f"{given!r} matches several runs: {', '.join(error.candidates)}.",
            candidates=error.candidates,
            hint="Use a longer prefix or the complete id.",
            run_id=given,
        ) from None


async def refreshed(
    client: "AsyncTrainingClient", *run_ids: str, backend: str | None = None, cached: bool
) -> "Mapping[str, str] | None":
    """Refresh live runs, or return None with `cached`; see `AsyncTrainingClient.refresh`.

    Waits a limited time for each backend; an unreachable backend is not an error.
    """
    if cached:
        return None
    return await client.refresh(*run_ids, backend=backend, timeout=_REFRESH)


def backend_of(file: "ConfigFile", option: str | None) -> str:
    """Return the backend given on the command line or in the file.

    Raises:
        ConfigError: Neither names a backend.
    """
    from training_backends import ConfigError, Issue

    backend = option or file.backend
    if backend is None:
        issue = Issue(
            code="missing",
            message="no backend given",
            path=str(file.path),
            field="backend",
            fix="add `backend: local` to the file, or pass --backend",
        )
        raise ConfigError(f"No backend is set in {file.path}.", issues=[issue])
    return backend


def exit_with(run: "TrainingRun") -> None:
    """Exit with the code of the run's status; an active run is not a failure."""
    from training_backends.cli.exit_codes import exit_code_of_status

    if code := exit_code_of_status(run.status):
        raise typer.Exit(code)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the only error inside nested groups, or the group if it has several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
