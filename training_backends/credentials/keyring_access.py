"""Access to the keyring with timeouts, so that it cannot block the program.

`keyring` is imported on the first call. Every call runs in a daemon thread with a timeout; while
one hangs, no second one is started. No other thread waits for it, so Ctrl-C exits immediately.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import anyio
from anyio import from_thread
from anyio.lowlevel import current_token
from pydantic import SecretStr

from training_backends.core.errors import TrainingBackendError, UnsupportedOperation, VaultLocked
from training_backends.credentials.encrypted_file import FileKeyring
from training_backends.credentials.secret_service import SecretService

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

__all__ = ["Keyring"]

_SERVICE: Final = "training-backends"

_T = TypeVar("_T")
_LOCKABLE: Final = (FileKeyring, SecretService)
_DIALOGUE: Final = 0.9
"""Share of the timeout to wait for a dialog, so that its own error is raised first."""
_OTHERWISE: Final = (
    "Set the secret in an environment variable, or use another keyring: set "
    "TRAINING_BACKENDS_CREDENTIALS__KEYRING=file for an encrypted file, or PYTHON_KEYRING_BACKEND."
)


class Keeper(Protocol):
    """Stores secrets: the encrypted file, or any backend of `keyring`."""

    def get_password(self, service: str, username: str) -> str | None:
        """Return a secret, or None."""
        ...

    def set_password(self, service: str, username: str, password: str) -> None:
        """Store a secret."""
        ...

    def delete_password(self, service: str, username: str) -> None:
        """Delete a secret."""
        ...


class Keyring:
    """The secrets stored under this package's service name.

    Args:
        timeout: Seconds to wait for a response of the keyring.
        backend: Keyring to use instead of the system's.
    """

    def __init__(
        self, *, timeout: float, backend: "FileKeyring | KeyringBackend | None" = None
    ) -> None:
        self._timeout = timeout
        self._backend = backend
        self._keeper: Keeper | None = None
        self._running: Future[Any] | None = None
        self._starting = threading.Lock()

    async def get(self, username: str) -> SecretStr | None:
        """Return the secret; None without a secret or a keyring.

        Raises:
            VaultLocked: The keyring is locked, timed out or failed.
        """
        return await self._bounded(lambda: self._get(username))

    async def set(self, username: str, secret: SecretStr) -> None:
        """Store the secret and verify it by reading it back.

        Raises:
            VaultLocked: The keyring is locked, missing, or did not store the secret.
        """
        await self._bounded(lambda: self._set(username, secret))

    async def delete(self, username: str) -> bool:
        """Delete the secret; return False if there was none.

        Raises:
            VaultLocked: The keyring is locked or timed out.
        """
        return await self._bounded(lambda: self._delete(username))

    async def is_unlocked(self) -> bool:
        """Return whether the keyring can be used without a prompt; False without a keyring.

        A keyring that cannot report its state (macOS, KWallet) counts as unlocked.

        Raises:
            VaultLocked: The keyring timed out.
        """
        return await self._bounded(self._is_unlocked)

    async def unlock(self, password: SecretStr | None = None) -> None:
        """Unlock the keyring, which may show a dialog of the desktop.

        Raises:
            VaultLocked: The keyring stayed locked, or there is none.
        """
        await self._bounded(lambda: self._unlock(password))

    async def lock(self) -> None:
        """Lock the keyring.

        Raises:
            UnsupportedOperation: The keyring does not support it.
            VaultLocked: The keyring timed out, or there is none.
        """
        await self._bounded(self._lock)

    async def describe(self) -> str | None:
        """Return the name of the keyring; None without a keyring.

        Raises:
            VaultLocked: The keyring timed out.
        """
        keeper = await self._bounded(self._chosen)
        return None if keeper is None else _name(keeper)

    def _get(self, username: str) -> SecretStr | None:
        keeper = self._chosen()
        found = None if keeper is None else keeper.get_password(_SERVICE, username)
        return None if found is None else SecretStr(found)

    def _set(self, username: str, secret: SecretStr) -> None:
        keeper = self._needed()
        keeper.set_password(_SERVICE, username, secret.get_secret_value())
        if keeper.get_password(_SERVICE, username) != secret.get_secret_value():
            raise VaultLocked(
                f"The keyring {_name(keeper)} accepted the secret but did not store it.",
                hint=_OTHERWISE,
                retryable=False,
            )

    def _delete(self, username: str) -> bool:
        keeper = self._chosen()
        if keeper is None or keeper.get_password(_SERVICE, username) is None:
            return False
        keeper.delete_password(_SERVICE, username)
        return True

    def _is_unlocked(self) -> bool:
        keeper = self._chosen()
        return not keeper.is_locked() if isinstance(keeper, _LOCKABLE) else keeper is not None

    def _unlock(self, password: SecretStr | None) -> None:
        keeper = self._needed()
        if isinstance(keeper, _LOCKABLE):
            keeper.unlock(password)
        else:
            keeper.get_password(_SERVICE, "unlock")  # triggers its prompt if locked

    def _lock(self) -> None:
        keeper = self._needed()
        if not isinstance(keeper, _LOCKABLE):
            raise UnsupportedOperation(f"The keyring {_name(keeper)} does not support locking.")
        keeper.lock()

    def _needed(self) -> Keeper:
        keeper = self._chosen()
        if keeper is None:
            raise VaultLocked(
                "This machine has no keyring that stores secrets securely.",
                hint=_OTHERWISE,
                retryable=False,
            )
        return keeper

    def _chosen(self) -> Keeper | None:
        if self._keeper is None:
            if isinstance(self._backend, FileKeyring):
                self._keeper = self._backend
            else:
                found = _best(self._backend or _system_keyring())
                is_service = type(found).__module__ == "keyring.backends.SecretService"
                patience = self._timeout * _DIALOGUE
                self._keeper = SecretService(found, patience) if found and is_service else found
        return self._keeper

    async def _bounded(self, call: Callable[[], _T]) -> _T:
        try:
            with anyio.fail_after(self._timeout):
                answer = await self._start(call)
                await _finished(answer)
        except TimeoutError:
            raise _no_answer(self._timeout) from None
        try:
            return answer.result()
        except TrainingBackendError:
            raise
        except Exception as error:
            problem = _translated(error)
        # Raised outside the handler: the original error's text or frames may contain the secret.
        raise problem

    async def _start(self, call: Callable[[], _T]) -> "Future[_T]":
        """Start the call in a thread once no other call is running."""
        answer: Future[_T] = Future()
        while True:
            with self._starting:
                before = self._running
                if before is None:
                    self._running = answer
                    break
            await _finished(before)
        threading.Thread(
            target=self._work, args=(call, answer), name="keyring", daemon=True
        ).start()
        return answer

    def _work(self, call: Callable[[], _T], answer: "Future[_T]") -> None:
        result: _T | None = None
        problem: BaseException | None = None
        try:
            result = call()
        except BaseException as error:  # passed to the waiting caller
            problem = error
        with self._starting:
            self._running = None
        if problem is None:
            answer.set_result(result)  # type: ignore[arg-type]  # set unless the call failed
        else:
            answer.set_exception(problem)


async def _finished(answer: "Future[Any]") -> None:
    """Wait for a thread's result in the current event loop."""
    event = anyio.Event()
    token = current_token()
    here = threading.get_ident()

    def notify(_: object) -> None:
        if threading.get_ident() == here:  # it was already done
            event.set()
            return
        with suppress(RuntimeError):  # the loop is closed
            from_thread.run_sync(event.set, token=token)

    answer.add_done_callback(notify)
    await event.wait()


def _system_keyring() -> "KeyringBackend | None":
    """Return the keyring that the user configured, or the best one built into `keyring`.

    By default `keyring` would use any installed plugin: secrets could end up in a plain file, or
    a password prompt could consume the program's input.
    """
    named = os.environ.get("PYTHON_KEYRING_BACKEND")
    try:
        import keyring.core  # noqa: PLC0415  # takes 80 ms and is rarely needed

        found = keyring.core.get_keyring()
        chosen = named is not None or keyring.core.load_config() is not None
    except Exception as error:  # a plugin may raise anything; it has no secret yet
        what = f"keyring {named}" if named else "keyring library"
        raise VaultLocked(
            f"Cannot load the {what} ({type(error).__name__}: {error}).",
            hint="Fix PYTHON_KEYRING_BACKEND or keyringrc.cfg, or set the secret in an "
            "environment variable.",
            retryable=False,
        ) from None
    return found if chosen or _is_own(found) else None


def _best(backend: "KeyringBackend | None") -> "KeyringBackend | None":
    """Reject keyrings that store nothing or in plain text; of a chain, take the best."""
    members = getattr(backend, "backends", None)
    if members is not None:
        return _best(next(filter(_is_own, members), None))
    if type(backend).__module__ == "keyring.backends.fail":
        return None
    return None if "plaintext" in type(backend).__name__.lower() else backend


def _is_own(backend: "KeyringBackend") -> bool:
    return type(backend).__module__.startswith("keyring.backends.")


def _name(keeper: Keeper) -> str:
    if isinstance(keeper, _LOCKABLE):
        return keeper.name
    kind = type(keeper)
    return f"{kind.__module__}.{kind.__qualname__}"


def _no_answer(timeout: float) -> VaultLocked:
    return VaultLocked(
        f"The keyring did not respond within {timeout:g} s; it may be waiting for a password.",
        hint="Unlock the keyring, or set the secret in an environment variable.",
    )


def _translated(error: Exception) -> VaultLocked:
    kind = type(error).__name__
    if kind in {"KeyringLocked", "LockedException"}:
        return VaultLocked(
            "The keyring is locked.",
            hint="Unlock it, or set the secret in an environment variable.",
        )
    if isinstance(error, OSError) or kind == "SecretServiceNotAvailableException":
        return VaultLocked(
            f"The keyring cannot be reached ({kind}).",
            hint="Try again later, or set the secret in an environment variable.",
        )
    return VaultLocked(f"The keyring failed ({kind}).", hint=_OTHERWISE, retryable=False)
