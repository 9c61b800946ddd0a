"""Commands about runs, from `launch` to `delete`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import (
    BackendOption,
    ConfigArgument,
    JsonOption,
    RunArgument,
    SetOption,
    backend_of,
    located,
    with_client,
)
from training_backends.cli.terminal import heard_at_once
from training_backends.core.escape import escape_controls

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, Estimate, TrainingConfig, TrainingRun

__all__ = [
    "delete",
    "download",
    "launch",
    "list_runs",
    "logs",
    "metrics",
    "resume",
    "status",
    "stop",
    "wait",
]

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Spend without asking.")]


def launch(
    config: ConfigArgument,
    backend: BackendOption = None,
    run_id: Annotated[
        str | None, typer.Option("--id", help="Your own id; repeating it continues the same run.")
    ] = None,
    overrides: SetOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it is over.")] = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Start a run; returns when the start is accepted."""
    from training_backends.cli.follow import LaunchView, follow_run
    from training_backends.cli.render import show_run, write_json
    from training_backends.client.configfile import load_config
    from training_backends.core.run import new_run_id

    file = load_config(config, overrides or ())
    name = backend_of(file, backend)
    run_id = _given_id(run_id) or new_run_id()

    async def start(client: "AsyncTrainingClient") -> "TrainingRun":
        _need_consent(client, name, file.config, yes=yes)
        with LaunchView(quiet=json) as view:
            run = await client.launch(
                file.config,
                backend=name,
                run_id=run_id,
                on_progress=view.progress,
                on_update=view.update,
                confirm=view.asking(_agree(file.config, yes=yes)),
            )
        return await follow_run(client, run.id, quiet=json) if follow else run

    note = f"Interrupted. If it was started, the run {run_id} goes on; the same command with "
    with located(file, backend):
        run = with_client(start, on_interrupt=f"{note}--id {run_id} continues it.", run_id=run_id)
    if json:
        write_json(run.model_dump(mode="json"))
    else:
        show_run(run)
    _exit_with(run)


def list_runs(
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="Only of this one.")
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", "-s", help="Only in this status.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the runs of this machine's store as they were last seen, newest first."""
    from training_backends.cli.render import show_runs, write_json
    from training_backends.core.status import TrainingStatus

    if status is not None and status not in list(TrainingStatus):
        words = ", ".join(TrainingStatus)
        raise typer.BadParameter(f"{status!r} is no status; one of: {words}", param_hint="--status")
    wanted = TrainingStatus(status) if status else None
    runs = with_client(lambda client: client.list(backend=backend, status=wanted))
    if json:
        write_json([run.model_dump(mode="json") for run in runs])
    else:
        show_runs(runs, filtered=bool(backend or status))


def status(run: RunArgument, json: JsonOption = False) -> None:
    """Ask the provider where a run stands."""
    _print(with_client(lambda client: client.status(run)), json=json)


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it is over.")] = False,
    after: Annotated[
        str | None, typer.Option("--after", metavar="CURSOR", help="Go on behind this record.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a run's log; with --json one record a line, each with its cursor."""
    from contextlib import aclosing

    from training_backends.cli.render import console, show_log_record, write_json_line

    async def show(client: "AsyncTrainingClient") -> "TrainingRun":
        out = console()
        async with aclosing(client.logs(run, after=after, follow=follow)) as records:
            async for record in records:
                if json:
                    write_json_line(record.model_dump(mode="json"))
                else:
                    show_log_record(record, out)
        return await client.get(run)

    shown = with_client(show, on_interrupt=_goes_on(run))
    if follow:
        _exit_with(shown)


def metrics(
    run: RunArgument,
    names: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", metavar="NAME", help="Only this one; repeatable."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw charts in the terminal.")] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="A line a step on standard output, nothing else.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show what was measured while a run trained, as it was last seen."""
    from dataclasses import asdict

    from training_backends.cli import measures
    from training_backends.cli.render import console, show_metrics, write_json

    if plot + csv + json > 1:
        raise typer.BadParameter("give one of --plot, --csv and --json", param_hint="--csv")
    points = with_client(lambda client: client.metrics(run))
    series = measures.choose(measures.by_name(points), names or ())
    points = [point for point in points if point.name in series]
    if json:
        write_json([asdict(point) for point in points])
    elif csv:
        measures.write_csv(series)
    elif plot and series:
        measures.plot(series, console(), all_given=bool(names))
    else:
        show_metrics(points)


def wait(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run ids or their beginnings.")],
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="Seconds at most.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Wait until all given runs are over; ends with the worst of their exit codes."""
    from training_backends.cli.exit_codes import exit_code_of_status
    from training_backends.cli.render import show_run, write_json

    over = with_client(
        lambda client: client.wait(*runs, timeout=timeout), on_interrupt=_goes_on(*runs)
    )
    if json:
        write_json([run.model_dump(mode="json") for run in over])
    else:
        for run in over:
            show_run(run)
    codes = [exit_code_of_status(run.status) for run in over]
    # A failed run weighs more than one that somebody cancelled.
    raise typer.Exit(min((code for code in codes if code), default=0))


def stop(
    run: RunArgument,
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Do not keep what was learnt so far.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Ask the provider to end a run; `wait` tells when it has."""
    _print(with_client(lambda c: c.stop(run, save_checkpoint=not no_checkpoint)), json=json)


def resume(
    run: RunArgument,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Default the newest one.")
    ] = None,
    new_id: Annotated[str | None, typer.Option("--id", help="Id of the new run.")] = None,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Continue a stopped or failed run as a new one; start one that waits for it."""
    from training_backends.cli.follow import LaunchView

    async def go_on(client: "AsyncTrainingClient") -> "TrainingRun":
        config = (old := await client.get(run)).config
        _need_consent(client, old.backend, config, yes=yes)
        with LaunchView(quiet=json) as view:
            return await client.resume(
                old.id,
                checkpoint=checkpoint,
                new_id=_given_id(new_id),
                on_progress=view.progress,
                on_update=view.update,
                confirm=view.asking(_agree(config, yes=yes)),
            )

    resumed = with_client(go_on)
    _print(resumed, json=json)
    _exit_with(resumed)


def download(
    run: RunArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes.")],
    json: JsonOption = False,
) -> None:
    """Fetch the finished model of a run."""
    from training_backends.cli.render import console, write_json

    path = with_client(lambda client: client.download(run, directory.absolute()))
    if json:
        write_json({"path": str(path)})
    else:
        console().print(f"The model lies in {path}", markup=False)


def delete(run: RunArgument, json: JsonOption = False) -> None:
    """Forget a run that is over, and delete its result where the backend can."""
    from training_backends.cli.render import console, write_json

    async def forget(client: "AsyncTrainingClient") -> str:
        found = await client.get(run)
        await client.delete(found.id)
        return found.id

    deleted = with_client(forget)
    if json:
        write_json({"deleted": deleted})
    else:
        console().print(f"Deleted {deleted}", markup=False)


def _print(run: "TrainingRun", *, json: bool) -> None:
    from training_backends.cli.render import show_run, write_json

    if json:
        write_json(run.model_dump(mode="json"))
    else:
        show_run(run)


def _ask(question: str) -> bool:
    with heard_at_once():
        return typer.confirm(escape_controls(question), err=True)


def _given_id(run_id: str | None) -> str | None:
    """Refuse an empty id: a script whose variable is not set would start a run each time."""
    if run_id is not None and not run_id.strip():
        raise typer.BadParameter("the id is empty; is a variable not set?", param_hint="--id")
    return run_id


def _exit_with(run: "TrainingRun") -> None:
    """End with the run's own exit code; a run that goes on is no failure."""
    from training_backends.cli.exit_codes import exit_code_of_status

    if code := exit_code_of_status(run.status):
        raise typer.Exit(code)


def _goes_on(*run_ids: str) -> str:
    names = " ".join(run_ids)
    return f"Interrupted; the run goes on. Look with: training-backends status {names}"


def _need_consent(
    client: "AsyncTrainingClient", backend: str, config: "TrainingConfig", *, yes: bool
) -> None:
    """Refuse early what could only be refused after an upload: nobody to ask, no limit set."""
    if client.backend(backend).capabilities.quotes and not _is_agreed(config, yes=yes):
        _need_terminal()


def _is_agreed(config: "TrainingConfig", *, yes: bool) -> bool:
    return yes or config.budget.max_cost is not None


def _need_terminal() -> None:
    if not sys.stdin.isatty():
        raise typer.BadParameter(
            "launching may cost money and nobody can be asked here; "
            "give --yes, or set budget.max_cost",
            param_hint="--yes",
        )


def _agree(config: "TrainingConfig", *, yes: bool) -> Any:
    """Return the question asked before money is spent."""

    async def agree(estimate: "Estimate") -> bool:
        if _is_agreed(config, yes=yes):
            return True
        _need_terminal()
        from training_backends.cli.render import price_text

        price = price_text(estimate)
        cost = f"for {price}" if price else "at a cost that is not known"
        ours = price_text(estimate.ours) if estimate.ours else None
        return _ask(f"Start {cost}{f' (estimated here: {ours})' if ours else ''}?")

    return agree
