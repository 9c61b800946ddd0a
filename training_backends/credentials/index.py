"""Index of the secrets in the keyring, because keyrings cannot list their entries.

The file contains names and times only, never a secret.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from training_backends.core.errors import StoreError
from training_backends.core.files import hold_lock, make_private_directory, write_atomic
from training_backends.core.run import UtcDatetime

__all__ = ["CredentialIndex", "IndexEntry"]

_PATIENCE: Final = 10.0
"""Seconds to wait for the lock; a change takes milliseconds."""


class IndexEntry(BaseModel, frozen=True):
    """One secret stored in the keyring."""

    provider: str
    profile: str
    stored_at: UtcDatetime


class _Content(BaseModel):
    version: int = 1
    credentials: tuple[IndexEntry, ...] = ()


class CredentialIndex:
    """The index file; safe across processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[IndexEntry, ...]:
        """Return all entries sorted by name; empty if the file does not exist.

        Raises:
            StoreError: The file cannot be read.
        """
        try:
            content = _Content.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            raise StoreError(
                f"Cannot read {self.path}.",
                hint="Move it away; `training-backends credentials set` creates a new one. "
                "The secrets themselves are stored in the keyring.",
            ) from error
        return tuple(sorted(content.credentials, key=lambda one: (one.provider, one.profile)))

    def add(self, provider: str, profile: str, at: datetime) -> None:
        """Record that a secret was stored."""
        entry = IndexEntry(provider=provider, profile=profile, stored_at=at)
        self._change(lambda others: (*others, entry), provider, profile)

    def remove(self, provider: str, profile: str) -> None:
        """Remove a secret's entry; safe to repeat."""
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
                f"Cannot write {self.path}: {error.strerror}.",
                hint="Check free space and write permission of TRAINING_BACKENDS_HOME.",
            ) from error

    def _write(self, entries: tuple[IndexEntry, ...]) -> None:
        text = json.dumps(_Content(credentials=entries).model_dump(mode="json"), indent=2)
        write_atomic(self.path, f"{text}\n", private=True)
