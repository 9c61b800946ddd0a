"""Commands that start runs: launch and resume."""

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.consent import UNSTARTED, agreement, is_under_way, need_consent
from training_backends.cli.grid import Sweep, read_grid
from training_backends.cli.session import (
    BackendOption,
    ConfigArgument,
    ExactRunArgument,
    JsonOption,
    SetOption,
    add_ways_on,
    backend_of,
    command,
    exit_with,
    keeps_running,
    located,
    next_commands,
    with_client,
)

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, TrainingRun
    from training_backends.cli.exit_codes import Interrupted
    from training_backends.cli.views.launch import LaunchView
    from training_backends.client.journal import OnUpdate

    Begin = Callable[[AsyncTrainingClient, LaunchView, OnUpdate], Awaitable[TrainingRun]]

__all__ = ["launch", "resume"]

FollowOption = Annotated[
    bool, typer.Option("--follow", "-f", help="Stream progress until the run finishes.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the run id.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Skip the cost confirmation.")]


def launch(
    config: ConfigArgument,
    backend: BackendOption = None,
    run_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Your own run id; reuse it to continue a launch."),
    ] = None,
    overrides: SetOption = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="FIELD=V1,V2", help="Launch a run for each value (repeatable)."
        ),
    ] = None,
    follow: FollowOption = False,
    yes: YesOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Launch a run; return once the backend accepts it.

    Prints the run id on standard output; with --follow, the log instead. --grid launches the
    product of all its values, as ID-1, ID-2 and so on, with the tag grid=ID.
    """
    from training_backends.client.config_file import load_config
    from training_backends.core.run import new_run_id

    run_id = _given_id(run_id) or new_run_id()
    again = ["launch", str(config), "--id", run_id]
    again += ["--backend", backend] if backend else []
    again += [part for each in overrides or () for part in ("--set", each)]
    if grid:
        if follow:
            raise typer.BadParameter("follow the runs of a grid with `wait`", param_hint="--follow")
        again += [part for each in grid for part in ("--grid", each)]
        cells = read_grid(config, overrides or (), grid, run_id)
        name = backend_of(cells[0].file, backend)
        sweep = Sweep(run_id, cells, name, backend, again, yes=yes, quiet=quiet, json=json)
        runs = sweep.run()
        sweep.show(runs)
        for run in runs:
            exit_with(run)
        return
    file = load_config(config, overrides or ())
    name = backend_of(file, backend)

    async def begin(
        client: "AsyncTrainingClient", view: "LaunchView", on_update: "OnUpdate"
    ) -> "TrainingRun":
        if not await is_under_way(client, run_id):
            need_consent(client, name, file.config, yes=yes)
        return await client.launch(
            file,
            backend=name,
            run_id=run_id,
            on_progress=view.progress,
            on_update=on_update,
            on_notice=view.notice,
            confirm=view.asking(agreement(file.config, yes=yes)),
        )

    with located(file, backend):
        _run(begin, _Launch(run_id, again), follow=follow, quiet=quiet, json=json)


def resume(
    run: ExactRunArgument,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="ID", help="Checkpoint id; default: the newest."),
    ] = None,
    new_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Id of the new run.")
    ] = None,
    follow: FollowOption = False,
    yes: YesOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Continue a paused, stopped or failed run.

    A stopped or failed run continues as a new run. Starts a run that has not been started yet.
    """
    from training_backends import BackendRetired
    from training_backends.core.run import new_run_id

    in_place = _given_id(new_id) is None and checkpoint is None
    new_id = new_id or new_run_id()
    old: TrainingRun | None = None

    async def begin(
        client: "AsyncTrainingClient", view: "LaunchView", on_update: "OnUpdate"
    ) -> "TrainingRun":
        nonlocal old
        old = await client.get(run)
        old = await client.status(old.id)
        if old.status == "paused":
            if not in_place:
                raise _continues_in_place(old.id)
            return await client.unpause(old.id)
        config = old.config
        if _can_be_resumed(client, old):
            need_consent(client, old.backend, config, yes=yes)
        return await client.resume(
            old.id,
            checkpoint=checkpoint,
            new_id=new_id,
            on_progress=view.progress,
            on_update=on_update,
            confirm=view.asking(agreement(config, yes=yes)),
        )

    again = ["resume", run, "--id", new_id]
    again += ["--checkpoint", checkpoint] if checkpoint else []
    try:
        _run(begin, _Launch(new_id, again), follow=follow, quiet=quiet, json=json)
    except BackendRetired as error:
        if old is not None:
            add_ways_on(error, old.id, old.config, old.backend)
        raise


@dataclass(slots=True)
class _Launch:
    """How far a launch has come, for the message on Ctrl-C.

    Attributes:
        again: Arguments of the command that continues it.
        recorded: Whether the run is in the store.
        accepted: Whether the backend has accepted the run.
    """

    run_id: str
    again: list[str]
    recorded: bool = False
    accepted: bool = False

    def interrupted(self) -> "Interrupted":
        """Return the error for Ctrl-C."""
        from training_backends.cli.exit_codes import Interrupted

        if self.accepted:
            return keeps_running(self.run_id)
        text = f"Interrupted during the launch of run {self.run_id}."
        hint = f"Continue: {command(*self.again)}"
        if self.recorded:
            text = f"{text[:-1]}; if it was started, it keeps running."
            hint += f"\nStop: {command('stop', self.run_id)}"
        return Interrupted(text, hint=hint, run_id=self.run_id)


def _run(begin: "Begin", launch: _Launch, *, follow: bool, quiet: bool, json: bool) -> None:
    """Start a run, print its id and the next commands, and follow it if asked to."""
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.cli.views.launch import LaunchView, follow_run
    from training_backends.cli.views.render import show_run

    silent = quiet or json

    async def work(client: "AsyncTrainingClient") -> "TrainingRun":
        with LaunchView(quiet=silent) as view:

            def updated(run: "TrainingRun") -> None:
                launch.run_id, launch.recorded = run.id, True
                view.update(run)

            run = await begin(client, view, updated)
        launch.run_id, launch.accepted = run.id, True
        if not json and (quiet or not follow):
            typer.echo(run.id)
            sys.stdout.flush()
        if not (silent or run.status.is_terminal):
            for line in next_commands(run.id):
                stderr().print(f"  {line}", markup=False)
        if not follow:
            return run
        return await follow_run(client, run.id, quiet=silent, shown_statuses=view.shown)

    run = with_client(work, interrupted=launch.interrupted)
    if json:
        write_json(run.model_dump(mode="json"))
    elif run.status.is_terminal and not quiet:
        show_run(run, stderr())
    exit_with(run)


def _given_id(run_id: str | None) -> str | None:
    """Reject an empty id: a script with an unset variable would start a new run each time."""
    if run_id is not None and not run_id.strip():
        raise typer.BadParameter("the id is empty; is a shell variable unset?", param_hint="--id")
    return run_id


def _can_be_resumed(client: "AsyncTrainingClient", run: "TrainingRun") -> bool:
    """Return whether resuming may start a job, which needs consent."""
    if run.status in UNSTARTED:
        return True
    resumes = client.backend(run.backend).capabilities.resumes
    return resumes != "no" and run.status in {"failed", "cancelled"}


def _continues_in_place(run_id: str) -> Exception:
    from training_backends.cli.exit_codes import UsageError

    return UsageError(
        f"Run {run_id} is paused and continues in place, without --checkpoint and --id.",
        hint="Omit these options, or stop the run and resume it as a new one.",
    )
