"""The command that says what works here, what does not, and what to do about it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import JsonOption, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient

__all__ = ["doctor"]


def doctor(
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Set a damaged run store aside; make a new one of what it and the providers tell.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check the run store and the backends; ends with 1 if something does not work."""
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.render import console, write_json

    async def examine(client: "AsyncTrainingClient") -> dict[str, Any]:
        found: dict[str, Any] = {}
        if recover:
            found["recovery"] = await _recover(client)
        found["checks"] = [await _store_check(client), *await _backend_checks(client)]
        found["ok"] = all(check["ok"] for check in found["checks"])
        return found

    found = with_client(examine)
    if json:
        write_json(found)
    else:
        out = console()
        for line in found.get("recovery", {}).get("lines", ()):
            out.print(line, markup=False)
        for check in found["checks"]:
            mark = "[green]ok[/]  " if check["ok"] else "[red]not ok[/]"
            out.print(f"{mark} [bold]{check['name']}[/]: ", end="")
            out.print(check["message"], markup=False)
            if check["hint"]:
                out.print(f"       {check['hint']}", markup=False)
    if not found["ok"]:
        raise typer.Exit(ExitCode.UNEXPECTED)


async def _store_check(client: "AsyncTrainingClient") -> dict[str, Any]:
    problems = await client.check_store()
    if problems:
        hint = (
            "End all programs that use it, then `training-backends doctor --recover` saves what "
            "can still be read and makes a new store."
        )
        return _check("run store", "; ".join(problems), hint, ok=False)
    runs = await client.list()
    live = sum(not run.status.is_terminal for run in runs)
    return _check("run store", f"{len(runs)} runs, {live} of them not over", None, ok=True)


async def _backend_checks(client: "AsyncTrainingClient") -> list[dict[str, Any]]:
    from training_backends import TrainingBackendError, installed_backends

    checks = []
    for name in installed_backends():
        try:
            health = await client.backend(name).health()
            checks.append(_check(name, health.message, health.hint, ok=health.ok))
        except TrainingBackendError as error:
            checks.append(_check(name, error.message, error.hint, ok=False))
    return checks


async def _recover(client: "AsyncTrainingClient") -> dict[str, Any]:
    if not await client.check_store():
        return {"lines": ["The run store is sound: nothing to recover."]}
    done = await client.recover_store()
    lines = [
        f"The damaged store lies in {done.damaged} now." if done.damaged else "",
        f"{len(done.saved)} runs were saved from it.",
        f"{len(done.found)} more were found at their providers.",
        f"{done.left_out} jobs there say too little to make a run of." if done.left_out else "",
        *(f"{name} could not be asked: {why}" for name, why in done.unasked.items()),
    ]
    return {
        "damaged": done.damaged and str(done.damaged),
        "saved": done.saved,
        "found": done.found,
        "left_out": done.left_out,
        "unasked": dict(done.unasked),
        "lines": [line for line in lines if line],
    }


def _check(name: str, message: str, hint: str | None, *, ok: bool) -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": hint}
