"""Commands that show, control and delete runs."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from training_backends.cli.completion import (
    complete_backend,
    complete_run,
    complete_status,
    complete_until,
)
from training_backends.cli.session import (
    CachedOption,
    ExactRunArgument,
    JsonOption,
    RunArgument,
    complete_id,
    exit_with,
    keeps_running,
    refreshed,
    with_client,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rich.console import Console

    from training_backends import AsyncTrainingClient, Checkpoint, Prompt, Reply, TrainingRun
    from training_backends.core.status import TrainingStatus
    from training_backends.store import MetricPoint

__all__ = [
    "checkpoints",
    "delete",
    "download",
    "generate",
    "list_runs",
    "logs",
    "metrics",
    "pause",
    "push",
    "status",
    "stop",
    "wait",
]


def generate(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Prompt for the model.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="Text, or JSON Lines: prompt, messages; - stdin."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=32768, help="Maximum tokens to generate.")
    ] = 64,
    json: JsonOption = False,
) -> None:
    """Generate text with the trained model of a run.

    With --input, answers each line of a file, in order; with --json, a JSON line each.
    """
    from training_backends.cli.views.console import write_json, write_json_line

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give PROMPT or --input, one of them", param_hint="PROMPT")
    asked = [str(prompt)] if prompts is None else _read_prompts(prompts)

    async def prompt_model(client: "AsyncTrainingClient") -> None:
        run_id = await complete_id(client, run)
        for each in asked:
            reply = await client.sample(run_id, each, max_tokens=max_tokens)
            found = reply.model_dump(mode="json", exclude_none=True)
            if not json:
                _show_reply(reply)
            elif prompts is None:
                write_json(found)
            else:
                field = "prompt" if isinstance(each, str) else "messages"
                write_json_line({field: each, **found})

    with_client(prompt_model)


def _show_reply(reply: "Reply") -> None:
    from training_backends.cli.views.console import show_text, stdout

    if reply.answer is not None:
        show_text(reply.answer, stdout())
        return
    for target, labels in (reply.labels or {}).items():
        ranked = sorted(labels.items(), key=lambda label: -label[1])
        shares = ", ".join(f"{label} {share:.3f}" for label, share in ranked)
        stdout().print(f"{target}: {shares}", markup=False)


def _read_prompts(path: Path) -> "Sequence[Prompt]":
    """Return the prompts of a file, one a line; in JSON Lines, `prompt` or `messages`."""
    from training_backends.core.errors import DatasetError

    try:
        given = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = given.decode().splitlines()
    except OSError as error:
        raise DatasetError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_prompt_of(line, f"{path}, line {number}") for number, line in numbered]
    return [line for _, line in numbered]


def _prompt_of(line: str, where: str) -> "Prompt":
    import json

    from training_backends.client.results import checked_prompt
    from training_backends.core.errors import DatasetError

    try:
        row = json.loads(line)
        prompt = row["messages"] if "messages" in row else row["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str | list):
        raise DatasetError(
            f'{where}: expected an object such as {{"prompt": "What is 2 plus 2?"}}, '
            "or one with `messages`."
        )
    try:
        return checked_prompt(prompt)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from None


TagOption = Annotated[
    list[str] | None,
    typer.Option("--tag", "-t", metavar="NAME=VALUE", help="Only runs with this tag (repeatable)."),
]
StatusOption = Annotated[
    str | None,
    typer.Option(
        "--status",
        "-s",
        metavar="STATUS",
        help="Only runs with this status.",
        autocompletion=complete_status,
    ),
]
WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Keep showing the current state.")]


def list_runs(
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Only runs on this backend.",
            autocompletion=complete_backend,
        ),
    ] = None,
    status: StatusOption = None,
    tag: TagOption = None,
    watch: WatchOption = False,
    cached: CachedOption = False,
    json: JsonOption = False,
) -> None:
    """List runs, newest first.

    With --watch, refreshes the table until Ctrl-C. Without a terminal, prints a line for each run
    and each change; with --json, a JSON line.
    """
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.render import show_age, show_runs
    from training_backends.core.status import TrainingStatus

    _check_status(status)
    wanted = TrainingStatus(status) if status else None
    tags = _tags(tag or [])
    filtered = bool(backend or status or tags)

    async def listed(client: "AsyncTrainingClient") -> "Sequence[TrainingRun]":
        return await client.list(backend=backend, status=wanted, tags=tags)

    if watch:
        _refuse_cached(cached=cached)
        with_client(
            lambda client: _watch_list(client, listed, backend, filtered=filtered, json=json)
        )

    async def read(
        client: "AsyncTrainingClient",
    ) -> "tuple[Mapping[str, str] | None, Sequence[TrainingRun]]":
        missed = await refreshed(client, backend=backend, cached=cached)
        return missed, await listed(client)

    missed, runs = with_client(read)
    show_age(runs, missed)
    if json:
        write_json([run.model_dump(mode="json") for run in runs])
    else:
        show_runs(runs, missed, filtered=filtered)


def _tags(given: "Sequence[str]") -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := next((text for text in given if "=" not in text), None):
        raise typer.BadParameter(f"{wrong!r} is not NAME=VALUE", param_hint="--tag")
    return {name: value for name, _, value in pairs}


async def _watch_list(
    client: "AsyncTrainingClient",
    listed: "Callable[[AsyncTrainingClient], Awaitable[Sequence[TrainingRun]]]",
    backend: str | None,
    *,
    filtered: bool,
    json: bool,
) -> None:
    from training_backends.cli.views.console import stdout
    from training_backends.cli.views.render import show_runs
    from training_backends.cli.views.watch import RunsView, repeated

    def draw(runs: "Sequence[TrainingRun]", out: "Console") -> None:
        show_runs(runs, {}, filtered=filtered, out=out)

    with RunsView(draw, stdout(), json=json) as view:

        async def show() -> None:
            view.show(await listed(client))

        await repeated(show, lambda: client.watch(only={backend} if backend else None))


def status(
    run: RunArgument,
    watch: WatchOption = False,
    cached: CachedOption = False,
    json: JsonOption = False,
) -> None:
    """Fetch and show the status of a run.

    With --watch, refreshes it until the run has finished, and exits as `wait` does. Without a
    terminal, prints a line for each change; with --json, a JSON line.
    """
    from training_backends.cli.views.render import show_age

    if watch:
        _refuse_cached(cached=cached)
        _watch_run(run, json=json)

    async def read(client: "AsyncTrainingClient") -> "TrainingRun":
        run_id = await complete_id(client, run)
        return await (client.get(run_id) if cached else client.status(run_id))

    found = with_client(read)
    if cached:
        show_age([found], None)
    _print(found, json=json)


def _watch_run(run: str, *, json: bool) -> NoReturn:
    from training_backends.cli.views.console import stdout
    from training_backends.cli.views.render import show_run
    from training_backends.cli.views.watch import RunsView, repeated

    def draw(runs: "Sequence[TrainingRun]", out: "Console") -> None:
        for each in runs:
            show_run(each, out)

    watched = run

    async def follow(client: "AsyncTrainingClient") -> "TrainingRun":
        nonlocal watched
        watched = run_id = await complete_id(client, run)
        await client.status(run_id)
        with RunsView(draw, stdout(), json=json) as view:

            async def show() -> None:
                view.show([await client.get(run_id)])

            (finished,) = await repeated(show, lambda: client.wait(run_id))
            return finished

    exit_with(with_client(follow, interrupted=lambda: keeps_running(watched)))
    raise typer.Exit


def _refuse_cached(*, cached: bool) -> None:
    if cached:
        raise typer.BadParameter("give --watch or --cached, not both", param_hint="--watch")


def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream records until the run finishes.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="CURSOR", help="Show only records after this cursor."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option("--tail", "-n", min=0, metavar="N", help="Start with the last N records."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the log of a run.

    With --json, prints one record per line, each with its cursor.
    """
    from contextlib import aclosing

    from training_backends.cli.views.console import stdout, write_json_line
    from training_backends.cli.views.render import show_log_record

    if after is not None and tail is not None:
        raise typer.BadParameter("give --after or --tail, not both", param_hint="--tail")
    shown_id = run

    async def show(client: "AsyncTrainingClient") -> "TrainingRun":
        nonlocal shown_id
        out = stdout()
        shown_id = run_id = await complete_id(client, run)
        found = client.logs(run_id, after=after, tail=tail, follow=follow)
        async with aclosing(found) as records:
            async for record in records:
                if json:
                    write_json_line(record.model_dump(mode="json"))
                else:
                    show_log_record(record, out)
        return await client.get(run_id)

    interrupted = (lambda: keeps_running(shown_id)) if follow else None
    shown = with_client(show, interrupted=interrupted)
    if follow:
        exit_with(shown)


def checkpoints(run: RunArgument, cached: CachedOption = False, json: JsonOption = False) -> None:
    """List the checkpoints of a run, oldest first.

    `resume --checkpoint` and `download --checkpoint` take an id of this list.
    """
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.render import show_age, show_checkpoints

    async def read(
        client: "AsyncTrainingClient",
    ) -> "tuple[Mapping[str, str] | None, TrainingRun]":
        run_id = await complete_id(client, run)
        missed = await refreshed(client, run_id, cached=cached)
        return missed, await client.get(run_id)

    missed, found = with_client(read)
    show_age([found], missed)
    if json:
        write_json(
            [
                {"id": _checkpoint_id(each), **each.model_dump(mode="json")}
                for each in found.checkpoints
            ]
        )
    else:
        show_checkpoints([(_checkpoint_id(each), each) for each in found.checkpoints], found)


def _checkpoint_id(checkpoint: "Checkpoint") -> str:
    return checkpoint.path.name if checkpoint.path else str(checkpoint.step)


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
    from training_backends.cli.views.console import stdout, write_json
    from training_backends.cli.views.render import show_age, show_metrics

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
        charts.plot(series, stdout(), all_given=bool(names))
    else:
        show_metrics(points, shown, up_to_date=missed is not None and shown.id not in missed)


def wait(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN", help="Run ids, or unique prefixes.", autocompletion=complete_run
        ),
    ],
    until: Annotated[
        list[str] | None,
        typer.Option(
            "--until",
            metavar="STATUS",
            help="Wait for this status (repeatable).",
            show_default="finished",
            autocompletion=complete_until,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="Maximum seconds to wait.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Wait for runs to finish, or to reach a status.

    Exits with the most severe exit code among them. A run that completes without reaching the
    status exits with 6. A run that is past `running` has reached it.
    """
    from training_backends.cli.exit_codes import ExitCode, exit_code_of_status
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.render import show_run

    ids = runs
    statuses = _statuses(until or ["finished"])

    async def stay(client: "AsyncTrainingClient") -> "Sequence[TrainingRun]":
        nonlocal ids
        ids = list(dict.fromkeys([await complete_id(client, run) for run in runs]))
        work = partial(client.wait, *ids, until=until or "finished", timeout=timeout)
        return await (work() if json else _shown_while(client, ids, work))

    finished = with_client(stay, interrupted=lambda: keeps_running(*ids))
    if json:
        write_json([run.model_dump(mode="json") for run in finished])
    else:
        for run in finished:
            show_run(run)
    codes = [exit_code_of_status(run.status) for run in finished]
    if not all(any(map(run.has_reached, statuses)) for run in finished):
        codes.append(ExitCode.CONFLICT)
    # A failed run takes precedence over a cancelled one, and both over one that completed.
    severe = (ExitCode.RUN_FAILED, ExitCode.RUN_CANCELLED, ExitCode.CONFLICT)
    raise typer.Exit(next((code for code in severe if code in codes), ExitCode.DONE))


def _statuses(words: "Sequence[str]") -> "frozenset[TrainingStatus]":
    from training_backends.core.status import statuses_of

    try:
        return statuses_of(*words)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--until") from None


async def _shown_while(
    client: "AsyncTrainingClient",
    run_ids: "Sequence[str]",
    work: "Callable[[], Awaitable[Sequence[TrainingRun]]]",
) -> "Sequence[TrainingRun]":
    """Show the progress of runs on standard error while `work` waits for them."""
    from training_backends.cli.views.console import stderr
    from training_backends.cli.views.watch import RunsView, draw_progress, repeated

    with RunsView(draw_progress, stderr(), transient=True) as view:

        async def show() -> None:
            view.show([await client.get(run_id) for run_id in run_ids])

        return await repeated(show, work)


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


def download(
    run: RunArgument,
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|URL", help="Target directory, or a URL such as s3://bucket/a."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="ID", help="Checkpoint id; default: the result."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Download the model of a run or of a checkpoint.

    To a URL it is copied with a manifest.json, which is written last.
    """
    from training_backends.cli.views.console import stderr, write_json

    directory = Path(target).absolute()

    async def fetch(client: "AsyncTrainingClient") -> Path | str:
        run_id = await complete_id(client, run)
        if "://" in target:
            await client.publish(run_id, target, checkpoint=checkpoint)
            return target
        return await client.download(run_id, directory, checkpoint=checkpoint)

    place = with_client(fetch)
    if json:
        write_json({"url" if isinstance(place, str) else "path": str(place)})
    else:
        stderr().print(f"Saved the model to {place}", markup=False)


def push(
    run: RunArgument,
    target: Annotated[
        str, typer.Argument(metavar="hf://ORG/NAME", help="Repository on the Hugging Face Hub.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="ID", help="Checkpoint id; default: the result."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create a public repository, or push to one.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="NAME", help="Credential profile of huggingface."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Push the model of a run to the Hugging Face Hub.

    Uploads it as one commit to a private repository, which is created if necessary.
    """
    from training_backends.cli.views.console import stderr, write_json

    async def upload(client: "AsyncTrainingClient") -> str:
        return await client.push(
            await complete_id(client, run),
            target,
            checkpoint=checkpoint,
            private=not public,
            profile=profile,
        )

    url = with_client(upload)
    if json:
        write_json({"url": url})
    else:
        stderr().print(f"Pushed the model to {url}", markup=False)


def delete(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Run ids (prefixes are not accepted).",
            autocompletion=complete_run,
        ),
    ] = None,
    status: StatusOption = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="AGE", help="Only runs finished at least this long ago, as 30d."
        ),
    ] = None,
    tag: TagOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")] = False,
    record_only: Annotated[
        bool,
        typer.Option("--record-only", help="Delete only the local record, not the backend's data."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Delete runs that are not active, with their models.

    Takes ids, or filters that must all match. Without --status, filters match finished runs only.
    """
    from rich.filesize import decimal

    from training_backends.cli.deletion import delete_runs, read_age, select_runs
    from training_backends.cli.views.console import stderr, write_json

    _check_status(status)
    tags = _tags(tag or [])
    age = read_age(older_than) if older_than is not None else None
    if bool(runs) == bool(status or tags or age):
        raise typer.BadParameter("give run ids or filters, one of them", param_hint="RUN")

    async def forget(client: "AsyncTrainingClient") -> tuple[list[str], int]:
        if runs:
            found = [await client.get(run) for run in dict.fromkeys(runs)]
        else:
            found = await select_runs(client, status=status, older_than=age, tags=tags)
        if not found:
            return [], 0
        return await delete_runs(client, found, yes=yes, record_only=record_only)

    deleted, freed = with_client(forget)
    if json:
        write_json({"deleted": deleted, "freed_bytes": freed})
        return
    if not deleted:
        stderr().print("No runs match these filters.")
        return
    what = ", ".join(deleted) if len(deleted) < _FEW else f"{len(deleted)} runs"
    size = f", freed {decimal(freed)}" if freed else ""
    stderr().print(f"Deleted {what}{size}", markup=False)


_FEW: Final = 5
"""Runs that are named."""


def _check_status(status: str | None) -> None:
    from training_backends.core.status import TrainingStatus

    if status is not None and status not in list(TrainingStatus):
        words = ", ".join(TrainingStatus)
        raise typer.BadParameter(f"{status!r} is not one of: {words}", param_hint="--status")


def _print(run: "TrainingRun", *, json: bool) -> None:
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.render import show_run

    if json:
        write_json(run.model_dump(mode="json"))
    else:
        show_run(run)
