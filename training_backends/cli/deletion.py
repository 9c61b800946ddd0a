"""What `delete` deletes: which runs, how much they take up, and the confirmation."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from training_backends.cli.terminal import ask, no_consent

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, TrainingRun

__all__ = ["delete_runs", "read_age", "select_runs"]


def read_age(text: str) -> timedelta:
    """Return the duration that `--older-than` gives."""
    from pydantic import TypeAdapter, ValidationError

    from training_backends.core.estimate import Duration

    try:
        return TypeAdapter[timedelta](Duration).validate_python(text)
    except ValidationError:
        raise typer.BadParameter(
            f"{text!r} is not a duration such as 30d or 12h", param_hint="--older-than"
        ) from None


async def select_runs(
    client: "AsyncTrainingClient",
    *,
    status: str | None,
    older_than: timedelta | None,
    tags: dict[str, str],
) -> "list[TrainingRun]":
    """Return the runs that match the filters; without a status, only finished ones."""
    from training_backends.core.run import utc_now

    newest = utc_now() - older_than if older_than else None
    return [
        run
        for run in await client.list(status=status, tags=tags)
        if (status is not None or run.status.is_terminal)
        and (newest is None or (run.finished_at or run.created_at) < newest)
    ]


async def delete_runs(
    client: "AsyncTrainingClient", runs: "Sequence[TrainingRun]", *, yes: bool, record_only: bool
) -> tuple[list[str], int]:
    """Ask for confirmation and delete runs; return their ids and the bytes freed in the home.

    One that cannot be deleted does not keep the others.

    Raises:
        TrainingBackendError: A run could not be deleted; the first of these errors.
    """
    from anyio import to_thread

    from training_backends import TrainingBackendError
    from training_backends.cli.views.console import stderr
    from training_backends.core.files import disk_usage

    places = {run.id: client.home / "runs" / run.id for run in runs}
    sizes = {run_id: await to_thread.run_sync(disk_usage, path) for run_id, path in places.items()}
    if not yes:
        _confirm(runs, sizes, record_only=record_only)
    deleted: list[str] = []
    failed: list[TrainingBackendError] = []
    for run in runs:
        try:
            await client.delete(run.id, record_only=record_only)
        except TrainingBackendError as error:
            if not runs[1:]:
                raise
            stderr().print(f"Not deleted: {run.id}: {error.message}", markup=False)
            failed.append(error)
        else:
            deleted.append(run.id)
    freed = sum(sizes[run_id] for run_id in deleted if not places[run_id].exists())
    if failed:
        first, *_ = failed
        done = f"{len(deleted)} of {len(runs)} runs were deleted."
        first.hint = f"{first.hint} {done}" if first.hint else done
        raise first
    return deleted, freed


def _confirm(runs: "Sequence[TrainingRun]", sizes: dict[str, int], *, record_only: bool) -> None:
    from rich.filesize import decimal

    from training_backends.cli.exit_codes import Interrupted
    from training_backends.cli.views.console import Column, ago, show_table, stderr

    if not sys.stdin.isatty():
        what = "a run" if not runs[1:] else f"{len(runs)} runs"
        raise no_consent(f"Deleting {what} cannot be undone", "Pass --yes.")
    if runs[1:]:
        columns = [Column("run"), Column("status"), Column("finished", 1), Column("size", 2)]
        rows = [
            (
                run.id,
                run.status,
                ago(run.finished_at) if run.finished_at else "",
                decimal(sizes[run.id]) if sizes[run.id] else "",
            )
            for run in runs
        ]
        show_table(columns, rows, stderr())
        what = "only the records of " if record_only else ""
        question = f"Delete {what}these {len(runs)} runs"
    elif record_only:
        question = f"Delete only the record of {runs[0].id} ({runs[0].status})"
    else:
        question = _deletion(runs[0])
    size = 0 if record_only else sum(sizes.values())
    if not ask(f"{question}{f' ({decimal(size)})' if size else ''}?"):
        raise Interrupted("Nothing was deleted.", run_id=runs[0].id)


def _deletion(run: "TrainingRun") -> str:
    count = len(run.checkpoints)
    kept = [f"{count} checkpoint{'s' if count > 1 else ''}"] if count else []
    kept += [f"the model {run.result_model}"] if run.result_model else []
    return f"Delete {run.id} ({run.status}){' with ' if kept else ''}{' and '.join(kept)}"
