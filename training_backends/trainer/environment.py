"""Set up the process environment, and list its GPUs, before torch is loaded."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

from training_backends.rundir.handover import ON_STDIN

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
    """Read the Hub token from standard input, if the parent sent one there.

    A variable set here does not appear in `/proc/PID/environ`.
    """
    if os.environ.pop(ON_STDIN, None):
        os.environ["HF_TOKEN"] = sys.stdin.buffer.readline().decode().strip()


def environment_without_token() -> dict[str, str]:
    """Return the environment for child processes, whose environment is readable."""
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}


def prepare_imports(model: str = "") -> None:
    """Skip imports that a model never needs, and silence their warnings.

    peft imports bitsandbytes wherever it is installed, which takes most of a second and logs a
    warning about a missing package on some CPUs. The built-in model is never quantized.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from training_backends.core.config import TINY_MODEL  # noqa: PLC0415  # loads pydantic

    if model == TINY_MODEL:
        # None marks a module as missing to the import system.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


_ENOUGH_FOR_SMALL: Final = 4


def prepare_threads() -> None:
    """Let idle OpenMP threads sleep instead of spin; must run before torch is loaded.

    On a busy machine, spinning threads delay the thread they wait for: steps took up to five times
    as long, measured on two cores shared with other work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def thread_count(*, small: bool, processes: int = 1) -> int:
    """Return the number of compute threads: `OMP_NUM_THREADS` if set, else all CPUs.

    Args:
        small: The model is so small that more than a few threads slow it down.
        processes: Number of processes that share the CPUs.
    """
    if (requested := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(requested):
        return int(requested)
    available = max(1, len(os.sched_getaffinity(0)) // processes)
    return min(available, _ENOUGH_FOR_SMALL) if small else available


VISIBLE: Final = "CUDA_VISIBLE_DEVICES"

_PATIENCE: Final = 20.0
"""Seconds; a suspended driver takes some time to wake up."""
_GPU: Final = re.compile(r"GPU (\d+):")
_MIG: Final = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the visible GPUs, as in `CUDA_VISIBLE_DEVICES`; () if there are none.

    Takes that variable if it is set, else the driver's list.
    """
    chosen = environ.get(VISIBLE)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA ignores everything after an invalid name.
        end = next((at for at, name in enumerate(names) if name in {"", "-1"}), len(names))
        return tuple(names[:end])
    return _listed(_ask_driver())


def _ask_driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607  # its path depends on the driver
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
    """Parse `nvidia-smi -L`: a line per GPU, followed by a line for each of its MIG devices."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            found[gpu[1]] = []
        elif found and (part := _MIG.match(line)):
            found[next(reversed(found))].append(part[1])
    return tuple(name for gpu, parts in found.items() for name in (parts or [gpu]))
