"""Which GPUs this process may use, told without loading torch."""

import os
import re
import subprocess
from collections.abc import Mapping
from typing import Final

from training_backends.trainer.hub import environment_without_token

__all__ = ["VISIBLE", "visible_devices"]

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
