"""Credential vault for interactive use: prompts for the keyring password."""

import sys
from typing import TYPE_CHECKING

import typer
from pydantic import SecretStr

from training_backends.cli.terminal import interruptible
from training_backends.credentials.vault import (
    KEYRING_TIMEOUT,
    CredentialInfo,
    CredentialVault,
    check_names,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["source_of", "terminal_vault"]

_PATIENCE = 60.0
"""Seconds allowed for typing a password into the desktop's keyring dialog."""


def terminal_vault(home: "Path | None" = None) -> CredentialVault:
    """Return a vault that prompts for the encrypted keyring's password on a terminal."""
    timeout = _PATIENCE if sys.stdin.isatty() else KEYRING_TIMEOUT
    return CredentialVault(home=home, timeout=timeout, ask=_ask_password)


def _ask_password(new: bool) -> SecretStr | None:
    """Prompt without echo; return None if standard input is not a terminal."""
    if not sys.stdin.isatty():
        return None
    text = "New password for the encrypted keyring" if new else "Password of the encrypted keyring"
    with interruptible():
        return SecretStr(typer.prompt(text, hide_input=True, confirmation_prompt=new, err=True))


async def source_of(
    vault: CredentialVault, provider: str, profile: str | None
) -> CredentialInfo | None:
    """Return the credential that is used for a provider, or None if there is none."""
    wanted = check_names(provider, profile)
    known = [info for info in await vault.list() if (info.provider, info.profile) == wanted]
    return next((info for info in known if info.hidden_by is None), None)
