"""Links to a file that work without a key for a while."""

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from training_backends.core.files import make_private_directory

__all__ = ["LinkSigner", "load_secret"]

_SECRET_BYTES = 32


def load_secret(path: Path) -> bytes:
    """Return this gateway's own secret, made on first use and readable by its owner only."""
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    if len(known) >= _SECRET_BYTES:
        return known  # an emptied file would let anybody sign
    make_private_directory(path.parent)
    secret = secrets.token_bytes(_SECRET_BYTES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return secret


class LinkSigner:
    """Signs and checks links."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def path(self, file_id: str, hours: int) -> str:
        """Return the path and query of a link that works for `hours`."""
        expires = int(time.time()) + hours * 3600
        return f"/files/{file_id}?expires={expires}&signature={self._sign(file_id, expires)}"

    def allows(self, file_id: str, expires: int, signature: str) -> bool:
        """Tell whether a link is ours and still valid."""
        genuine = hmac.compare_digest(self._sign(file_id, expires).encode(), signature.encode())
        return genuine and time.time() < expires

    def _sign(self, file_id: str, expires: int) -> str:
        message = f"{file_id}\n{expires}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()
