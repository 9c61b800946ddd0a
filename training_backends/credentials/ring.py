"""The system's keyring, asked so that it can never hold the program up.

`keyring` is imported on the first call. Every call runs in a daemon thread and is waited
for only so long; while one hangs, no second one is started.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Final, TypeVar

from training_backends.core.errors import VaultLocked

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

__all__ = ["SERVICE", "Keyring"]

SERVICE: Final = "training-backends"

_T = TypeVar("_T")


class Keyring:
    """Secrets under the service name of this package.

    Args:
        timeout: Seconds to wait for one answer of the keyring.
        backend: The keyring to use instead of the system's.
    """

    def __init__(self, *, timeout: float, backend: "KeyringBackend | None" = None) -> None:
        self._timeout = timeout
        self._backend = backend
        self._free = threading.Lock()

    def get(self, username: str) -> str | None:
        """Return the secret, or None where there is none or no keyring at all.

        Raises:
            VaultLocked: The keyring is locked, did not answer in time, or broke.
        """
        return self._bounded(lambda: self._get(username))

    def set(self, username: str, secret: str) -> None:
        """Store the secret and make sure that it is there.

        Raises:
            VaultLocked: The keyring is locked or there is none that keeps what it is given.
        """
        self._bounded(lambda: self._set(username, secret))

    def delete(self, username: str) -> bool:
        """Delete the secret; False where there was none.

        Raises:
            VaultLocked: The keyring is locked or did not answer in time.
        """
        return self._bounded(lambda: self._delete(username))

    def describe(self) -> str | None:
        """Return the name of the keyring in use; None where there is none.

        Raises:
            VaultLocked: It did not answer in time.
        """
        backend = self._bounded(self._chosen)
        return None if backend is None else _name(backend)

    def _get(self, username: str) -> str | None:
        backend = self._chosen()
        return None if backend is None else backend.get_password(SERVICE, username)

    def _set(self, username: str, secret: str) -> None:
        backend = self._chosen()
        if backend is None:
            raise _no_keyring()
        backend.set_password(SERVICE, username, secret)
        if backend.get_password(SERVICE, username) != secret:
            raise VaultLocked(
                f"The keyring {_name(backend)} accepted the secret and did not keep it.",
                hint="Set the secret in an environment variable, or choose another keyring "
                "with PYTHON_KEYRING_BACKEND.",
                retryable=False,
            )

    def _delete(self, username: str) -> bool:
        backend = self._chosen()
        if backend is None or backend.get_password(SERVICE, username) is None:
            return False
        backend.delete_password(SERVICE, username)
        return True

    def _chosen(self) -> "KeyringBackend | None":
        if self._backend is None:
            import keyring  # noqa: PLC0415  # costs 80 ms, and most runs never ask

            self._backend = keyring.get_keyring()
        return _usable(self._backend)

    def _bounded(self, call: Callable[[], _T]) -> _T:
        deadline = time.monotonic() + self._timeout
        if not self._free.acquire(timeout=self._timeout):
            raise _no_answer(self._timeout)
        answer: Future[_T] = Future()

        def work() -> None:
            # The lock is released by the call itself: as long as it hangs, nobody else
            # starts one, so that retries pile up no threads.
            try:
                result = call()
            except BaseException as error:  # handed to whoever waits
                self._free.release()
                answer.set_exception(error)
            else:
                self._free.release()
                answer.set_result(result)

        threading.Thread(target=work, name="keyring", daemon=True).start()
        try:
            return answer.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            raise _no_answer(self._timeout) from None
        except VaultLocked:
            raise
        except Exception as error:
            raise _translated(error) from None  # its text or frames may hold the secret


def _usable(backend: "KeyringBackend") -> "KeyringBackend | None":
    """Take a chain's best system keyring; refuse those that keep nothing or keep it openly.

    A chain puts whatever is installed in a row, so that a secret may end up in a plain
    file, or a password prompt for a file may eat the program's input. Such a keyring is
    used only when the user names it.
    """
    members = getattr(backend, "backends", None)
    if members is not None:
        own = [one for one in members if type(one).__module__.startswith("keyring.backends.")]
        return _usable(own[0]) if own else None
    module = type(backend).__module__
    if module == "keyring.backends.fail" or "plaintext" in type(backend).__name__.lower():
        return None
    return backend


def _name(backend: object) -> str:
    kind = type(backend)
    return f"{kind.__module__}.{kind.__qualname__}"


def _no_keyring() -> VaultLocked:
    return VaultLocked(
        "This machine has no keyring that keeps secrets safely.",
        hint="Set the secret in an environment variable instead, or install a keyring "
        "(gnome-keyring, KWallet) and name it with PYTHON_KEYRING_BACKEND.",
        retryable=False,
    )


def _no_answer(timeout: float) -> VaultLocked:
    return VaultLocked(
        f"The keyring did not answer within {timeout:g} seconds; it may wait for a password.",
        hint="Unlock the keyring, or set the secret in an environment variable.",
    )


def _translated(error: Exception) -> VaultLocked:
    kind = type(error).__name__
    if kind in {"KeyringLocked", "LockedException"}:
        return VaultLocked(
            "The keyring is locked.",
            hint="Unlock it, or set the secret in an environment variable.",
        )
    return VaultLocked(
        f"The keyring failed ({kind}).",
        hint="Set the secret in an environment variable, or choose another keyring "
        "with PYTHON_KEYRING_BACKEND.",
        retryable=False,
    )
