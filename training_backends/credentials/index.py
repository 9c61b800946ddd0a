"""Names of the secrets in the keyring, because a keyring cannot list what it holds.

The file has names and times only, never a value.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from training_backends.core.errors import StoreError
from training_backends.core.files import hold_lock, make_private_directory, write_private
from training_backends.core.run import UtcDatetime

__all__ = ["CredentialIndex", "IndexEntry"]

_PATIENCE: Final = 10.0
"""Seconds to wait for other processes that change the index, which takes milliseconds."""


class IndexEntry(BaseModel):
    """One secret that was put into the keyring."""

    model_config = ConfigDict(frozen=True)

    provider: str
    profile: str
    stored_at: UtcDatetime


class _Content(BaseModel):
    version: int = 1
    credentials: tuple[IndexEntry, ...] = ()


class CredentialIndex:
    """The index file; safe to change from several processes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[IndexEntry, ...]:
        """Return all entries, by name; none where there is no file yet.

        Raises:
            StoreError: The file is there and cannot be read.
        """
        try:
            content = _Content.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            raise StoreError(
                f"{self.path} cannot be read.",
                hint="Move it away; `training-backends credentials set` makes a new one. "
                "The secrets themselves lie in the keyring.",
            ) from error
        return tuple(sorted(content.credentials, key=lambda one: (one.provider, one.profile)))

    def add(self, provider: str, profile: str, at: datetime) -> None:
        """Remember that this secret was stored now."""
        entry = IndexEntry(provider=provider, profile=profile, stored_at=at)
        self._change(lambda others: (*others, entry), provider, profile)

    def remove(self, provider: str, profile: str) -> None:
        """Forget this secret; safe to repeat."""
        if self.path.exists():
            self._change(lambda others: others, provider, profile)

    def _change(
        self,
        make: Callable[[tuple[IndexEntry, ...]], tuple[IndexEntry, ...]],
        provider: str,
        profile: str,
    ) -> None:
        try:
            make_private_directory(self.path.parent)
            with hold_lock(self.path.with_suffix(".lock"), _PATIENCE):
                others = tuple(
                    one for one in self.read() if (one.provider, one.profile) != (provider, profile)
                )
                self._write(make(others))
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}.",
                hint="Is TRAINING_BACKENDS_HOME writable?",
            ) from error

    def _write(self, entries: tuple[IndexEntry, ...]) -> None:
        text = json.dumps(_Content(credentials=entries).model_dump(mode="json"), indent=2)
        write_private(self.path, text.encode() + b"\n")
