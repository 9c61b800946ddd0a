"""An end to transfers that hardly move, however long those that move may take."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import anyio

from training_backends.http.upload import CHUNK_BYTES

__all__ = ["Pace", "pacing"]


class Pace:
    """Gives every `CHUNK_BYTES` of a transfer, and what is left at its end, the same time."""

    def __init__(self, scope: anyio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self._allow("nothing came of it", seconds)

    def _allow(self, failing: str, seconds: float) -> None:
        self.failing = f"{failing} within {seconds:g} s"
        self._scope.deadline = anyio.current_time() + seconds

    async def over(
        self, pieces: AsyncIterator[bytes], *, then: float
    ) -> AsyncGenerator[bytes, None]:
        """Pass pieces on; one is moved when the next is asked for.

        Args:
            then: Seconds for all that comes after the last one.
        """
        failing = f"fewer than {CHUNK_BYTES} bytes moved"
        self._allow(failing, self._seconds)
        moved = 0
        async for piece in pieces:
            yield piece
            moved += len(piece)
            if moved >= CHUNK_BYTES:
                moved = 0
                self._allow(failing, self._seconds)
        self._allow("no whole answer came to what was sent", then)


@contextmanager
def pacing(seconds: float, late: Callable[[str], Exception]) -> Iterator[Pace]:
    """End what is done inside when it takes longer than its pace allows.

    Args:
        seconds: For `CHUNK_BYTES`, and for all that comes before the first of them.
        late: Makes the error, from what did not come in time.
    """
    with anyio.CancelScope() as scope:
        pace = Pace(scope, seconds)
        yield pace
    if scope.cancelled_caught:
        raise late(pace.failing)
