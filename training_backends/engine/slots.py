"""How many processes of one machine may train at once."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from training_backends.core.files import hold_lock
from training_backends.engine.errors import Stopped

__all__ = ["hold_slot"]

POLL_SECONDS = 0.1


@contextmanager
def hold_slot(
    directory: Path | None,
    count: int,
    *,
    on_wait: Callable[[], None],
    should_stop: Callable[[], bool],
) -> Iterator[None]:
    """Hold one of `count` slots for the block, waiting for it as long as it takes.

    Args:
        directory: Holds one lock file a slot; None means no limit.
        on_wait: Called once if there is no free slot.
        should_stop: Asked while waiting.

    Raises:
        Stopped: `should_stop` said so while there was no free slot.
    """
    if directory is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        waited = False
        while not _take_any(held, directory, count):
            if not waited:
                on_wait()
                waited = True
            if should_stop():
                raise Stopped
            time.sleep(POLL_SECONDS)
        yield


def _take_any(held: ExitStack, directory: Path, count: int) -> bool:
    for index in range(count):
        try:
            held.enter_context(hold_lock(directory / f"{index}.lock", patience=0))
        except BlockingIOError:
            continue
        return True
    return False
