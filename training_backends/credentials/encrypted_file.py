"""A keyring for machines without one: a single file, encrypted with a password.

Argon2id derives a key from the password, and AES-256-GCM encrypts the entire content, including
names. Both come from `cryptography`, which is imported on first use.
"""

import json
import os
import stat
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from pydantic import SecretStr

from training_backends.core.errors import VaultLocked
from training_backends.core.files import hold_lock, make_private_directory, write_atomic

__all__ = ["FileKeyring", "read_password_descriptor", "read_password_file"]

_ONE_AT_A_TIME: Final = threading.Lock()
_LONGEST: Final = 4096
"""Bytes to read at most, in case the wrong file was named."""


def read_password_file(path: Path) -> SecretStr:
    """Return the first line of a file that only its owner can access.

    Raises:
        VaultLocked: The file cannot be read, is accessible to others, or has no password.
    """
    what = f"The password file {path}"
    try:
        # Without O_NONBLOCK, opening a pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _unusable(f"{what} cannot be read: {error.strerror}.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _unusable(
                f"{what} is not a regular file.", "For a pipe, set `password_fd` instead."
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise _unusable(f"{what} is accessible to others.", f"Run `chmod 600 {path}`.")
        return _first_line(descriptor, what)
    finally:
        os.close(descriptor)


def read_password_descriptor(number: int) -> SecretStr:
    """Return the first line read from a file descriptor, and close it.

    A descriptor can be read only once, so the result is cached. Only inheritable descriptors,
    passed by the parent process, are used: those opened in this process are not inheritable.

    Raises:
        VaultLocked: The descriptor was not passed by the parent, or gave no password.
    """
    with _ONE_AT_A_TIME:
        return _read_and_close(number)


@cache
def _read_and_close(number: int) -> SecretStr:
    what = f"File descriptor {number} for the keyring password"
    try:
        if not os.get_inheritable(number):
            raise _not_passed_on(what)
        try:
            return _first_line(number, what)
        finally:
            os.close(number)
    except OSError:
        raise _not_passed_on(what) from None


def _first_line(descriptor: int, what: str) -> SecretStr:
    data = b""
    while b"\n" not in data and len(data) <= _LONGEST:
        piece = os.read(descriptor, _LONGEST)
        if not piece:
            break
        data += piece
    line = data.partition(b"\n")[0].removesuffix(b"\r")
    if not line or len(line) > _LONGEST:
        raise _unusable(f"{what} has no password in its first line.")
    try:
        return SecretStr(line.decode())
    except UnicodeDecodeError:
        raise _unusable(f"{what} does not contain text.") from None


def _not_passed_on(what: str) -> VaultLocked:
    return _unusable(
        f"{what} was not passed to this process, or was already read by another.",
        "Each process needs its own: `… 3< <(command that prints it)`.",
    )


def _unusable(message: str, hint: str | None = None) -> VaultLocked:
    return VaultLocked(message, hint=hint, retryable=False)


_VERSION: Final = 1
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32
_PATIENCE: Final = 5.0
"""Seconds to wait for the lock; a change takes milliseconds."""

Secrets = dict[str, str]


class _Sealed(NamedTuple):
    """The parsed content of the file."""

    salt: bytes
    nonce: bytes
    data: bytes


class _Key(NamedTuple):
    """A derived key and its salt."""

    salt: bytes
    value: bytes


class FileKeyring:
    """Secrets in an encrypted file; safe across processes.

    Stays unlocked until `lock`. The file is read on every access, so changes by other processes
    are visible.

    Args:
        path: The file; created with mode 600 when the first secret is stored.
        source: Returns the password if `unlock` was not called; None if it has none.
    """

    def __init__(self, path: Path, source: Callable[[], SecretStr | None]) -> None:
        self.path = path
        self._source = source
        self._key: _Key | None = None
        self._shut = False

    @property
    def name(self) -> str:
        """Display name."""
        return f"encrypted file {self.path}"

    @property
    def exists(self) -> bool:
        """Whether the file exists, so that its password is set."""
        return self.path.exists()

    @property
    def is_shut(self) -> bool:
        """Whether `lock` was called, so that only `unlock` opens it."""
        return self._shut

    def is_locked(self) -> bool:
        """Return whether a prompt is needed to open the file; otherwise open it.

        Raises:
            VaultLocked: The configured password cannot be read or is wrong.
        """
        sealed = self._read()
        if self._fitting_key(sealed) is not None:
            return False
        password = None if self._shut else self._source()
        if password is not None and sealed is not None:
            self._open_with(password, sealed)
        return password is None

    def unlock(self, password: SecretStr | None = None) -> None:
        """Unlock the file; set the password of a new one.

        Raises:
            VaultLocked: The password is wrong or missing.
        """
        sealed = self._read()
        if password is None and self._fitting_key(sealed) is None:
            password = self._source() or self._locked()
        if password is not None:
            self._open_with(password, sealed)
        self._shut = False

    def lock(self) -> None:
        """Forget the key until `unlock` is called."""
        self._key = None
        self._shut = True

    def get_password(self, service: str, username: str) -> str | None:
        """Return a secret, or None."""
        sealed = self._read()
        if sealed is None:
            return None
        return self._opened(sealed, self._key_for(sealed)).get(_entry(service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        """Store a secret."""
        self._change(lambda secrets: secrets | {_entry(service, username): password})

    def delete_password(self, service: str, username: str) -> None:
        """Delete a secret; safe to repeat."""
        gone = _entry(service, username)
        self._change(lambda secrets: {key: secrets[key] for key in secrets if key != gone})

    def _change(self, change: Callable[[Secrets], Secrets]) -> None:
        while True:
            # Derive the key, which is slow, before locking the file.
            key = self._key_for(self._read())
            try:
                make_private_directory(self.path.parent)
                with hold_lock(self.path.with_name(f"{self.path.name}.lock"), _PATIENCE):
                    sealed = self._read()
                    if sealed is None or sealed.salt == key.salt:
                        secrets = {} if sealed is None else self._opened(sealed, key)
                        write_atomic(self.path, _seal(change(secrets), key), private=True)
                        return
            except OSError as error:
                raise VaultLocked(
                    f"Cannot write the keyring file {self.path}: {error.strerror}.",
                    hint="Check free space and write permission of TRAINING_BACKENDS_HOME.",
                    retryable=isinstance(error, BlockingIOError),
                ) from None

    def _read(self) -> _Sealed | None:
        try:
            found = json.loads(self.path.read_bytes())
            if found["version"] == _VERSION:
                return _Sealed(*(b64decode(found[name], validate=True) for name in _Sealed._fields))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            raise VaultLocked(
                f"The keyring file {self.path} cannot be read or is damaged.",
                hint="Restore it from a backup, or move it away and store the keys again.",
                retryable=False,
            ) from None
        raise VaultLocked(
            f"The keyring file {self.path} was written by a newer version.",
            hint="Upgrade training-backends.",
            retryable=False,
        )

    def _key_for(self, sealed: _Sealed | None) -> _Key:
        key = self._fitting_key(sealed)
        if key is not None:
            return key
        password = None if self._shut else self._source()
        return self._open_with(password or self._locked(), sealed)

    def _locked(self) -> NoReturn:
        raise VaultLocked(
            f"The keyring file {self.path} is locked.",
            hint="Set TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE to a file with its password, or "
            "TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FD to an open descriptor, or use a terminal "
            "to be prompted.",
            retryable=False,
        )

    def _fitting_key(self, sealed: _Sealed | None) -> _Key | None:
        """Return the cached key if it belongs to this file."""
        is_other = sealed is not None and self._key is not None and sealed.salt != self._key.salt
        return None if is_other else self._key

    def _open_with(self, password: SecretStr, sealed: _Sealed | None) -> _Key:
        secret = password.get_secret_value().encode()
        if not secret.strip():
            raise VaultLocked("The keyring password is empty.", retryable=False)
        salt = os.urandom(_SALT_BYTES) if sealed is None else sealed.salt
        key = _Key(salt, _derive(secret, salt))
        if sealed is not None:
            self._opened(sealed, key)
        self._key = key
        return key

    def _opened(self, sealed: _Sealed, key: _Key) -> Secrets:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        try:
            plain = AESGCM(key.value).decrypt(sealed.nonce, sealed.data, _header(sealed.salt))
        except InvalidTag:
            raise VaultLocked(
                f"Wrong password for the keyring file {self.path}.",
                hint="If the password is right, the file is damaged: restore it from a backup, or "
                "move it away and store the keys again.",
                retryable=False,
            ) from None
        secrets: Secrets = json.loads(plain)
        return secrets


def _derive(secret: bytes, salt: bytes) -> bytes:
    """Derive a key from a password with the second recommended option of RFC 9106.

    The parameters are fixed per version. In the file, an attacker could weaken them.
    """
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id  # noqa: PLC0415  # heavy and rarely needed

    kdf = Argon2id(salt=salt, length=_KEY_BYTES, iterations=3, lanes=4, memory_cost=64 * 1024)
    return kdf.derive(secret)


def _seal(secrets: Secrets, key: _Key) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    nonce = os.urandom(_NONCE_BYTES)
    data = AESGCM(key.value).encrypt(nonce, json.dumps(secrets).encode(), _header(key.salt))
    parts = {"salt": key.salt, "nonce": nonce, "data": data}
    texts = {name: b64encode(part).decode() for name, part in parts.items()}
    return json.dumps({"version": _VERSION, **texts}, indent=2).encode() + b"\n"


def _header(salt: bytes) -> bytes:
    """Return the authenticated, unencrypted header."""
    return b"training-backends keyring %d " % _VERSION + salt


def _entry(service: str, username: str) -> str:
    return f"{service} {username}"
