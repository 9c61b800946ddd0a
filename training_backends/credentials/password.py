"""The password of the encrypted keyring, read from a descriptor or a file.

It never comes from an argument or from the value of a variable: others can see those.
"""

import os
import stat
import threading
from functools import cache
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from training_backends.core.errors import VaultLocked

__all__ = ["read_password_descriptor", "read_password_file"]

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
