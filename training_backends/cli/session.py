"""What every command does around its own work: settings, logs, client, Ctrl-C."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training_backends import AsyncTrainingClient
    from training_backends.client.config_file import ConfigFile

__all__ = [
    "BackendOption",
    "CachedOption",
    "ConfigArgument",
    "ExactRunArgument",
    "JsonOption",
    "RunArgument",
    "SetOption",
    "backend_of",
    "complete_id",
    "located",
    "refreshed",
    "run_async",
    "with_client",
]

T = TypeVar("T")

_REFRESH: Final = 5.0
"""Seconds for which a command that shows runs waits for a backend."""

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run id, or a unique prefix of it.")
]
ExactRunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Complete run id.")]
BackendOption = Annotated[
    str | None, typer.Option("--backend", "-b", help="Backend; default the one in CONFIG.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of CONFIG; repeatable."),
]
CachedOption = Annotated[
    bool, typer.Option("--cached", help="Show what was last seen; ask no backend.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")
]


def run_async(
    work: Callable[[], Awaitable[T]],
    *,
    on_interrupt: str | None = None,
    run_id: str | None = None,
) -> T:
    """Run `work` in an event loop, with logs set up, and end a Ctrl-C with its exit code."""
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
        raise Interrupted(on_interrupt or "Interrupted.", run_id=run_id) from None


def with_client(
    work: "Callable[[AsyncTrainingClient], Awaitable[T]]",
    *,
    on_interrupt: str | None = None,
    run_id: str | None = None,
) -> T:
    """Run `work` with a client that is closed afterwards."""

    async def run() -> T:
        from training_backends import AsyncTrainingClient
        from training_backends.cli.vault import terminal_vault

        async with AsyncTrainingClient(credentials=terminal_vault()) as client:
            return await work(client)

    return run_async(run, on_interrupt=on_interrupt, run_id=run_id)


@contextmanager
def located(file: "ConfigFile", backend: str | None) -> Iterator[None]:
    """Add file and line to what a backend says of a field; it knows the values only."""
    from training_backends import ConfigError

    try:
        yield
    except ConfigError as error:
        # What --backend says does not stand in the file.
        if backend is None or all(issue.field != "backend" for issue in error.issues):
            error.issues = tuple(file.located(error.issues))
        raise


async def complete_id(client: "AsyncTrainingClient", given: str) -> str:
    """Return the id of the run with this id, or of the only one whose id begins with it.

    For commands that only read: a prefix that named one run yesterday may name another today.

    Raises:
        RunNotFound: There is none, or there are several.
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
            f"{given!r} is a prefix of several run ids: {', '.join(error.candidates)}.",
            candidates=error.candidates,
            hint="Type more of the id.",
            run_id=given,
        ) from None


async def refreshed(
    client: "AsyncTrainingClient", *run_ids: str, backend: str | None = None, cached: bool
) -> "Mapping[str, str] | None":
    """Bring live runs up to date unless they are to be shown as stored; see `refresh`.

    It takes a bounded time, and a backend out of reach is no error. None: nothing was asked.
    """
    if cached:
        return None
    return await client.refresh(*run_ids, backend=backend, timeout=_REFRESH)


def backend_of(file: "ConfigFile", option: str | None) -> str:
    """Return the backend that is asked for on the command line or in the file."""
    from training_backends import ConfigError, Issue

    backend = option or file.backend
    if backend is None:
        issue = Issue(
            code="missing",
            message="no backend is named",
            path=str(file.path),
            field="backend",
            fix="add `backend: local` to the file, or give --backend",
        )
        raise ConfigError(f"The configuration {file.path} names no backend.", issues=[issue])
    return backend


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error inside nested groups, or the group if there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
