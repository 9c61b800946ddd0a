"""Commands that launch, show, control and delete runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import (
    BackendOption,
    CachedOption,
    ConfigArgument,
    ExactRunArgument,
    JsonOption,
    RunArgument,
    SetOption,
    backend_of,
    complete_id,
    located,
    refreshed,
    with_client,
)
from training_backends.cli.terminal import interruptible
from training_backends.core.escape import escape_controls

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from training_backends import AsyncTrainingClient, Estimate, Reply, TrainingConfig, TrainingRun
    from training_backends.store import MetricPoint

__all__ = [
    "delete",
    "download",
    "generate",
    "launch",
    "list_runs",
    "logs",
    "metrics",
    "pause",
    "resume",
    "status",
    "stop",
    "wait",
]


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt for the model.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=32768, help="Maximum tokens to generate.")
    ] = 64,
    json: JsonOption = False,
) -> None:
    """Generate text with the trained model of a run."""
    from training_backends.cli.views.render import console, show_text, write_json

    async def ask(client: "AsyncTrainingClient") -> "Reply":
        return await client.sample(await complete_id(client, run), prompt, max_tokens=max_tokens)

    reply = with_client(ask)
    if json:
        write_json(reply.model_dump(mode="json", exclude_none=True))
    elif reply.answer is not None:
        show_text(reply.answer, console())
    else:
        for target, labels in (reply.labels or {}).items():
            ranked = sorted(labels.items(), key=lambda label: -label[1])
            shares = ", ".join(f"{label} {share:.3f}" for label, share in ranked)
            console().print(f"{target}: {shares}", markup=False)


_UNSTARTED = frozenset({"pending", "validating", "ready"})
"""Statuses of runs that may not have been started yet."""

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Skip the cost confirmation.")]


def launch(
    config: ConfigArgument,
    backend: BackendOption = None,
    run_id: Annotated[
        str | None, typer.Option("--id", help="Your own run id; reuse it to continue a launch.")
    ] = None,
    overrides: SetOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream progress until the run finishes.")
    ] = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Launch a run; return once the backend accepts it."""
    from training_backends.cli.views.launch import LaunchView, follow_run
    from training_backends.cli.views.render import show_run, write_json
    from training_backends.client.config_file import load_config
    from training_backends.core.run import new_run_id

    file = load_config(config, overrides or ())
    name = backend_of(file, backend)
    run_id = _given_id(run_id) or new_run_id()

    async def start(client: "AsyncTrainingClient") -> "TrainingRun":
        if not await _is_under_way(client, run_id):
            _need_consent(client, name, file.config, yes=yes)
        with LaunchView(quiet=json) as view:
            run = await client.launch(
                file.config,
                backend=name,
                run_id=run_id,
                on_progress=view.progress,
                on_update=view.update,
                on_notice=view.notice,
                confirm=view.asking(_agree(file.config, yes=yes)),
            )
        if not follow:
            return run
        return await follow_run(client, run.id, quiet=json, shown_statuses=view.shown)

    note = f"Interrupted. If run {run_id} was started, it keeps running. To continue, repeat the "
    with located(file, backend):
        run = with_client(start, on_interrupt=f"{note}command with --id {run_id}.", run_id=run_id)
    if json:
        write_json(run.model_dump(mode="json"))
    else:
        show_run(run)
    _exit_with(run)


def list_runs(
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="Filter by backend.")
    ] = None,
    status: Annotated[str | None, typer.Option("--status", "-s", help="Filter by status.")] = None,
    cached: CachedOption = False,
    json: JsonOption = False,
) -> None:
    """List runs, newest first."""
    from training_backends.cli.views.render import show_age, show_runs, write_json
    from training_backends.core.status import TrainingStatus

    if status is not None and status not in list(TrainingStatus):
        words = ", ".join(TrainingStatus)
        raise typer.BadParameter(f"{status!r} is not one of: {words}", param_hint="--status")
    wanted = TrainingStatus(status) if status else None

    async def read(
        client: "AsyncTrainingClient",
    ) -> "tuple[Mapping[str, str] | None, Sequence[TrainingRun]]":
        missed = await refreshed(client, backend=backend, cached=cached)
        return missed, await client.list(backend=backend, status=wanted)

    missed, runs = with_client(read)
    show_age(runs, missed)
    if json:
        write_json([run.model_dump(mode="json") for run in runs])
    else:
        show_runs(runs, missed, filtered=bool(backend or status))


def status(run: RunArgument, cached: CachedOption = False, json: JsonOption = False) -> None:
    """Fetch and show the status of a run."""
    from training_backends.cli.views.render import show_age

    async def ask(client: "AsyncTrainingClient") -> "TrainingRun":
        run_id = await complete_id(client, run)
        return await (client.get(run_id) if cached else client.status(run_id))

    found = with_client(ask)
    if cached:
        show_age([found], None)
    _print(found, json=json)


def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream records until the run finishes.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="CURSOR", help="Show only records after this cursor."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the log of a run.

    With --json, prints one record per line, each with its cursor.
    """
    from contextlib import aclosing

    from training_backends.cli.views.render import console, show_log_record, write_json_line

    async def show(client: "AsyncTrainingClient") -> "TrainingRun":
        out = console()
        run_id = await complete_id(client, run)
        async with aclosing(client.logs(run_id, after=after, follow=follow)) as records:
            async for record in records:
                if json:
                    write_json_line(record.model_dump(mode="json"))
                else:
                    show_log_record(record, out)
        return await client.get(run_id)

    shown = with_client(show, on_interrupt=_keeps_running(run))
    if follow:
        _exit_with(shown)


def metrics(
    run: RunArgument,
    names: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", metavar="NAME", help="Show only this metric (repeatable)."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw charts in the terminal.")] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV to standard output, one row per step.")
    ] = False,
    cached: CachedOption = False,
    json: JsonOption = False,
) -> None:
    """Show the metrics of a run."""
    from dataclasses import asdict

    from training_backends.cli.views import charts
    from training_backends.cli.views.render import console, show_age, show_metrics, write_json

    if plot + csv + json > 1:
        raise typer.BadParameter("give only one of --plot, --csv and --json", param_hint="--csv")

    async def read(
        client: "AsyncTrainingClient",
    ) -> "tuple[Mapping[str, str] | None, TrainingRun, Sequence[MetricPoint]]":
        run_id = await complete_id(client, run)
        missed = await refreshed(client, run_id, cached=cached)
        return missed, await client.get(run_id), await client.metrics(run_id)

    missed, shown, points = with_client(read)
    show_age([shown], missed)
    series = charts.choose(charts.by_name(points), names or ())
    points = [point for point in points if point.name in series]
    if json:
        write_json([asdict(point) for point in points])
    elif csv:
        charts.write_csv(series)
    elif plot and series:
        charts.plot(series, console(), all_given=bool(names))
    else:
        show_metrics(points, shown, up_to_date=missed is not None and shown.id not in missed)


def wait(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run ids, or unique prefixes.")],
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="Maximum seconds to wait.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Wait for runs to finish.

    Exits with the most severe exit code among them.
    """
    from training_backends.cli.exit_codes import exit_code_of_status
    from training_backends.cli.views.render import show_run, write_json

    async def stay(client: "AsyncTrainingClient") -> "Sequence[TrainingRun]":
        ids = [await complete_id(client, run) for run in runs]
        return await client.wait(*ids, timeout=timeout)

    finished = with_client(stay, on_interrupt=_keeps_running(*runs))
    if json:
        write_json([run.model_dump(mode="json") for run in finished])
    else:
        for run in finished:
            show_run(run)
    codes = [exit_code_of_status(run.status) for run in finished]
    # A failed run takes precedence over a cancelled one.
    raise typer.Exit(min((code for code in codes if code), default=0))


def stop(
    run: ExactRunArgument,
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Stop without saving a checkpoint.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Request that a run stop.

    Returns at once; `wait` returns when the run has stopped.
    """
    _print(with_client(lambda c: c.stop(run, save_checkpoint=not no_checkpoint)), json=json)


def pause(run: ExactRunArgument, json: JsonOption = False) -> None:
    """Request that a run pause.

    Returns at once; `resume` continues it.
    """
    _print(with_client(lambda c: c.pause(run)), json=json)


def resume(
    run: ExactRunArgument,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Checkpoint id; default: the newest.")
    ] = None,
    new_id: Annotated[str | None, typer.Option("--id", help="Id of the new run.")] = None,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Continue a paused run, or a stopped or failed run as a new run.

    Starts a run that has not been started yet.
    """
    from training_backends.cli.views.launch import LaunchView

    async def proceed(client: "AsyncTrainingClient") -> "TrainingRun":
        old = await client.status((await client.get(run)).id)
        if old.status == "paused":
            if checkpoint is not None or new_id is not None:
                raise _wrong_resume(old.id)
            return await client.unpause(old.id)
        config = old.config
        if _can_be_resumed(client, old):
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

    resumed = with_client(proceed)
    _print(resumed, json=json)
    _exit_with(resumed)


def download(
    run: RunArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Target directory.")],
    json: JsonOption = False,
) -> None:
    """Download the trained model of a run."""
    from training_backends.cli.views.render import console, write_json

    async def fetch(client: "AsyncTrainingClient") -> Path:
        return await client.download(await complete_id(client, run), directory.absolute())

    path = with_client(fetch)
    if json:
        write_json({"path": str(path)})
    else:
        console().print(f"Saved the model to {path}", markup=False)


def delete(
    run: ExactRunArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")] = False,
    record_only: Annotated[
        bool,
        typer.Option("--record-only", help="Delete only the local record, not the backend's data."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Delete a run that is not active, with its model."""
    from training_backends.cli.exit_codes import Interrupted
    from training_backends.cli.views.render import console, write_json

    async def forget(client: "AsyncTrainingClient") -> None:
        found = await client.get(run)
        if not yes:
            if not sys.stdin.isatty():
                raise _no_consent("Deleting a run cannot be undone", "Pass --yes.")
            if not _ask(_deletion(found, record_only=record_only)):
                raise Interrupted("Nothing was deleted.", run_id=run)
        await client.delete(run, record_only=record_only)

    with_client(forget)
    if json:
        write_json({"deleted": run})
    else:
        console().print(f"Deleted {run}", markup=False)


def _deletion(run: "TrainingRun", *, record_only: bool) -> str:
    """Return the confirmation prompt for deleting a run."""
    if record_only:
        return f"Delete only the record of {run.id} ({run.status})?"
    count = len(run.checkpoints)
    kept = [f"{count} checkpoint{'s' if count > 1 else ''}"] if count else []
    kept += [f"the model {run.result_model}"] if run.result_model else []
    return f"Delete {run.id} ({run.status}){' with ' if kept else ''}{' and '.join(kept)}?"


def _print(run: "TrainingRun", *, json: bool) -> None:
    from training_backends.cli.views.render import show_run, write_json

    if json:
        write_json(run.model_dump(mode="json"))
    else:
        show_run(run)


def _ask(question: str) -> bool:
    with interruptible():
        return typer.confirm(escape_controls(question), err=True)


def _given_id(run_id: str | None) -> str | None:
    """Reject an empty id: a script with an unset variable would start a new run each time."""
    if run_id is not None and not run_id.strip():
        raise typer.BadParameter("the id is empty; is a shell variable unset?", param_hint="--id")
    return run_id


def _exit_with(run: "TrainingRun") -> None:
    """Exit with the code of the run's status; an active run is not a failure."""
    from training_backends.cli.exit_codes import exit_code_of_status

    if code := exit_code_of_status(run.status):
        raise typer.Exit(code)


def _keeps_running(*run_ids: str) -> str:
    if len(run_ids) == 1:
        subject, command = "the run keeps", f"status {run_ids[0]}"
    else:
        subject, command = "the runs keep", "list"
    return f"Interrupted; {subject} running. Check with: training-backends {command}"


async def _is_under_way(client: "AsyncTrainingClient", run_id: str) -> bool:
    """Return whether the run with this id has already been started."""
    from training_backends import RunNotFound

    try:
        known = await client.get(run_id)
    except RunNotFound:
        return False
    return known.id == run_id and known.status not in _UNSTARTED


def _can_be_resumed(client: "AsyncTrainingClient", run: "TrainingRun") -> bool:
    """Return whether resuming may start a job, which needs consent."""
    if run.status in _UNSTARTED:
        return True
    resumes = client.backend(run.backend).capabilities.resumes
    return resumes != "no" and run.status in {"failed", "cancelled"}


def _wrong_resume(run_id: str) -> Exception:
    from training_backends.cli.exit_codes import UsageError

    return UsageError(
        f"Run {run_id} is paused and continues in place, without --checkpoint and --id.",
        hint="Omit these options, or stop the run before resuming it as a new one.",
    )


def _need_consent(
    client: "AsyncTrainingClient", backend: str, config: "TrainingConfig", *, yes: bool
) -> None:
    """Fail before the upload if consent will be needed and there is no terminal to ask on.

    Raises:
        UsageError: See above.
    """
    if yes or config.budget.max_cost is not None or sys.stdin.isatty():
        return
    if client.backend(backend).capabilities.quotes:
        raise _no_consent("This run may cost money", "Pass --yes, or set budget.max_cost.")


def _no_consent(reason: str, hint: str) -> Exception:
    from training_backends.cli.exit_codes import UsageError

    return UsageError(f"{reason}, and there is no terminal for confirmation.", hint=hint)


def _agree(config: "TrainingConfig", *, yes: bool) -> Any:
    """Return the callback that confirms the cost of a run."""
    budget = config.budget

    async def agree(estimate: "Estimate") -> bool:
        from training_backends import BudgetExceeded
        from training_backends.cli.views.render import price_text

        if yes or budget.decides(estimate):
            return True
        price = price_text(estimate)
        reason, hint = f"This run costs {price}", "Pass --yes, or set budget.max_cost."
        question = f"Start this run for {price}"
        if not price:
            reason, hint = "The price of this run is unknown", "Pass --yes to launch anyway."
            if budget.max_cost is not None:
                reason += ", so budget.max_cost cannot be checked"
            question = f"{reason}. Start it"
        if not sys.stdin.isatty():
            error = _no_consent(reason, hint)
            if estimate.basis == "quote":
                # The job exists by now; on this error the backend cancels it.
                raise BudgetExceeded(str(error), hint=hint)
            raise error
        ours = price_text(estimate.ours) if estimate.ours else None
        return _ask(f"{question}{f' (local estimate: {ours})' if ours else ''}?")

    return agree
