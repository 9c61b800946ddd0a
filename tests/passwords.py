"""Keys of passwords, which are meant to be slow to derive."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["remembering"]


def remembering(kdf: Callable[..., Any]) -> Callable[..., SimpleNamespace]:
    """Return a key derivation function that derives the key of a password once per salt."""
    known = dict[object, bytes]()

    def make(**values: object) -> SimpleNamespace:
        def derive(secret: bytes) -> bytes:
            key = (secret, *values.items())
            if key not in known:
                known[key] = kdf(**values).derive(secret)
            return known[key]

        return SimpleNamespace(derive=derive)

    return make
