"""Which GPUs this process may use, told without loading torch."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

from training_backends.core.config import TINY_MODEL
from training_backends.rundir.directory import ON_STDIN

__all__ = [
    "VISIBLE",
    "environment_without_token",
    "prepare_imports",
    "prepare_threads",
    "take_token",
    "thread_count",
    "visible_devices",
]


def take_token() -> None:
    """Read the token from standard input if that is where it is, for the hub's library.

    What is set here does not show in the environment that the system tells of a process.
    """
    if os.environ.pop(ON_STDIN, None):
        os.environ["HF_TOKEN"] = sys.stdin.buffer.readline().decode().strip()


def environment_without_token() -> dict[str, str]:
    """Return the environment for a process that is started here, which shows what it gets."""
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}


def prepare_imports(model: str = "") -> None:
    """Have only those libraries loaded that a model can need, and without a word.

    peft loads bitsandbytes wherever it is installed: most of a second, and on some processors a
    warning that a further package would be faster. The built-in model is never quantized.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if model == TINY_MODEL:
        # The import system's own way to say that there is no such module.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


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


VISIBLE: Final = "CUDA_VISIBLE_DEVICES"

_PATIENCE: Final = 20.0
"""Seconds; a driver that sleeps takes some to wake up."""
_GPU: Final = re.compile(r"GPU (\d+):")
_MIG: Final = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the names by which `CUDA_VISIBLE_DEVICES` would choose each GPU; () without any.

    What that variable says already counts; otherwise the driver's own list does.
    """
    chosen = environ.get(VISIBLE)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # What stands behind a name that is none is ignored, as CUDA does.
        end = next((at for at, name in enumerate(names) if name in {"", "-1"}), len(names))
        return tuple(names[:end])
    return _listed(_ask_driver())


def _ask_driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607  # wherever the driver has put it
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=environment_without_token(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _listed(text: str) -> tuple[str, ...]:
    """Read the driver's list: a line a GPU, below it a line for each part that it is cut into."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            found[gpu[1]] = []
        elif found and (part := _MIG.match(line)):
            found[next(reversed(found))].append(part[1])
    return tuple(name for gpu, parts in found.items() for name in (parts or [gpu]))
