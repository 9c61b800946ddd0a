"""Upload each content once, for all runs of an account."""

from collections.abc import Awaitable, Callable
from typing import Final

from training_backends.core.backend import Journal, JSONValue
from training_backends.core.errors import ProtocolError
from training_backends.core.persist import persist

__all__ = ["upload_once"]

_LOSSES: Final = 10
"""Maximum uploads of a content in one launch, in case the server loses it."""


async def upload_once(
    journal: Journal,
    *,
    scope: str,
    sha256: str,
    do: Callable[[], Awaitable[str]],
    has: Callable[[str], Awaitable[bool]],
    find: Callable[[], Awaitable[str | None]] | None = None,
) -> str:
    """Return the provider's id of a content, and upload it unless the provider has it.

    Args:
        scope: Server and account that the id belongs to; not secret.
        sha256: Hex digest of the content.
        do: Uploads and returns the provider's id.
        has: Returns whether the provider still has a file that was uploaded earlier.
        find: Returns the id of an upload whose response was lost, for example by its name. None:
            the upload is repeated, which leaves a second copy at the provider.

    Raises:
        ProtocolError: The provider repeatedly lost the file.
    """
    known = await journal.known_upload(scope, sha256)
    if known is not None and await persist(lambda: has(known)):
        return known
    fresh = False

    async def upload() -> JSONValue:
        nonlocal fresh
        fresh = True
        return await do()

    for attempt in range(1, _LOSSES + 1):
        name = f"upload:{sha256}" + (f"#{attempt}" if attempt > 1 else "")
        file_id = str(await persist(_step(journal, name, upload, find)))
        if fresh or await persist(_check(has, file_id)):
            await journal.uploaded(scope, sha256, file_id)
            return file_id
    raise ProtocolError("The provider repeatedly lost an uploaded file.")


def _step(
    journal: Journal,
    name: str,
    do: Callable[[], Awaitable[JSONValue]],
    find: Callable[[], Awaitable[str | None]] | None,
) -> Callable[[], Awaitable[JSONValue]]:
    return lambda: journal.step(name, do, find, repeatable=find is None)


def _check(has: Callable[[str], Awaitable[bool]], file_id: str) -> Callable[[], Awaitable[bool]]:
    return lambda: has(file_id)
