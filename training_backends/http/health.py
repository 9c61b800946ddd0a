"""The health of a server that a backend uses."""

import time
from collections.abc import Awaitable, Callable

from training_backends.core.backend import Health
from training_backends.core.errors import CredentialNotFound, TrainingBackendError
from training_backends.http.client import HttpClient

__all__ = ["server_health"]


async def server_health(probe: Callable[[], Awaitable[HttpClient]], *, configured: bool) -> Health:
    """Return whether a server answers a cheap authenticated request.

    Args:
        probe: Sends the request and returns the client that it used.
        configured: Whether the backend counts as set up although its key is missing.
    """
    began = time.monotonic()
    try:
        http = await probe()
    except CredentialNotFound as error:
        return Health(ok=False, message=error.message, hint=error.hint, configured=configured)
    except TrainingBackendError as error:
        return Health(ok=False, message=error.message, hint=error.hint)
    return Health(
        ok=True,
        message=f"{http.base_url} responded in {time.monotonic() - began:.2f} s",
        clock_offset=http.clock_offset,
    )
