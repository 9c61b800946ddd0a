"""Signatures of webhooks, by the Standard Webhooks specification 1.0.

An HMAC with SHA-256 of `<id>.<timestamp>.<body>`, as openai-python 3.57.0 verifies it, too. A
secret `whsec_…` is base64, any other is used as it is.
"""

import base64
import binascii
import hashlib
import hmac
from typing import Final

from training_backends.core.errors import ConfigError

__all__ = ["signed_headers", "signing_key"]

_PREFIX: Final = "whsec_"
_SHORTEST_KEY: Final = 16


def signing_key(secret: str) -> bytes:
    """Return the key in a secret.

    Raises:
        ConfigError: It is not base64, or too short; the message does not repeat it.
    """
    key = secret.encode()
    if secret.startswith(_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            raise _bad_secret("what follows whsec_ is not base64") from None
    if len(key) < _SHORTEST_KEY:
        raise _bad_secret(f"it has fewer than {_SHORTEST_KEY} bytes")
    return key


def _bad_secret(why: str) -> ConfigError:
    return ConfigError(
        f"Invalid webhook secret: {why}.",
        hint="Make one with `echo whsec_$(openssl rand -base64 32)`.",
    )


def signed_headers(key: bytes, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers of a delivery."""
    signed = b".".join((event_id.encode(), str(timestamp).encode(), body))
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }
