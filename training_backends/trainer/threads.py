"""How torch shares the processors with whoever else works on this machine."""

import os
from typing import Final

__all__ = ["prepare_threads", "thread_count"]

_ENOUGH_FOR_SMALL: Final = 4


def prepare_threads() -> None:
    """Let idle threads sleep instead of spin; has an effect only before torch is loaded.

    On a busy machine spinning threads wait for one that is not running: measured on two
    cores shared with other work, steps took up to five times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def thread_count(*, small: bool, processes: int = 1) -> int:
    """Return how many threads to compute with: what the user set, or all processors.

    Args:
        small: The model is so small that more than a few threads slow it down.
        processes: How many share the processors.
    """
    if (wanted := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(wanted):
        return int(wanted)
    ours = max(1, len(os.sched_getaffinity(0)) // processes)
    return min(ours, _ENOUGH_FOR_SMALL) if small else ours
