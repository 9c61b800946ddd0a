"""Signatures of webhooks, as the Standard Webhooks specification 1.0 has them."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime
from typing import Final

__all__ = ["signed_headers"]

_PREFIX: Final = "whsec_"


def signed_headers(
    secret: str, message_id: str, sent_at: datetime, body: bytes
) -> Mapping[str, str]:
    """Return the headers of a signed webhook.

    Args:
        secret: Base64 after `whsec_`; any other text is used as it is.
        message_id: The same for each attempt, so that receivers can drop repetitions.
    """
    moment = str(int(sent_at.timestamp()))
    signed = f"{message_id}.{moment}.".encode() + body
    mark = base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": moment,
        "webhook-signature": f"v1,{mark}",
    }


def _key(secret: str) -> bytes:
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()
