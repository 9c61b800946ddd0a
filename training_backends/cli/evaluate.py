"""The `eval` command."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import JsonOption, RunArgument, complete_id, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, EvaluatedRow, Evaluation
    from training_backends.client.evaluation import Scorer

__all__ = ["evaluate"]


def evaluate(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data file with expected answers.")],
    is_json: Annotated[
        bool, typer.Option("--valid-json", help="Score whether answers are valid JSON.")
    ] = False,
    schema: Annotated[
        Path | None,
        typer.Option("--json-schema", metavar="FILE", help="Score validity for a JSON Schema."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", metavar="MODULE:NAME", help="Score with a Python function."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="Ask only the first N rows.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=32768, help="Maximum tokens of an answer.")
    ] = 256,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write answers and scores, as JSONL."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", metavar="X", help="Exit with 10 if the score is lower."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score a trained model on the rows of a data file.

    The score is the share of answers that equal those in FILE, apart from white space; for a
    classifier, the accuracy of its labels.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.console import progress, write_json

    if is_json + (schema is not None) + (scorer is not None) > 1:
        raise typer.BadParameter(
            "give only one of --valid-json, --json-schema and --scorer", param_hint="--scorer"
        )
    name, function = _scorer(schema, scorer, is_json=is_json)
    done = 0
    with ExitStack() as stack:
        out = stack.enter_context(_created(output)) if output else None
        bar = stack.enter_context(progress("{task.description}", quiet=json))
        task = bar.add_task("")

        def show(row: "EvaluatedRow", total: int) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=f"{done} of {total} rows")
            if out is not None:
                out.write(f"{row.model_dump_json(exclude_none=True)}\n")
                out.flush()

        async def ask(client: "AsyncTrainingClient") -> "tuple[str, Evaluation]":
            run_id = await complete_id(client, run)
            return run_id, await client.evaluate(
                run_id, file, scorer=function, rows=rows, max_tokens=max_tokens, on_row=show
            )

        try:
            run_id, found = with_client(ask)
        except BaseException:
            if output is not None and not done:
                output.unlink()
            raise
    if isinstance(found.rows[0].expected, dict):
        name = "label accuracy"
    summary = {
        "run": run_id,
        "file": str(file),
        "scorer": name,
        "rows": len(found.rows),
        "skipped": found.skipped,
        "score": found.score,
    }
    if json:
        write_json(summary)
    else:
        _show(summary, found)
    if min_score is not None and found.score < min_score:
        raise typer.Exit(ExitCode.RUN_FAILED)


_WORST = 5
"""Rows that are shown."""


def _show(summary: dict[str, Any], found: "Evaluation") -> None:
    from training_backends.cli.views.console import (
        Column,
        show_fields,
        show_table,
        stdout,
    )
    from training_backends.cli.views.render import show_note
    from training_backends.core.escape import plural

    out = stdout()
    shown = {**summary, "score": f"{found.score:.3f}"}
    del shown["skipped"]
    show_fields([(key, str(value)) for key, value in shown.items()], out)
    worst = [row for row in sorted(found.rows, key=lambda row: row.score) if row.score < 1]
    columns = [
        Column("line", right=True),
        Column("score", right=True),
        Column("expected", 1, cut=True),
        Column("answer", 2, cut=True),
    ]
    cells = [
        [str(row.line), f"{row.score:.3f}", _short(row.expected), _short(row.answer or row.labels)]
        for row in worst[:_WORST]
    ]
    if cells:
        out.print()
    show_table(columns, cells, out)
    if found.skipped:
        show_note(
            f"{plural(found.skipped, 'row')} skipped: only rows with one user message and its "
            "answer, or with labels, can be evaluated"
        )


def _short(value: Any) -> str:
    return " ".join(str(value or "").split())[:200]


def _created(path: Path) -> Any:
    from training_backends import ConfigError

    try:
        return path.open("x", encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"{path} already exists.", hint="Choose another file name.") from None
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.") from None


def _scorer(
    schema: Path | None, function: str | None, *, is_json: bool
) -> "tuple[str, Scorer | None]":
    """Return the name of a scorer and the scorer; None: the default one."""
    from training_backends.client.evaluation import matches_schema, valid_json

    if is_json:
        return "valid JSON", valid_json
    if schema is not None:
        return f"JSON Schema {schema}", matches_schema(_read_schema(schema))
    if function is not None:
        return function, _imported(function)
    return "exact match", None


def _read_schema(path: Path) -> Any:
    import json

    from training_backends import ConfigError

    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def _imported(name: str) -> "Scorer":
    """Return a user's scorer, whose errors are those of a configuration.

    Raises:
        UsageError: It cannot be imported.
    """
    import math
    from importlib import import_module

    from training_backends import ConfigError
    from training_backends.cli.exit_codes import UsageError

    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:
        raise UsageError(
            f"Cannot import the scorer {name!r}: {type(error).__name__}: {error}",
            hint="Use MODULE:NAME of a function in the working directory or an installed package.",
        ) from error
    finally:
        sys.path.pop(0)

    def score(prompt: str, expected: str, answer: str) -> float:
        try:
            found = float(function(prompt, expected, answer))
        except Exception as error:
            raise ConfigError(
                f"The scorer {name} failed: {type(error).__name__}: {error}",
                hint=f"It was called with the prompt {prompt[:80]!r}.",
            ) from error
        if not math.isfinite(found):
            raise ConfigError(f"The scorer {name} returned {found}.", hint="Return a number.")
        return found

    return score
