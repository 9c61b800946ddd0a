"""Commands about secrets: provider credentials and the gateway's own keys."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_backends.cli.completion import complete_backend, complete_key
from training_backends.cli.session import JsonOption, run_async

if TYPE_CHECKING:
    from pathlib import Path

    from training_backends.credentials.vault import CredentialInfo
    from training_backends.gateway.keys import KeyInfo, KeyStore

__all__ = ["credentials", "home_directory", "keys"]

credentials = typer.Typer(
    help="Manage provider API keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
keys = typer.Typer(
    help="Manage the gateway's API keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Provider = Annotated[
    str,
    typer.Argument(
        metavar="PROVIDER",
        help="Provider name, such as mistral.",
        autocompletion=complete_backend,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", "-p", metavar="NAME", help="Account, if you have several."),
]


@credentials.command("set", context_settings={"allow_extra_args": True})
def set_credential(
    context: typer.Context, provider: Provider, profile: Profile = None, json: JsonOption = False
) -> None:
    """Store a key read from a prompt or standard input."""
    from pydantic import SecretStr

    from training_backends.cli.vault import source_of, terminal_vault
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.credentials.vault import check_names

    check_names(provider, profile)
    if context.args:
        # typer's own message would repeat the key.
        raise typer.BadParameter(
            "the key cannot be passed as an argument, where process lists and the shell history "
            "expose it. Pass it on standard input, and rotate a key that was typed here."
        )
    if sys.stdin.isatty():
        secret = SecretStr(typer.prompt(f"Key for {provider}", hide_input=True, err=True))
    else:
        secret = SecretStr(sys.stdin.readline())
    vault = terminal_vault(home_directory())

    async def store() -> "CredentialInfo | None":
        await vault.set(provider, secret, profile=profile)
        return await source_of(vault, provider, profile)

    used = run_async(store)
    if json:
        write_json({"provider": provider, "profile": profile, "stored": True})
        return
    out = stderr()
    out.print(f"Stored the key for {_name(provider, profile)}.", markup=False)
    if used and used.source == "environment":
        out.print(f"Not used here: {used.name} is set and takes precedence.", markup=False)


@credentials.command("list")
def list_credentials(json: JsonOption = False) -> None:
    """List keys and their sources, never their values."""
    from training_backends.cli.vault import terminal_vault
    from training_backends.cli.views.console import (
        Column,
        ago,
        show_table,
        stderr,
        stdout,
        write_json,
    )

    vault = terminal_vault(home_directory())

    async def read() -> "tuple[tuple[CredentialInfo, ...], tuple[str, ...]]":
        return await vault.list(), await vault.sources()

    found, order = run_async(read)
    if json:
        write_json([entry._asdict() for entry in found])
        return
    columns = (
        Column("provider"),
        Column("source"),
        Column("variable", drop=2),
        Column("stored", drop=3),
        Column("note", drop=1, cut=True),
    )
    rows = [
        (
            _name(entry.provider, entry.profile),
            entry.source,
            entry.name if entry.source == "environment" else "",
            ago(entry.stored_at) if entry.stored_at else "",
            f"not used: {entry.hidden_by} takes precedence" if entry.hidden_by else "",
        )
        for entry in found
    ]
    if rows:
        show_table(columns, rows, stdout())
    out = stderr()
    out.print(f"Sources searched, in order: {', '.join(order)}.", markup=False)
    if not found:
        out.print("No keys found. Store one with `training-backends credentials set PROVIDER`.")


@credentials.command("delete")
def delete_credential(
    provider: Provider, profile: Profile = None, json: JsonOption = False
) -> None:
    """Delete a stored key."""
    from training_backends.cli.vault import terminal_vault
    from training_backends.cli.views.console import stderr, write_json

    vault = terminal_vault(home_directory())
    run_async(lambda: vault.delete(provider, profile=profile))
    if json:
        write_json({"provider": provider, "profile": profile, "deleted": True})
    else:
        stderr().print(f"Deleted the key for {_name(provider, profile)}.", markup=False)


@credentials.command("test")
def try_credential(provider: Provider, profile: Profile = None, json: JsonOption = False) -> None:
    """Test a key with one read-only request.

    Exits with 4 if the provider rejects it.
    """
    from training_backends.cli.vault import source_of, terminal_vault
    from training_backends.cli.views.console import stdout, write_json
    from training_backends.client.doctor import server_of, try_key

    vault = terminal_vault(home_directory())
    server = server_of(provider)
    if server and not json:
        typer.echo(f"Testing the key for {_name(provider, profile)} at {server} …", err=True)

    async def find_out() -> "CredentialInfo | None":
        await try_key(vault, provider, profile)
        return await source_of(vault, provider, profile)

    used = run_async(find_out)
    source = used.source if used else "keyring"
    if json:
        document = {"provider": provider, "profile": profile, "accepted": True, "source": source}
        write_json({**document, "server": server})
        return
    place = used.name if used and source == "environment" else f"the {source}"
    out = stdout()
    out.print(f"The key for {_name(provider, profile)} from {place} is accepted.", markup=False)


def _name(provider: str, profile: str | None) -> str:
    return f"{provider}/{profile}" if profile and profile != "default" else provider


@keys.command("create")
def create_key(
    name: Annotated[
        str, typer.Option("--name", metavar="TEXT", help="Description of the key.")
    ] = "",
    scope: Annotated[
        Literal["read", "write", "admin"],
        typer.Option("--scope", help="read: GET requests only; admin: all projects."),
    ] = "write",
    project: Annotated[
        str,
        typer.Option("--project", metavar="NAME", help="Project that the key gives access to."),
    ] = "default",
    expires: Annotated[
        str | None,
        typer.Option("--expires", metavar="WHEN", help="30d, 12h or 2027-01-31; default: never."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only the key, without the note about it.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Create a gateway key; it is shown only once."""
    from training_backends.cli.views.console import stderr, stdout, write_json
    from training_backends.gateway.keys import read_expiry

    ending = None if expires is None else read_expiry(expires)
    made = _keys().create(name, scope=scope, project=project, expires_at=ending)
    key = made.key.get_secret_value()
    if json:
        write_json({**_key_document(made.info), "key": key})
        return
    if not quiet:
        until = f"until {_minute(ending)}" if ending else "until it is revoked"
        where = "all projects" if scope == "admin" else f"project {project}"
        note = f"Key {made.info.id} ({scope}, {where}), valid {until}; shown only once:"
        stderr().print(note, markup=False)
    stdout().print(key, markup=False)


@keys.command("list")
def list_keys(json: JsonOption = False) -> None:
    """List the gateway's keys, never their values."""
    from training_backends.cli.views.console import (
        Column,
        ago,
        show_table,
        stderr,
        stdout,
        write_json,
    )

    found = _keys().list()
    if json:
        write_json([_key_document(key) for key in found])
        return
    if not found:
        stderr().print("No keys yet. Create one with `training-backends keys create`.")
        return
    columns = (
        Column("key"),
        Column("state"),
        Column("scope", drop=3),
        Column("project", drop=2, cut=True),
        Column("created", drop=6),
        Column("expires", drop=4),
        Column("last used", drop=5),
        Column("name", drop=1, cut=True),
    )
    rows = [
        (
            key.id,
            key.state,
            key.scope,
            key.project,
            ago(key.created_at),
            _minute(key.expires_at) if key.expires_at else "never",
            ago(key.last_used_at) if key.last_used_at else "never",
            key.name,
        )
        for key in found
    ]
    show_table(columns, rows, stdout())


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="Key id, from `keys list`.", autocompletion=complete_key),
    ],
    json: JsonOption = False,
) -> None:
    """Revoke a key, effective immediately."""
    from training_backends.cli.views.console import stderr, write_json

    revoked = _keys().revoke(key_id)
    if json:
        write_json(_key_document(revoked))
    else:
        stderr().print(f"Revoked {revoked.id}.", markup=False)


def _key_document(key: "KeyInfo") -> dict[str, object]:
    """Return the JSON representation of a key."""
    from dataclasses import asdict

    document: dict[str, object] = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in asdict(key).items()
    }
    return {**document, "state": key.state, "active": key.state == "active"}


def _minute(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _keys() -> "KeyStore":
    from training_backends.core.settings import load_settings
    from training_backends.gateway.keys import open_keys
    from training_backends.gateway.settings import GatewaySettings

    return open_keys(home_directory(), load_settings(GatewaySettings).store_url)


def home_directory() -> "Path":
    """Return the home of the settings."""
    from training_backends.core.settings import Settings, load_settings

    return load_settings(Settings).home.expanduser().absolute()
