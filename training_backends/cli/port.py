"""Convert a configuration to another backend."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.completion import complete_backend, complete_run
from training_backends.cli.session import JsonOption, command, complete_id, short_path, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient
    from training_backends.client.config_file import ConfigLike
    from training_backends.client.port import Ported

__all__ = ["port"]


def port(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="YAML configuration, or the id of a run or a unique prefix.",
            autocompletion=complete_run,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="BACKEND", help="Target backend.", autocompletion=complete_backend
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Model of the target backend.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="New file; default: standard output."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert a configuration to another backend.

    Reports on standard error what maps, what is approximated and what is lost. Data files that the
    backend does not accept are converted to new files next to the output. Never overwrites a file.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.console import write, write_json
    from training_backends.client.config_file import load_config
    from training_backends.client.port import port as convert
    from training_backends.client.port import to_yaml
    from training_backends.datasets.write import refuse_existing

    # A missing file is reported as such; any other name is a run.
    path = Path(config)
    file = load_config(path) if path.exists() or path.suffix in {".yaml", ".yml"} else None
    if output is not None:
        refuse_existing(output, hint="Choose another file name.")
    directory = (output.parent if output else Path()).absolute()

    async def work(client: "AsyncTrainingClient") -> "Ported":
        given: ConfigLike
        if file is not None:
            given, source = file, file.backend
        else:
            run = await client.get(await complete_id(client, config))
            given, source = run.config, run.backend
        return await convert(client, given, to=to, source=source, model=model, directory=directory)

    ported = with_client(work)
    text = to_yaml(ported, directory if output else None)
    if output is not None:
        with output.open("x", encoding="utf-8") as out:
            out.write(text)
    if json:
        write_json(
            {
                "config": {
                    "backend": ported.backend,
                    **ported.config.model_dump(mode="json", exclude_defaults=True),
                },
                "mapped": ported.mapped,
                "approximated": [change._asdict() for change in ported.approximated],
                "lost": [change._asdict() for change in ported.lost],
                "files": [str(each) for each in ported.files],
            }
        )
    else:
        if output is None:
            write(text)
        _show_report(ported, output)
    if ported.issues:
        raise typer.Exit(ExitCode.INVALID)


def _show_report(ported: "Ported", output: Path | None) -> None:
    """Print what became of each field, and the next command."""
    from rich.markup import escape

    from training_backends.cli.views.console import stderr
    from training_backends.cli.views.render import show_issues
    from training_backends.core.redaction import redact

    out = stderr()
    if ported.mapped:
        out.print(f"[bold]mapped[/] {escape(', '.join(ported.mapped))}")
    for title, changes in (("approximated", ported.approximated), ("lost", ported.lost)):
        for change in changes:
            out.print(f"[bold]{title}[/] {escape(redact(f'{change.field}: {change.message}'))}")
    for file in ported.files:
        out.print(f"Wrote {short_path(file)}.", markup=False)
    if output is not None:
        out.print(f"Wrote {output}.", markup=False)
    if ported.issues:
        out.print("Correct before the launch:")
        show_issues(ported.issues, out)
    elif output is not None:
        out.print(f"  {command('validate', str(output))}", markup=False)
