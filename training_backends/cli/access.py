"""Commands about secrets: provider credentials and the gateway's own keys."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.session import JsonOption, run_async

if TYPE_CHECKING:
    from pathlib import Path

    from training_backends.credentials.vault import CredentialVault
    from training_backends.gateway.keys import KeyStore

__all__ = ["credentials", "keys"]

credentials = typer.Typer(
    help="Store, list and delete provider keys in the keyring.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
keys = typer.Typer(
    help="Create, list and revoke the API keys of this machine's gateway.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="For example mistral.")]
Profile = Annotated[str | None, typer.Option("--profile", "-p", help="One of several accounts.")]


@credentials.command("set")
def set_credential(provider: Provider, profile: Profile = None, json: JsonOption = False) -> None:
    """Store a key, read from a prompt or from standard input, never from an argument."""
    from training_backends.cli.render import console, write_json

    if sys.stdin.isatty():
        secret = typer.prompt(f"Key for {provider}", hide_input=True, err=True)
    else:
        secret = sys.stdin.readline()
    vault = _vault()
    run_async(lambda: vault.set(provider, secret, profile=profile))
    if json:
        write_json({"provider": provider, "profile": profile, "stored": True})
    else:
        console().print(f"Stored the key for {_name(provider, profile)}.", markup=False)


@credentials.command("list")
def list_credentials(json: JsonOption = False) -> None:
    """Show which keys are known and where each comes from, never their values."""
    from training_backends.cli.render import console, write_json

    found = run_async(_vault().list)
    if json:
        write_json([entry._asdict() for entry in found])
        return
    out = console()
    for entry in found:
        name = _name(entry.provider, entry.profile)
        out.print(f"  {name:<24} {entry.source}", markup=False)
    if not found:
        out.print("No keys are known. `training-backends credentials set PROVIDER` stores one.")


@credentials.command("delete")
def delete_credential(
    provider: Provider, profile: Profile = None, json: JsonOption = False
) -> None:
    """Delete a stored key."""
    from training_backends.cli.render import console, write_json

    vault = _vault()
    run_async(lambda: vault.delete(provider, profile=profile))
    if json:
        write_json({"provider": provider, "profile": profile, "deleted": True})
    else:
        console().print(f"Deleted the key for {_name(provider, profile)}.", markup=False)


def _vault() -> "CredentialVault":
    from training_backends.credentials.vault import CredentialVault

    return CredentialVault(home=_home())


def _name(provider: str, profile: str | None) -> str:
    return f"{provider}/{profile}" if profile else provider


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option("--name", help="What or whom the key is for.")] = "",
    json: JsonOption = False,
) -> None:
    """Make a key for the gateway; it is shown this once."""
    from training_backends.cli.render import console, write_json

    made = _keys().create(name)
    key = made.key.get_secret_value()
    if json:
        write_json({"id": made.info.id, "name": made.info.name, "key": key})
        return
    out = console()
    out.print(f"Key {made.info.id}, shown this once:", markup=False)
    out.print(f"  {key}", markup=False)


@keys.command("list")
def list_keys(json: JsonOption = False) -> None:
    """Show the gateway's keys, never their values."""
    from dataclasses import asdict

    from training_backends.cli.render import console, write_json

    found = _keys().list()
    if json:
        write_json([{**asdict(key), "active": key.active} for key in found])
        return
    out = console()
    for key in found:
        state = "active" if key.active else "revoked"
        made = key.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
        out.print(f"  {key.id}  {state:<8} {made}  {key.name}", markup=False)
    if not found:
        out.print("No keys yet. `training-backends keys create` makes one.", markup=False)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    json: JsonOption = False,
) -> None:
    """Make a key useless from the next request on."""
    from training_backends.cli.render import console, write_json

    revoked = _keys().revoke(key_id)
    if json:
        write_json({"id": revoked.id, "active": revoked.active})
    else:
        console().print(f"Revoked {revoked.id}.", markup=False)


def _keys() -> "KeyStore":
    from training_backends.gateway.keys import open_keys

    return open_keys(_home())


def _home() -> "Path":
    from training_backends.core.settings import Settings, load_settings

    return load_settings(Settings).home.expanduser().absolute()
