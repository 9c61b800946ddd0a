"""Commands that run before a launch: backends, init, validate, estimate."""

import shlex
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from training_backends.cli.completion import complete_backend
from training_backends.cli.session import (
    BackendOption,
    ConfigArgument,
    JsonOption,
    SetOption,
    backend_of,
    command,
    located,
    with_client,
)

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient
    from training_backends.core.capabilities import Capabilities

__all__ = ["backends", "estimate", "init", "validate"]

_TEMPLATE: Final = """\
# Configuration of a fine-tuning run.
#   training-backends validate {file}
#   training-backends launch {file} --follow

backend: {backend}
model: {model}
method: {method:<18} # {methods}

data:
  train: train.jsonl       # one example per line; the path is relative to this file
{validation}
hyperparameters:
  epochs: 3                # or training_steps; the backend chooses what is not set
  # learning_rate: 0.0001
  # batch_size: 8
  # seq_len: 2048          # longer rows are truncated
{rest}"""
_DEFAULT_BACKEND: Final = "local"
_MODELS: Final = {"local": "tiny-mistral", "mistral": "open-mistral-7b"}
"""Models that the templates of the built-in backends start with."""


def backends(json: JsonOption = False) -> None:
    """List installed backends and their capabilities."""
    from rich.markup import escape

    from training_backends import TrainingBackendError, installed_backends
    from training_backends.cli.views.console import show_fields, stdout, write_json
    from training_backends.client.doctor import PACKAGE, check_extras

    extras = {check.name: check for check in check_extras()}

    async def describe(client: "AsyncTrainingClient") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, package in installed_backends().items():
            entry: dict[str, Any] = {"name": name, "package": package}
            try:
                backend = client.backend(name)
                entry["summary"] = backend.summary
                entry["capabilities"] = backend.capabilities.model_dump(mode="json")
            except TrainingBackendError as error:
                entry["error"] = error.message
            extra = extras.get(f"extra {name}")
            if extra and extra.state != "ok" and package == PACKAGE:
                entry["missing"] = f"{extra.message}; {extra.hint}"
            found.append(entry)
        return found

    found = with_client(describe)
    if json:
        write_json(found)
        return
    out = stdout()
    for entry in found:
        out.print(f"[bold]{escape(entry['name'])}[/] [dim]({escape(entry['package'])})[/]")
        if "error" in entry:
            show_fields([("unavailable", entry["error"])], out, style="red")
            continue
        missing = [("missing", entry["missing"])] if "missing" in entry else []
        fields = [("about", entry["summary"]), *missing]
        show_fields([*fields, *_capability_fields(entry["capabilities"])], out, style="dim")


_RESUMES = {"anew": "resume from the start", "checkpoint": "resume from a checkpoint"}
"""What the values of `Capabilities.resumes` mean."""


def _capability_fields(capabilities: dict[str, Any]) -> list[tuple[str, str]]:
    yes = [name.replace("_", " ") for name, value in capabilities.items() if value is True]
    yes += ["suffix"] if capabilities["suffix"] else []
    if capabilities["resumes"] != "no":
        yes.append(_RESUMES[capabilities["resumes"]])
    lists = [
        (name.replace("_", " "), ", ".join(sorted(value)))
        for name, value in capabilities.items()
        if isinstance(value, list)
    ]
    rows = capabilities["provider_format"]["formats"] if capabilities["inspects"] else []
    return [*lists, ("row formats", ", ".join(rows)), ("supports", ", ".join(yes))]


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("run.yaml"),
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Backend of the run.",
            show_default="local",
            autocompletion=complete_backend,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema instead; write nothing.")
    ] = False,
    with_schema: Annotated[
        bool,
        typer.Option("--with-schema", help="Write the JSON Schema beside FILE, for editors."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented configuration to start from.

    Never overwrites a file. With --schema and no --backend, the schema is that of all backends.
    """
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.client.config_schema import config_schema

    if schema and with_schema:
        raise typer.BadParameter("give --schema or --with-schema, not both", param_hint="--schema")

    async def read(client: "AsyncTrainingClient") -> "tuple[Capabilities | None, dict[str, Any]]":
        if schema and backend is None:
            return None, config_schema()
        found = client.backend(backend or _DEFAULT_BACKEND)
        return found.capabilities, config_schema(found) if schema or with_schema else {}

    capabilities, document = with_client(read)
    if schema or capabilities is None:
        write_json(document)
        return
    text = _template(str(file), backend or _DEFAULT_BACKEND, capabilities)
    written = {"path": str(file)}
    if with_schema:
        beside = file.with_suffix(".schema.json")
        written["schema"] = str(beside)
        text = f"# yaml-language-server: $schema={beside.name}\n{text}"
        _write_new(beside, f"{dumps(document, indent=2)}\n")
    _write_new(file, text)
    if json:
        write_json(written)
        return
    stderr().print(f"Wrote {file}. Edit it, then:", markup=False)
    for line in (command("validate", str(file)), command("launch", str(file), "--follow")):
        stderr().print(f"  {line}", markup=False)


def _write_new(file: Path, text: str) -> None:
    from training_backends import ConfigError

    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} already exists.", hint="Choose another file name.") from None


def _template(file: str, backend: str, capabilities: "Capabilities") -> str:
    """Return the configuration that `init` writes."""
    methods = sorted(capabilities.methods)
    rest = []
    if tunings := capabilities.tunings:
        default = "lora" if "lora" in tunings else min(tunings)
        rest += ["", f"# tuning: {default:<16} # {', '.join(sorted(tunings))}"]
    if capabilities.suffix:
        rest += ["", "# suffix: my-model         # part of the name of the trained model"]
    rest += ["", "# budget:                  # reject the launch if the estimate is higher"]
    if capabilities.quotes:
        rest.append("#   max_cost: 25 USD")
    rest.append("#   max_duration: 8h")
    return _TEMPLATE.format(
        file=shlex.quote(file),
        backend=backend,
        model=_MODELS.get(backend, "base-model"),
        method="sft" if "sft" in methods else methods[0],
        methods=", ".join(methods),
        validation="  # validation: validation.jsonl\n" * capabilities.validation_files,
        rest="".join(f"{line}\n" for line in rest),
    )


def validate(
    config: ConfigArgument,
    backend: BackendOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a configuration and its data without uploading."""
    from rich.markup import escape

    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.console import stdout, write_json
    from training_backends.cli.views.render import issue_document, show_dataset, show_issues
    from training_backends.client.config_file import load_config

    file = load_config(config, overrides or ())
    name = backend_of(file, backend)
    with located(file, backend):
        report = with_client(lambda client: client.validate(file, backend=name))
        issues = file.located(report.issues)
    if json:
        found = report.dataset.files if report.dataset else ()
        files = [each.model_dump(mode="json") for each in found]
        write_json(
            {
                "ok": report.ok,
                "backend": name,
                "files": files,
                "issues": [issue_document(issue) for issue in issues],
            }
        )
    else:
        out = stdout()
        if report.dataset:
            show_dataset(report.dataset, out)
        show_issues(issues, out)
        verdict = "[green]ready to launch[/]" if report.ok else "[red]invalid[/]"
        out.print(f"{escape(config.name)} on {escape(name)}: {verdict}")
    if not report.ok:
        raise typer.Exit(ExitCode.INVALID)


def estimate(
    config: ConfigArgument,
    backend: BackendOption = None,
    overrides: SetOption = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample-rows",
            min=2,
            metavar="ROWS",
            help="Estimate from a random sample of ROWS rows.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Count every row, even in large files.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Estimate the tokens, steps, cost and time of a run."""
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.render import CountView, show_estimate
    from training_backends.client.config_file import load_config

    if exact and sample is not None:
        raise typer.BadParameter(
            "give --sample-rows or --exact, not both", param_hint="--sample-rows"
        )
    file = load_config(config, overrides or ())
    name = backend_of(file, backend)
    with located(file, backend), CountView(quiet=json) as view:
        found = with_client(
            lambda client: client.estimate(
                file, backend=name, sample=sample, exact=exact, on_counting=view.progress
            )
        )
    if json:
        write_json(found.model_dump(mode="json"))
    else:
        show_estimate(found)
