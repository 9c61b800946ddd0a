"""Commands about the gateway's projects and its audit log."""

import sys
from contextlib import suppress
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.keys import home_directory
from training_backends.cli.session import JsonOption

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from training_backends.cli.views.console import Column
    from training_backends.gateway.retention import Expired
    from training_backends.gateway.store import GatewayStore

__all__ = ["audit", "projects"]

projects = typer.Typer(
    help="Manage the gateway's projects and their limits.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
audit = typer.Typer(
    help="Read the gateway's audit log.", no_args_is_help=True, rich_markup_mode=None
)

_MOST = 1_000_000_000
_FOREVER = "forever"
_DAY = 86400


class _KindName(StrEnum):
    FAILED = "failed"
    COMPLETED = "completed"
    CHECKPOINTS = "checkpoints"
    FILES = "files"
    LOGS = "logs"


class _LimitName(StrEnum):
    JOBS_RUNNING = "jobs-running"
    JOBS_QUEUED = "jobs-queued"
    BYTES = "bytes"
    REQUESTS_PER_SECOND = "requests-per-second"
    STEPS = "steps"


@projects.command("list")
def list_projects(json: JsonOption = False) -> None:
    """List projects with what they use and their limits."""
    from rich.filesize import decimal

    from training_backends.cli.views.console import Column, show_table, stderr, stdout, write_json
    from training_backends.gateway.projects import ProjectStore

    found = ProjectStore(_store()).list()
    if json:
        write_json([asdict(each) for each in found])
        return
    if not found:
        stderr().print("No projects yet. `training-backends keys create` makes one.")
        return
    columns = (
        Column("project"),
        Column("running"),
        Column("queued"),
        Column("stored"),
        Column("requests/s", drop=1),
        Column("steps per job", drop=2),
        Column("keeps", drop=3),
    )

    def used(amount: str, limit: str | None) -> str:
        return amount if limit is None else f"{amount} of {limit}"

    rows = []
    for each in found:
        most = each.limits
        size = None if most.bytes is None else decimal(most.bytes)
        rows.append(
            (
                each.name,
                used(str(each.jobs_running), _text(most.jobs_running)),
                used(str(each.jobs_queued), _text(most.jobs_queued)),
                used(decimal(each.bytes), size),
                _text(most.requests_per_second) or "",
                _text(most.steps) or "",
                ", ".join(f"{kind} {_period(days)}" for kind, days in each.keep.items()),
            )
        )
    show_table(columns, rows, stdout())


@projects.command("set")
def set_project(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Project, as of `keys create`.")],
    jobs_running: Annotated[
        int | None,
        typer.Option("--jobs-running", metavar="N", min=0, max=_MOST, help="Jobs that train."),
    ] = None,
    jobs_queued: Annotated[
        int | None,
        typer.Option("--jobs-queued", metavar="N", min=0, max=_MOST, help="Jobs that wait."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="All files: 500MB, 20GB.")
    ] = None,
    requests_per_second: Annotated[
        float | None,
        typer.Option(
            "--requests-per-second",
            metavar="N",
            min=0.01,
            max=_MOST,
            help="Requests to each gateway process.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, max=_MOST, help="Training steps of a job."),
    ] = None,
    lift: Annotated[
        list[_LimitName] | None,
        typer.Option("--lift", metavar="LIMIT", help="Remove a limit, such as bytes."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="KIND=AGE", help="Retention: failed=30d, files=forever, logs=default."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Set limits and retention of a project, effective immediately."""
    from training_backends.cli.data import read_size
    from training_backends.cli.exit_codes import UsageError
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.gateway.projects import ProjectStore

    given: dict[str, float | None] = {
        "jobs_running": jobs_running,
        "jobs_queued": jobs_queued,
        "bytes": None if size is None else read_size(size),
        "requests_per_second": requests_per_second,
        "steps": steps,
    }
    limits = {limit: value for limit, value in given.items() if value is not None}
    lifted = {limit.replace("-", "_"): None for limit in lift or ()}
    kept = dict(map(_kept, keep or ()))
    if not limits and not lifted and not kept:
        raise UsageError("No limit given.", hint="See `training-backends projects set --help`.")
    changed = ProjectStore(_store()).set(name, {**limits, **lifted}, kept)
    if json:
        write_json(asdict(changed))
        return
    texts = {limit: f"{value:,}" for limit, value in limits.items()} | dict.fromkeys(
        lifted, "lifted"
    )
    texts |= {f"keeps {kind}": _period(days) for kind, days in kept.items()}
    shown = ", ".join(f"{limit.replace('_', ' ')} {what}" for limit, what in texts.items())
    stderr().print(f"Project {name}: {shown}.", markup=False)


@projects.command("cleanup")
def clean_up(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Project; default: all.")
    ] = None,
    only: Annotated[
        list[_KindName] | None,
        typer.Option("--only", metavar="KIND", help="Delete only failed, files or the like."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Instead of the periods, such as 30d."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be deleted.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete old runs, checkpoints, files and logs now.

    Without --older-than, the periods of the settings and of the project apply. With it, models of
    completed jobs are deleted only with `--only completed`.
    """
    from rich.filesize import decimal

    from training_backends.cli.deletion import read_age
    from training_backends.cli.exit_codes import Interrupted
    from training_backends.cli.session import run_async
    from training_backends.cli.terminal import ask, no_consent
    from training_backends.cli.views.console import show_table, stderr, stdout, write_json
    from training_backends.core.settings import load_settings
    from training_backends.gateway.gateway import open_retention
    from training_backends.gateway.keys import check_project, local_operator
    from training_backends.gateway.projects import KINDS
    from training_backends.gateway.settings import GatewaySettings

    if name is not None:
        check_project(name)
    age = None if older_than is None else read_age(older_than).total_seconds()
    kinds = [
        kind for kind in KINDS if (kind in only if only else age is None or kind != "completed")
    ]
    if not (dry_run or yes or sys.stdin.isatty()):
        raise no_consent("A cleanup cannot be undone", "Pass --yes, or --dry-run.")

    async def run() -> "Sequence[Expired]":
        async with open_retention(load_settings(GatewaySettings), home=home_directory()) as found:
            sweep = partial(
                found.sweep, kinds=kinds, project=name, older_than=age, actor_of=local_operator
            )
            if dry_run or yes:
                return await sweep(dry_run=dry_run)
            planned = await sweep(dry_run=True)
            if planned:
                show_table(*_table(planned), stderr())
                if not ask("Delete all of this?"):
                    raise Interrupted("Nothing was deleted.")
            return await sweep() if planned else []

    expired = run_async(run)
    freed = sum(each.bytes for each in expired)
    if json:
        found = [asdict(each) for each in expired]
        write_json({"dry_run": dry_run, "deleted": found, "freed_bytes": freed})
        return
    if not expired:
        stderr().print("Nothing to delete.")
        return
    show_table(*_table(expired), stdout())
    done = "Would free" if dry_run else "Freed"
    stderr().print(f"{done} {decimal(freed)}.", markup=False)


@audit.command("export")
def export_audit(
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="7d (ago) or 2027-01-31; default: all."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="WHEN", help="Earlier than this; default: now."),
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", metavar="NAME", help="Only keys of this project.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print who changed or downloaded what, oldest first."""
    from training_backends.cli.views.console import stderr, stdout, write_json_line
    from training_backends.gateway.audit import AuditLog

    entries = AuditLog(_store()).entries(
        since=_moment("--since", since), until=_moment("--until", until), project=project
    )
    out, entry = stdout(), None
    for entry in entries:
        if json:
            write_json_line(entry)
            continue
        names = ("at", "actor", "project", "action", "target", "outcome", "address")
        out.print("  ".join(str(entry[name]) or "-" for name in names), markup=False)
    if entry is None and not json:
        stderr().print("No entries.")


def _text(limit: float | None) -> str | None:
    return None if limit is None else f"{limit:,}"


def _moment(option: str, text: str | None) -> "datetime | None":
    from datetime import UTC, datetime
    from datetime import timedelta as span

    from pydantic import TypeAdapter, ValidationError

    from training_backends.core.estimate import Duration

    if text is None:
        return None
    try:
        if text[:1].isdigit() and "-" in text:
            return datetime.fromisoformat(text).astimezone(UTC)
        ago: span = TypeAdapter(Duration).validate_python(text)
        return datetime.now(UTC) - ago
    except (ValueError, OverflowError, ValidationError):
        raise typer.BadParameter(
            f"{option} {text!r} is not a duration such as 7d, nor a date such as 2027-01-31."
        ) from None


def _store() -> "GatewayStore":
    from training_backends.core.settings import load_settings
    from training_backends.gateway.keys import open_store
    from training_backends.gateway.settings import GatewaySettings

    return open_store(home_directory(), load_settings(GatewaySettings).store_url)


def _table(
    expired: "Sequence[Expired]",
) -> "tuple[Sequence[Column], Sequence[tuple[str, ...]]]":
    """Return what was deleted by project and kind."""
    from rich.filesize import decimal

    from training_backends.cli.views.console import Column

    found: dict[tuple[str, str], list[int]] = {}
    for each in expired:
        found.setdefault((each.project, each.kind), []).append(each.bytes)
    columns = Column("project"), Column("kind"), Column("deleted"), Column("size")
    rows = [(*key, f"{len(sizes):,}", decimal(sum(sizes))) for key, sizes in sorted(found.items())]
    return columns, rows


def _kept(text: str) -> tuple[str, float | str | None]:
    """Read KIND=AGE; return the kind and days, forever, or None for the gateway's setting."""
    from pydantic import TypeAdapter, ValidationError

    from training_backends.core.estimate import Duration

    kind, _, age = text.partition("=")
    if kind in list(_KindName):
        if age in {_FOREVER, "default"}:
            return kind, _FOREVER if age == _FOREVER else None
        with suppress(ValidationError):
            span: timedelta = TypeAdapter(Duration).validate_python(age)
            return kind, span.total_seconds() / _DAY
    raise typer.BadParameter(
        f"{text!r} is not KIND=AGE: a kind ({', '.join(_KindName)}) and a duration such as 30d, "
        "forever, or default.",
        param_hint="--keep",
    )


def _period(days: float | str | None) -> str:
    if days is None:
        return "default"
    return days if isinstance(days, str) else f"{days:.4g}d"
