"""Upload each content once, for all runs of an account."""

from collections.abc import Awaitable, Callable

from training_backends.core.backend import Journal
from training_backends.core.persist import persist

__all__ = ["upload_once"]


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

    `Journal.upload`, through temporary errors.

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
    return await persist(lambda: journal.upload(scope, sha256, do, find or _nothing, has))


async def _nothing() -> None:
    """Find nothing."""
