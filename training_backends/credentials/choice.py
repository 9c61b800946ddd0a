"""Select the keyring of a vault, and unlock it if it is the encrypted file."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from anyio import to_thread
from pydantic import Field, SecretStr

from training_backends.core.settings import SectionSettings, Settings, load_settings
from training_backends.credentials.encrypted_file import (
    FileKeyring,
    read_password_descriptor,
    read_password_file,
)
from training_backends.credentials.index import CredentialIndex
from training_backends.credentials.keyring_access import Keyring

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

__all__ = ["AskPassword", "Choice", "CredentialSettings", "KeyringChoice"]


class CredentialSettings(SectionSettings):
    """Section `credentials`; settings contain no password, only where to read it."""

    section: ClassVar[str | None] = "credentials"

    keyring: Literal["system", "file"] = Field(
        default="system", description="The system keyring, or an encrypted file in home."
    )
    password_file: Path | None = Field(
        default=None, description="File with the keyring password in its first line; mode 600."
    )
    password_fd: int | None = Field(
        default=None, ge=3, description="Open file descriptor to read the keyring password from."
    )


AskPassword = Callable[[bool], SecretStr | None]
"""Prompts for the password of the encrypted file; True: for a new password."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The selected keyring.

    Attributes:
        ring: The keyring.
        index: Names of the secrets stored in it.
        settings: Section `credentials`.
        file: The encrypted file, if that is the keyring.
    """

    ring: Keyring
    index: CredentialIndex
    settings: CredentialSettings
    file: FileKeyring | None


class KeyringChoice:
    """The keyring from the settings, selected on first use.

    Args:
        home: Directory of the index and the encrypted file; None: home from the settings.
        settings: Overrides section `credentials`.
        backend: Overrides the keyring from the settings.
        timeout: Seconds to wait for a response of the keyring.
        ask: Prompts for the encrypted file's password if the settings name no source for it;
            called in the event loop.
    """

    def __init__(
        self,
        *,
        home: Path | None,
        settings: CredentialSettings | None,
        backend: "KeyringBackend | None",
        timeout: float,
        ask: AskPassword | None,
    ) -> None:
        self._home = home
        self._settings = settings
        self._backend = backend
        self._timeout = timeout
        self._ask = ask
        self._made: Choice | None = None
        self._making = threading.Lock()

    async def made(self) -> Choice:
        """Return the selected keyring."""
        return await to_thread.run_sync(self._make)

    async def opened(self, *, to_write: bool) -> Keyring:
        """Return the keyring, after prompting for its password if necessary."""
        choice = await self.made()
        if choice.file is not None and not choice.file.is_shut:
            password = self.typed_password(choice, to_write=to_write)
            if password is not None:
                choice.file.unlock(password)
        return choice.ring

    def typed_password(self, choice: Choice, *, to_write: bool) -> SecretStr | None:
        """Prompt for the encrypted file's password if it is needed and has no other source.

        Blocks the event loop on purpose: in a thread, the prompt would outlive Ctrl-C, and
        another task could prompt a second time.
        """
        settings, file = choice.settings, choice.file
        is_named = settings.password_fd is not None or settings.password_file is not None
        if self._ask is None or file is None or is_named:
            return None
        is_needed = file.is_locked() and (to_write or file.exists)
        return self._ask(not file.exists) if is_needed else None

    def _make(self) -> Choice:
        with self._making:
            if self._made is None:
                home = self._home or load_settings(Settings).home.expanduser()
                settings = self._settings or load_settings(CredentialSettings)
                file = None
                if self._backend is None and settings.keyring == "file":
                    file = FileKeyring(home / "credentials.keyring", partial(_password, settings))
                index = CredentialIndex(home / f"credentials{'-file' if file else ''}.json")
                ring = Keyring(timeout=self._timeout, backend=file or self._backend)
                self._made = Choice(ring=ring, index=index, settings=settings, file=file)
            return self._made


def _password(settings: CredentialSettings) -> SecretStr | None:
    if settings.password_fd is not None:
        return read_password_descriptor(settings.password_fd)
    if settings.password_file is not None:
        return read_password_file(settings.password_file.expanduser())
    return None
