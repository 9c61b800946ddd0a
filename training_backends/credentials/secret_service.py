"""The Secret Service of a Linux desktop, with the lock of the collection that it keeps.

`keyring` waits for an unlock dialogue for as long as it is open, and offers neither a look
at the lock nor a way to close it. Both are a call of `secretstorage`, which `keyring` brings.
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
    """Secrets in the collection that `keyring` prefers.

    Args:
        backend: What stores and reads them: `keyring.backends.SecretService.Keyring`.
        patience: Seconds for which an unlock dialogue may stay open.
    """

    def __init__(self, backend: "KeyringBackend", patience: float) -> None:
        self._backend = backend
        self._patience = patience

    @property
    def name(self) -> str:
        """What it is, for people."""
        return "Secret Service"

    def is_locked(self) -> bool:
        """Tell whether a dialogue would come up, without one."""
        with self._collection() as collection:
            return collection is not None and collection.is_locked()

    def unlock(self, password: object = None) -> None:
        """Let the desktop ask for the password, if it has to.

        Raises:
            VaultLocked: The dialogue was closed, or stayed open for too long.
        """
        del password  # the desktop's own dialogue asks for it
        with self._collection() as collection:
            if collection is None or not collection.is_locked():
                return
            try:
                collection.unlock(timeout=self._patience)
            except TimeoutError:
                raise VaultLocked(
                    "The keyring is locked, and nobody answered its dialogue within "
                    f"{self._patience:g} seconds.",
                    hint="Unlock the keyring, or set the secret in an environment variable.",
                ) from None
            if collection.is_locked():
                raise VaultLocked(
                    "The keyring is locked, and its dialogue was closed or cannot be shown here.",
                    hint="Unlock the keyring, or set the secret in an environment variable; "
                    "without a desktop an encrypted file serves as a keyring: "
                    "TRAINING_BACKENDS_CREDENTIALS__KEYRING=file.",
                )

    def lock(self) -> None:
        """Lock the collection, for all programs."""
        with self._collection() as collection:
            if collection is not None:
                collection.lock()

    def get_password(self, service: str, username: str) -> str | None:
        """Return a secret; None where there is none."""
        with self._collection() as collection:
            if collection is None:
                return None  # reading would ask for the password of a new one
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
