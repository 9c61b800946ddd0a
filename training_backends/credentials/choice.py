"""Which keyring a vault uses, and who opens it if it is the encrypted file."""

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
    """Section `credentials`; no setting holds a password, only where it is read."""

    section: ClassVar[str | None] = "credentials"

    keyring: Literal["system", "file"] = Field(
        default="system", description="The system's keyring, or an encrypted file in home."
    )
    password_file: Path | None = Field(
        default=None, description="Its first line opens the encrypted file; for its owner only."
    )
    password_fd: int | None = Field(
        default=None, ge=3, description="An open descriptor whose first line opens the file."
    )


AskPassword = Callable[[bool], SecretStr | None]
"""Asks a person for the password of the encrypted file, for a new one if True."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen.

    Attributes:
        ring: The keyring.
        index: Names what this vault put there.
        settings: Section `credentials`.
        file: The encrypted file, where that is the keyring.
    """

    ring: Keyring
    index: CredentialIndex
    settings: CredentialSettings
    file: FileKeyring | None


class KeyringChoice:
    """The keyring of the settings, chosen when it is first needed.

    Args:
        home: Where index and encrypted file lie; None for the home of the settings.
        settings: Used instead of section `credentials`.
        backend: Used instead of the keyring of the settings.
        timeout: Seconds to wait for one answer of the keyring.
        ask: Called, in the event loop, when nothing else gives the encrypted file's password.
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
        """Return what the settings say."""
        return await to_thread.run_sync(self._make)

    async def opened(self, *, to_write: bool) -> Keyring:
        """Return the keyring, opened by a person where only a person can."""
        choice = await self.made()
        if choice.file is not None and not choice.file.is_shut:
            password = self.typed_password(choice, to_write=to_write)
            if password is not None:
                choice.file.unlock(password)
        return choice.ring

    def typed_password(self, choice: Choice, *, to_write: bool) -> SecretStr | None:
        """Ask for the encrypted file's password, if it is needed and nothing else gives it.

        The event loop stands still meanwhile: in a thread the question would stay open after a
        Ctrl-C, and another task would ask it a second time.
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
