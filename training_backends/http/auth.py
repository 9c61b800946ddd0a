"""How a client authenticates: a key in a header, or headers signed for each request."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from pydantic import SecretStr

from training_backends.core.errors import AuthenticationFailed
from training_backends.core.logging import register_secret

__all__ = ["KeyHeader", "KeySource", "Signer", "UnsignedRequest", "read_key"]

KeySource = Callable[[], Awaitable[SecretStr]]
"""Returns the key; called again after a 401, in case the key has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsignedRequest:
    """A request to be signed.

    Attributes:
        url: Complete, with the query as it will be sent.
        headers: All headers of the request so far, with lower-case names.
        sha256: Hex digest of the body; None if the body is streamed and its digest is unknown.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    sha256: str | None


Signer = Callable[[UnsignedRequest], Awaitable[Mapping[str, str]]]
"""Returns the headers to add to a request, for example a signature; called for each attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHeader:
    """The header that carries the key; by default `Authorization: Bearer KEY`.

    Attributes:
        name: For example `api-key`.
        prefix: What precedes the key in the value.
    """

    name: str = "Authorization"
    prefix: str = "Bearer "

    @classmethod
    def named(cls, name: str) -> "KeyHeader":
        """Return a header that carries nothing but the key."""
        return cls(name=name, prefix="")

    def value(self, key: SecretStr) -> str:
        """Return the header's value."""
        return self.prefix + key.get_secret_value()


async def read_key(source: KeySource, backend: str | None) -> SecretStr:
    """Read the key and register it as a secret.

    Raises:
        AuthenticationFailed: It would be invalid in a header; the message does not quote it.
    """
    key = (await source()).get_secret_value().strip()
    if key and key.isascii() and key.isprintable() and " " not in key:
        register_secret(key)
        return SecretStr(key)
    raise AuthenticationFailed(
        "The stored API key is invalid: it is empty or contains unsupported characters.",
        hint="Store the key again, without other text.",
        backend=backend,
    )
