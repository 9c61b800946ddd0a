"""A keyring for machines without one: a single file, encrypted with a password.

Argon2id makes a key of the password, AES-256-GCM seals the whole content with it, names
included. Both come from `cryptography`, which is imported on first use.
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
from training_backends.core.files import hold_lock, make_private_directory, write_private

__all__ = ["FileKeyring", "read_password_descriptor", "read_password_file"]

_ONE_AT_A_TIME: Final = threading.Lock()
_LONGEST: Final = 4096
"""Bytes; a file that was named by mistake is not read to its end."""


def read_password_file(path: Path) -> SecretStr:
    """Return the first line of a file that nobody else can read.

    Raises:
        VaultLocked: It cannot be read, is open to others, or holds no password.
    """
    what = f"The password file {path}"
    try:
        # A pipe without a writer would hold us up before anybody could see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _unusable(f"{what} cannot be read: {error.strerror}.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _unusable(
                f"{what} is not a plain file.", "A pipe is given as `password_fd` instead."
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise _unusable(f"{what} can be read or changed by others.", f"chmod 600 {path}")
        return _first_line(descriptor, what)
    finally:
        os.close(descriptor)


def read_password_descriptor(number: int) -> SecretStr:
    """Return the first line that comes out of a descriptor, and close it.

    A descriptor belongs to the process and can be read but once, so what came out of it is
    kept for whoever asks next. Only one that the starting process has passed on is touched:
    those that are opened in this process are not inheritable.

    Raises:
        VaultLocked: It is not one that was passed on, or gave no password.
    """
    with _ONE_AT_A_TIME:
        return _read_and_close(number)


@cache
def _read_and_close(number: int) -> SecretStr:
    what = f"Descriptor {number}, which was to give the keyring's password,"
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
        raise _unusable(f"{what} holds no password in its first line.")
    try:
        return SecretStr(line.decode())
    except UnicodeDecodeError:
        raise _unusable(f"{what} holds something that is not text.") from None


def _not_passed_on(what: str) -> VaultLocked:
    return _unusable(
        f"{what} was not passed to this process, or was read by an earlier one.",
        "Each process needs its own: `… 3< <(command that prints it)`.",
    )


def _unusable(message: str, hint: str | None = None) -> VaultLocked:
    return VaultLocked(message, hint=hint, retryable=False)


_VERSION: Final = 1
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32
_PATIENCE: Final = 5.0
"""Seconds to wait for another process that changes the file, which takes milliseconds."""

Secrets = dict[str, str]


class _Sealed(NamedTuple):
    """What lies in the file."""

    salt: bytes
    nonce: bytes
    data: bytes


class _Key(NamedTuple):
    """A key, and the salt of the file that it opens."""

    salt: bytes
    value: bytes


class FileKeyring:
    """Secrets in an encrypted file that several processes may change at once.

    It stays open for this object until `lock`; the file is read anew each time, so that
    what another process stores is seen.

    Args:
        path: The file; made, for its owner only, when the first secret is stored.
        source: Gives the password where no `unlock` did; None if it cannot.
    """

    def __init__(self, path: Path, source: Callable[[], SecretStr | None]) -> None:
        self.path = path
        self._source = source
        self._key: _Key | None = None
        self._shut = False

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"encrypted file {self.path}"

    @property
    def exists(self) -> bool:
        """Whether something was stored already, and a password chosen."""
        return self.path.exists()

    @property
    def is_shut(self) -> bool:
        """Whether it was locked on purpose, so that nothing but `unlock` may open it."""
        return self._shut

    def is_locked(self) -> bool:
        """Tell whether only a person can open it now; one that need not be asked opens it.

        Raises:
            VaultLocked: The password that is named for it cannot be had, or is wrong.
        """
        sealed = self._read()
        if self._fitting_key(sealed) is not None:
            return False
        password = None if self._shut else self._source()
        if password is not None and sealed is not None:
            self._open_with(password, sealed)
        return password is None

    def unlock(self, password: SecretStr | None = None) -> None:
        """Open the file; for one that is not there yet, choose its password.

        Raises:
            VaultLocked: The password is wrong, or none was given and none can be had.
        """
        sealed = self._read()
        if password is None and self._fitting_key(sealed) is None:
            password = self._source() or self._locked()
        if password is not None:
            self._open_with(password, sealed)
        self._shut = False

    def lock(self) -> None:
        """Forget the key; only `unlock` brings it back."""
        self._key = None
        self._shut = True

    def get_password(self, service: str, username: str) -> str | None:
        """Return a secret; None where there is none."""
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
            # The key is made before the file is locked: that takes a good part of a second.
            key = self._key_for(self._read())
            try:
                make_private_directory(self.path.parent)
                with hold_lock(self.path.with_name(f"{self.path.name}.lock"), _PATIENCE):
                    sealed = self._read()
                    if sealed is None or sealed.salt == key.salt:
                        secrets = {} if sealed is None else self._opened(sealed, key)
                        write_private(self.path, _seal(change(secrets), key))
                        return
            except OSError as error:
                raise VaultLocked(
                    f"The keyring file {self.path} cannot be written: {error.strerror}.",
                    hint="Is TRAINING_BACKENDS_HOME writable, and the disk not full?",
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
                f"The keyring file {self.path} cannot be read or was damaged.",
                hint="Restore it, or move it away and store the keys again.",
                retryable=False,
            ) from None
        raise VaultLocked(
            f"The keyring file {self.path} was written by a newer version.",
            hint="Upgrade this program.",
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
            hint="Name a file with its password in TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE, "
            "or an open descriptor in TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FD; on a terminal it "
            "is asked for.",
            retryable=False,
        )

    def _fitting_key(self, sealed: _Sealed | None) -> _Key | None:
        """Return the key that is known, if it belongs to this file."""
        is_other = sealed is not None and self._key is not None and sealed.salt != self._key.salt
        return None if is_other else self._key

    def _open_with(self, password: SecretStr, sealed: _Sealed | None) -> _Key:
        secret = password.get_secret_value().encode()
        if not secret.strip():
            raise VaultLocked("The keyring's password is empty.", retryable=False)
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
                f"The password does not open the keyring file {self.path}.",
                hint="If it is the right one, the file was changed or damaged: restore it, or "
                "move it away and store the keys again.",
                retryable=False,
            ) from None
        secrets: Secrets = json.loads(plain)
        return secrets


def _derive(secret: bytes, salt: bytes) -> bytes:
    """Make a key of a password, by the second recommended option of RFC 9106.

    The parameters belong to the version. Were they in the file, whoever can write to it could
    choose weak ones.
    """
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id  # noqa: PLC0415  # not light, and rarely needed

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
    """Return what is sealed along with the content, though it stands in the open."""
    return b"training-backends keyring %d " % _VERSION + salt


def _entry(service: str, username: str) -> str:
    return f"{service} {username}"
