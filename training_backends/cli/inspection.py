"""The command `data inspect`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from training_backends.cli.cutting import dialect_called
from training_backends.cli.session import JsonOption

if TYPE_CHECKING:
    from training_backends.core.data_rules import Dialect
    from training_backends.core.dataset import Dataset
    from training_backends.core.errors import Issue
    from training_backends.datasets.inspect import Progress
    from training_backends.tokens import TokenCount

__all__ = ["inspect"]


def inspect(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files, patterns, directories, or - for stdin.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option("--validation", metavar="FILE", help="A file to validate on; repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="CONFIG", help="YAML file of a run: its files, targets and method."
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            "--dialect",
            metavar="DIALECT",
            help="Whose rules hold: mistral, openai, together or local; default the backend of "
            "--config, else mistral.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Count the tokens that this model reads."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", min=2, metavar="ROWS", help="Count so many rows, and say how sure that is."
        ),
    ] = None,
    max_issues: Annotated[
        int, typer.Option("--max-issues", min=0, metavar="N", help="Issues to show in full.")
    ] = 50,
    json: JsonOption = False,
) -> None:
    """Say what is in data files, and everything that is wrong with them, line by line.

    Nothing is uploaded. Ends with 3 if there are errors.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.data import InspectView
    from training_backends.cli.views.render import write_json

    asked = _asked(files or [], validation or [], config, dialect)
    with InspectView(asked.dialect, max_issues=max_issues, quiet=json) as view:
        found = asked.look(
            on_issue=lambda issue: view.issue(asked.locate(issue)), on_progress=view.reading
        )
        dataset = found.model_copy(update={"issues": tuple(map(asked.locate, found.issues))})
        tokens = _count(dataset, model, sample, view.counting) if model else None
    if json:
        write_json(view.document(dataset, tokens))
    else:
        view.show(dataset, tokens)
    if dataset.errors:
        raise typer.Exit(ExitCode.INVALID)


class _Asked(NamedTuple):
    """What the command line asks for.

    Attributes:
        look: Reads the files.
        dialect: The rules for them.
        locate: Adds to an issue where in a configuration its field stands.
    """

    look: "Callable[..., Dataset]"
    dialect: "Dialect"
    locate: "Callable[[Issue], Issue]"


def _asked(
    files: list[Path], validation: list[Path], config: Path | None, dialect: str | None
) -> _Asked:
    from training_backends.cli.exit_codes import UsageError
    from training_backends.core.config import DataSource
    from training_backends.datasets.dialects import DIALECTS, MISTRAL
    from training_backends.datasets.inspect import inspect as inspect_config
    from training_backends.datasets.inspect import inspect_files
    from training_backends.datasets.open_file import expand

    if bool(files or validation) == bool(config):
        raise UsageError("Give files or --config, one of them.")
    chosen = dialect_called(dialect) if dialect is not None else None
    if config:
        from training_backends.client.config_file import load_config

        file = load_config(config)
        rules = chosen or DIALECTS.get(file.backend or "", MISTRAL)
        look = partial(inspect_config, file.config, dialect=rules)
        return _Asked(look, rules, lambda issue: file.located([issue])[0])
    rules = chosen or MISTRAL
    train = [DataSource(path=path) for path in expand(files)]
    others = [DataSource(path=path) for path in expand(validation)]
    return _Asked(partial(inspect_files, train, others, dialect=rules), rules, lambda issue: issue)


def _count(
    dataset: "Dataset", model: str, sample: int | None, on_progress: "Progress"
) -> "TokenCount":
    from training_backends.datasets.open_file import STDIN
    from training_backends.tokens import TokenCount, count_tokens

    if any(file.path == STDIN for file in dataset.train):
        return TokenCount(reason="standard input cannot be read a second time")
    return count_tokens(dataset, model, sample=sample, on_progress=on_progress)
