"""Values that the shell completes: run ids, backends, provider formats and the like.

Shells run these on each press of the tab key: they read stored data only, and stay silent if
there is none.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

__all__ = [
    "complete_backend",
    "complete_format",
    "complete_key",
    "complete_run",
    "complete_status",
    "complete_until",
]

T = TypeVar("T")


def complete_run(incomplete: str) -> list[tuple[str, str]]:
    """Return the ids of stored runs with their status and model, newest first."""

    def read() -> list[tuple[str, str]]:
        import anyio

        from training_backends import AsyncTrainingClient

        async def stored() -> list[tuple[str, str]]:
            async with AsyncTrainingClient() as client:
                runs = await client.list()
            return [(run.id, f"{run.status}, {run.config.model or run.backend}") for run in runs]

        return anyio.run(stored)

    return [each for each in _quietly(read) if each[0].startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """Return the names of installed backends."""

    def read() -> Iterable[str]:
        from training_backends import installed_backends

        return installed_backends()

    return [name for name in _quietly(read) if name.startswith(incomplete)]


def complete_format(incomplete: str) -> list[str]:
    """Return the names of the provider formats."""
    from training_backends.datasets.provider_formats import PROVIDER_FORMATS

    return [name for name in PROVIDER_FORMATS if name.startswith(incomplete)]


def complete_status(incomplete: str) -> list[str]:
    """Return the statuses of a run."""
    from training_backends.core.status import TrainingStatus

    return [status for status in TrainingStatus if status.startswith(incomplete)]


def complete_until(incomplete: str) -> list[str]:
    """Return what `wait` can wait for."""
    return [word for word in ("finished", *complete_status("")) if word.startswith(incomplete)]


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Return the ids of the gateway's keys that can be revoked, with their names."""

    def read() -> list[tuple[str, str]]:
        from training_backends.core.settings import Settings, load_settings
        from training_backends.gateway.keys import open_keys

        home = load_settings(Settings).home.expanduser().absolute()
        return [(key.id, key.name) for key in open_keys(home).list() if key.state != "revoked"]

    return [each for each in _quietly(read) if each[0].startswith(incomplete)]


def _quietly(read: Callable[[], Iterable[T]]) -> list[T]:
    """Return nothing on any error: a message would end up in the line that is typed."""
    with suppress(Exception):
        return list(read())
    return []
