"""The Secret Service of a Linux desktop, with locking of its collection.

`keyring` waits for an unlock dialog without a timeout and can neither query nor lock the
collection. `secretstorage`, a dependency of `keyring`, can.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from training_backends.core.errors import VaultLocked

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend
    from secretstorage import Collection

__all__ = ["SecretService"]


class SecretService:
    """Secrets in the preferred collection of `keyring`.

    Args:
        backend: Stores and reads them: `keyring.backends.SecretService.Keyring`.
        patience: Seconds to wait for the unlock dialog.
    """

    def __init__(self, backend: "KeyringBackend", patience: float) -> None:
        self._backend = backend
        self._patience = patience

    @property
    def name(self) -> str:
        """Display name."""
        return "Secret Service"

    def is_locked(self) -> bool:
        """Return whether access would show a dialog, without showing it."""
        with self._collection() as collection:
            return collection is not None and collection.is_locked()

    def unlock(self, password: object = None) -> None:
        """Show the desktop's password dialog if necessary.

        Raises:
            VaultLocked: The dialog was dismissed or timed out.
        """
        del password  # the desktop's dialog asks for it
        with self._collection() as collection:
            if collection is None or not collection.is_locked():
                return
            try:
                collection.unlock(timeout=self._patience)
            except TimeoutError:
                raise VaultLocked(
                    "The keyring is locked, and its unlock dialog was not answered within "
                    f"{self._patience:g} s.",
                    hint="Unlock the keyring, or set the secret in an environment variable.",
                ) from None
            if collection.is_locked():
                raise VaultLocked(
                    "The keyring is locked; its unlock dialog was dismissed or cannot be shown.",
                    hint="Unlock the keyring, or set the secret in an environment variable. "
                    "Without a desktop, use an encrypted file: "
                    "TRAINING_BACKENDS_CREDENTIALS__KEYRING=file.",
                )

    def lock(self) -> None:
        """Lock the collection for all programs."""
        with self._collection() as collection:
            if collection is not None:
                collection.lock()

    def get_password(self, service: str, username: str) -> str | None:
        """Return a secret, or None."""
        with self._collection() as collection:
            if collection is None:
                return None  # reading would prompt for the password of a new collection
        self.unlock()
        return self._backend.get_password(service, username)

    def set_password(self, service: str, username: str, password: str) -> None:
        """Store a secret."""
        self.unlock()
        self._backend.set_password(service, username, password)

    def delete_password(self, service: str, username: str) -> None:
        """Delete a secret."""
        self.unlock()
        self._backend.delete_password(service, username)

    @contextmanager
    def _collection(self) -> "Iterator[Collection | None]":
        import secretstorage  # noqa: PLC0415  # on Linux only

        with closing(secretstorage.dbus_init()) as connection:
            preferred = getattr(self._backend, "preferred_collection", None)
            arguments = () if preferred is None else (preferred,)
            try:
                found = secretstorage.Collection(connection, *arguments)
            except secretstorage.ItemNotFoundException:
                found = None
            yield found
