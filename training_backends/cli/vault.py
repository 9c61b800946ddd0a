"""The credential vault as a person at a terminal has it, and the trial of a key."""

import sys
from signal import SIGINT, default_int_handler, signal
from typing import TYPE_CHECKING

import typer
from pydantic import SecretStr

from training_backends.core.backend import BackendContext, RemoteFilters
from training_backends.core.errors import UnsupportedOperation
from training_backends.core.plugins import installed_backends
from training_backends.core.registry import backend_class
from training_backends.core.settings import Settings, load_settings
from training_backends.credentials.vault import (
    KEYRING_TIMEOUT,
    CredentialInfo,
    CredentialVault,
    check_names,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["source_of", "terminal_vault", "try_key"]

_PATIENCE = 60.0
"""Seconds for a person to type a password into the desktop's dialogue."""
_NOBODYS_SUFFIX = "credentials-test"
"""Runs of this name are listed to try a key: none, so that one request tells all."""


def terminal_vault(home: "Path | None" = None) -> CredentialVault:
    """Return the vault that asks for the password of an encrypted keyring on a terminal."""
    timeout = _PATIENCE if sys.stdin.isatty() else KEYRING_TIMEOUT
    return CredentialVault(home=home, timeout=timeout, ask=_ask_password)


def _ask_password(new: bool) -> SecretStr | None:
    """Ask without an echo, with a Ctrl-C that is heard at once; None where nobody is there."""
    if not sys.stdin.isatty():
        return None
    text = "New password for the encrypted keyring" if new else "Password of the encrypted keyring"
    handler = signal(SIGINT, default_int_handler)
    try:
        return SecretStr(typer.prompt(text, hide_input=True, confirmation_prompt=new, err=True))
    finally:
        signal(SIGINT, handler)


async def source_of(
    vault: CredentialVault, provider: str, profile: str | None
) -> CredentialInfo | None:
    """Say where the key of a provider comes from, if anything known has one."""
    wanted = check_names(provider, profile)
    known = [info for info in await vault.list() if (info.provider, info.profile) == wanted]
    return next((info for info in known if info.hidden_by is None), None)


async def try_key(vault: CredentialVault, provider: str, profile: str | None) -> None:
    """Ask the provider for something that changes nothing, with this key.

    Raises:
        CredentialNotFound: There is no key.
        AuthenticationFailed: The provider does not accept it.
        BackendUnavailable: The provider cannot be reached.
        UnsupportedOperation: No installed backend works with this key.
    """
    name, profile = check_names(provider, profile)
    if name not in installed_backends():
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: no backend of this name is installed.",
            hint="`training-backends backends` lists what is installed.",
        )
    key = _OneKey(vault, name, profile)
    context = BackendContext(home=load_settings(Settings).home.expanduser(), credentials=key)
    backend = backend_class(name).create(context)
    try:
        if backend.capabilities.lists_remote:
            await backend.list_remote(RemoteFilters(suffix=_NOBODYS_SUFFIX))
    finally:
        await backend.aclose()
    if not key.was_asked:
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: the backend asked for none.", backend=name
        )


class _OneKey:
    """Gives a backend the key that is to be tried, whichever profile it is set to use."""

    def __init__(self, vault: CredentialVault, provider: str, profile: str) -> None:
        self._vault = vault
        self._provider = provider
        self._profile = profile
        self.was_asked = False

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the key, and any other as the vault has it."""
        if provider != self._provider:
            return await self._vault.get(provider, profile)
        self.was_asked = True
        return await self._vault.get(provider, self._profile)
