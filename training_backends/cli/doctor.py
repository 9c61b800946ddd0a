"""The `doctor` command: effective settings and health checks."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import JsonOption, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient
    from training_backends.client.doctor import Check
    from training_backends.core.settings import Effective

__all__ = ["doctor"]

_STYLES = {"ok": "green", "unused": "dim", "failed": "red"}


def doctor(
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Back up a damaged run store and rebuild it from its readable runs and the "
            "providers' job lists.",
        ),
    ] = False,
    all_settings: Annotated[
        bool, typer.Option("--all", help="Also list settings with default values.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show settings and check the installation.

    Exits with 1 if a check fails.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.vault import terminal_vault
    from training_backends.cli.views.console import stdout, write_json
    from training_backends.client.doctor import diagnose, known_settings
    from training_backends.gateway.settings import GatewaySettings

    settings = known_settings(GatewaySettings)

    async def examine(client: "AsyncTrainingClient") -> "tuple[dict[str, Any], list[Check]]":
        recovery = await _recover(client) if recover else {}
        vault = terminal_vault(client.home)
        keys = {
            "credentials": [entry._asdict() for entry in await vault.list()],
            "sources": list(await vault.sources()),
        }
        checks = [*await diagnose(client, vault), await _gateway_check(), *await _blob_check()]
        return {"recovery": recovery, **keys}, checks

    found, checks = with_client(examine)
    ok = all(check.state != "failed" for check in checks)
    if json:
        write_json(
            {
                "ok": ok,
                "settings": [entry._asdict() for entry in settings],
                **found,
                "checks": [check._asdict() for check in checks],
            }
        )
    else:
        for line in found["recovery"].get("lines", ()):
            stdout().print(line, markup=False)
        _show_settings(settings, all_settings=all_settings)
        _show(found, checks)
    if not ok:
        raise typer.Exit(ExitCode.UNEXPECTED)


def _show_settings(settings: "list[Effective]", *, all_settings: bool) -> None:
    from training_backends.cli.views.console import show_fields, stdout

    out = stdout()
    more = "" if all_settings else " that differ from the defaults (--all lists all)"
    out.print(f"[bold]Settings[/]{more}")
    shown = [entry for entry in settings if all_settings or entry.origin != "default"]
    show_fields([(entry.name, f"{entry.value}  ({entry.origin})") for entry in shown], out)
    if not shown:
        out.print("  none")


def _show(found: dict[str, Any], checks: "list[Check]") -> None:
    from rich.text import Text

    from training_backends.cli.views.console import show_fields, stdout

    out = stdout()
    out.print("[bold]Credentials[/]")
    rows = [("searched in order", ", ".join(found["sources"]))]
    for entry in found["credentials"]:
        unused = f" (unused: {entry['hidden_by']} takes precedence)" if entry["hidden_by"] else ""
        place = f"{entry['provider']}/{entry['profile']}"
        rows.append((place, f"{entry['source']}: {entry['name']}{unused}"))
    show_fields(rows, out)
    out.print("[bold]Checks[/]")
    lines: list[tuple[str | Text, str | None]] = []
    for check in checks:
        state = Text(check.state, _STYLES[check.state])
        hint = check.hint if check.state != "ok" else None
        lines += [(state, f"{check.name}: {check.message}"), ("", hint)]
    show_fields(lines, out)


async def _gateway_check() -> "Check":
    """Check the gateway's settings and run store, and whether its port is open."""
    import anyio
    import anyio.to_thread

    from training_backends import ConfigError
    from training_backends.client.doctor import Check
    from training_backends.core.settings import Settings, load_settings
    from training_backends.gateway.server import server_options
    from training_backends.gateway.settings import GatewaySettings
    from training_backends.store.salvage import check as check_store

    settings = load_settings(GatewaySettings)
    try:
        await anyio.to_thread.run_sync(server_options, settings)
    except ConfigError as error:
        reasons = "; ".join(str(issue) for issue in error.issues)
        return Check("gateway", "failed", f"{error.message} {reasons}".strip(), error.hint)
    root = load_settings(Settings).home.expanduser().absolute() / "gateway"
    store = f"sqlite:///{root / 'runs.db'}"
    if problems := await anyio.to_thread.run_sync(check_store, store):
        hint = f"Run `TRAINING_BACKENDS_HOME={root} training-backends doctor --recover`."
        return Check("gateway", "failed", f"its run store is damaged: {problems[0]}", hint)
    place = f"{settings.host}:{settings.port}"
    try:
        with anyio.fail_after(3):
            stream = await anyio.connect_tcp(settings.host, settings.port)
            await stream.aclose()
    except (OSError, TimeoutError):
        hint = "Start it with `training-backends serve`."
        return Check("gateway", "unused", f"not running at {place}", hint)
    return Check("gateway", "ok", f"listening at {place}")


async def _blob_check() -> "list[Check]":
    """Check the storage of uploaded files, if it is not in the gateway's home."""
    import anyio.to_thread

    from training_backends import TrainingBackendError
    from training_backends.client.doctor import Check
    from training_backends.core.settings import Settings, load_settings
    from training_backends.gateway.gateway import open_blobs
    from training_backends.gateway.settings import GatewaySettings

    settings = load_settings(GatewaySettings)
    if settings.blobs is None:
        return []
    root = load_settings(Settings).home.expanduser().absolute() / "gateway"
    title = "gateway files"
    try:
        blobs = await anyio.to_thread.run_sync(open_blobs, settings, root)
        await anyio.to_thread.run_sync(blobs.check)
    except TrainingBackendError as error:
        return [Check(title, "failed", error.message, error.hint)]
    except OSError as error:
        return [Check(title, "failed", f"{settings.blobs}: {error.strerror}")]
    return [Check(title, "ok", f"{settings.blobs} can be reached")]


async def _recover(client: "AsyncTrainingClient") -> dict[str, Any]:
    if not await client.check_store():
        return {"lines": ["The run store is intact; nothing to recover."]}
    done = await client.recover_store()
    lines = [
        f"Backed up the damaged store to {done.damaged}." if done.damaged else "",
        f"Runs recovered from it: {len(done.saved)}.",
        f"Runs recovered from providers: {len(done.found)}.",
        f"Provider jobs skipped (incomplete data): {done.left_out}." if done.left_out else "",
        *(f"Could not list the jobs of {name}: {why}" for name, why in done.unasked.items()),
    ]
    return {
        "damaged": done.damaged and str(done.damaged),
        "saved": done.saved,
        "found": done.found,
        "left_out": done.left_out,
        "unasked": dict(done.unasked),
        "lines": [line for line in lines if line],
    }
