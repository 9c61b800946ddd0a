"""Commands that run before a launch: backends, validate, estimate."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import (
    BackendOption,
    ConfigArgument,
    JsonOption,
    SetOption,
    backend_of,
    located,
    with_client,
)

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient

__all__ = ["backends", "estimate", "validate"]


def backends(json: JsonOption = False) -> None:
    """List installed backends and their capabilities."""
    from rich.markup import escape

    from training_backends import TrainingBackendError, installed_backends
    from training_backends.cli.views.render import console, write_json
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
    out = console()
    for entry in found:
        out.print(f"[bold]{escape(entry['name'])}[/] [dim]({escape(entry['package'])})[/]")
        if "error" in entry:
            out.print(f"  [red]unavailable:[/] {escape(entry['error'])}")
            continue
        out.print(f"  {entry['summary']}", markup=False)
        if "missing" in entry:
            out.print(f"  [yellow]{escape(entry['missing'])}[/]")
        for line in _capability_lines(entry["capabilities"]):
            out.print(f"  {line}", markup=False)


_RESUMES = {"anew": "resume from the start", "checkpoint": "resume from a checkpoint"}
"""What the values of `Capabilities.resumes` mean."""


def _capability_lines(capabilities: dict[str, Any]) -> list[str]:
    yes = [name.replace("_", " ") for name, value in capabilities.items() if value is True]
    yes += ["suffix"] if capabilities["suffix"] else []
    if capabilities["resumes"] != "no":
        yes.append(_RESUMES[capabilities["resumes"]])
    lists = [
        f"{name}: {', '.join(sorted(value))}"
        for name, value in capabilities.items()
        if isinstance(value, list) and value
    ]
    rows = capabilities["provider_format"]["formats"]
    return [*lists, f"row formats: {', '.join(rows)}", f"supports: {', '.join(yes)}"]


def validate(
    config: ConfigArgument,
    backend: BackendOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a configuration and its data without uploading."""
    from rich.markup import escape

    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.render import (
        console,
        issue_document,
        show_dataset,
        show_issues,
        write_json,
    )
    from training_backends.client.config_file import load_config

    file = load_config(config, overrides or ())
    name = backend_of(file, backend)
    with located(file, backend):
        report = with_client(lambda client: client.validate(file.config, backend=name))
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
        out = console()
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
    from training_backends.cli.views.render import CountView, show_estimate, write_json
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
                file.config, backend=name, sample=sample, exact=exact, on_counting=view.progress
            )
        )
    if json:
        write_json(found.model_dump(mode="json"))
    else:
        show_estimate(found)
