"""Ids as the OpenAI API shows them: a prefix before the digits of an object's own id.

Nothing is stored: the same object keeps its UUID in the Mistral API, and the OpenAI API accepts
both forms.
"""

from typing import Final
from uuid import UUID

__all__ = ["FILE", "JOB", "PART", "UPLOAD", "internal_id", "wire_id"]

FILE: Final = "file-"
JOB: Final = "ftjob-"
UPLOAD: Final = "upload_"
PART: Final = "part_"


def wire_id(prefix: str, own: str) -> str:
    """Return the id that the OpenAI API shows."""
    return prefix + UUID(own).hex


def internal_id(prefix: str, given: str) -> str | None:
    """Return the UUID of an id in either form; None for what is the id of nothing."""
    try:
        return str(UUID(given.removeprefix(prefix)))
    except ValueError:
        return None
