"""Shared setup of all commands: options, settings, logging, client and Ctrl-C handling."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from training_backends.cli.completion import complete_backend, complete_run

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
    on_interrupt: str | None = None,
    run_id: str | None = None,
) -> T:
    """Run `work` in an event loop with logging configured; raise `Interrupted` on Ctrl-C."""
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
    """Run `work` with a client and close the client afterwards."""

    async def run() -> T:
        from training_backends import AsyncTrainingClient
        from training_backends.cli.vault import terminal_vault

        async with AsyncTrainingClient(credentials=terminal_vault()) as client:
            return await work(client)

    return run_async(run, on_interrupt=on_interrupt, run_id=run_id)


@contextmanager
def located(file: "ConfigFile", backend: str | None) -> Iterator[None]:
    """Add the file and line of the configuration to a backend's issues."""
    from training_backends import ConfigError

    try:
        yield
    except ConfigError as error:
        # A backend given with --backend has no line in the file.
        if backend is None or all(issue.field != "backend" for issue in error.issues):
            error.issues = tuple(file.located(error.issues))
        raise


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


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the only error inside nested groups, or the group if it has several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
