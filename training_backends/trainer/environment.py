"""Set up the process environment, and list its GPUs, before torch is loaded."""

import gc
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from training_backends.rundir.handover import KEYS_ON_STDIN, ON_STDIN
from training_backends.trainer.queue import Device, host_key

__all__ = [
    "environment_without_secrets",
    "importing",
    "show_in_turn",
    "show_only",
    "take_secrets",
    "thread_count",
    "tracker_keys",
    "visible_devices",
]


_TRACKER_KEYS: Final = "TRAINING_BACKENDS_TRACKER_KEYS"


def take_secrets() -> None:
    """Read the Hub token and the keys of integrations from standard input, if the parent sent some.

    A variable set here does not appear in `/proc/PID/environ`.
    """
    for announcing, name in ((ON_STDIN, "HF_TOKEN"), (KEYS_ON_STDIN, _TRACKER_KEYS)):
        if os.environ.pop(announcing, None):
            os.environ[name] = sys.stdin.buffer.readline().decode().strip()


def tracker_keys() -> dict[str, str]:
    """Return the keys of the run's integrations, by their numbers."""
    keys: dict[str, str] = json.loads(os.environ.get(_TRACKER_KEYS, "{}"))
    return keys


def environment_without_secrets() -> dict[str, str]:
    """Return the environment for child processes, whose environment is readable."""
    secrets = {"HF_TOKEN", _TRACKER_KEYS}
    return {name: value for name, value in os.environ.items() if name not in secrets}


_ENOUGH_FOR_SMALL: Final = 4


@contextmanager
def importing(model: str = "") -> Iterator[None]:
    """Import torch and what depends on it in the block, in a third less time.

    Idle OpenMP threads will sleep instead of spin: on a busy machine, spinning threads delay the
    thread they wait for; steps took up to five times as long, measured on two cores shared with
    other work.

    No garbage is collected, as what modules define stays: collections search it again and again,
    which takes a fifth of the time. Later ones do not search it either.

    peft imports bitsandbytes wherever it is installed, which takes most of a second and logs a
    warning about a missing package on some CPUs. The built-in model is never quantized.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from training_backends.core.config import TINY_MODEL  # noqa: PLC0415  # loads pydantic

    if model == TINY_MODEL:
        # None marks a module as missing to the import system.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
_VISIBLE_TO_HIP: Final = "HIP_VISIBLE_DEVICES"
"""On ROCm it takes precedence over the former, which works there as well."""

_PATIENCE: Final = 20.0
"""Seconds; a suspended driver takes some time to wake up."""
_NVIDIA: Final = ("nvidia-smi", "-L")
_GPU: Final = re.compile(r"GPU (\d+): (.*?)(?: \(UUID: (GPU-[^)]+)\))?$")
_MIG: Final = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")
_AMD: Final = (("amd-smi", "list"), ("rocm-smi", "--showuniqueid"))
_AMD_GPU: Final = re.compile(
    r"^GPU: (\d+)$(?:\n[ \t]+\w+: .*$)*?\n[ \t]+UUID: (\S+)"  # amd-smi
    r"|^GPU\[(\d+)\]\s*: Unique ID: (\S+)",  # rocm-smi
    re.MULTILINE,
)


def show_only(device: Device) -> dict[str, str]:
    """Return the environment variables that make only this device visible."""
    return {VISIBLE: device.name} | ({_VISIBLE_TO_HIP: device.name} if device.is_amd else {})


def show_in_turn(devices: Sequence[Device]) -> None:
    """Set the variable that torch's agent divides among its processes; HIP reads it, too."""
    os.environ[VISIBLE] = ",".join(device.name for device in devices)
    os.environ.pop(_VISIBLE_TO_HIP, None)


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """Return the visible GPUs; () if there are none.

    Takes the variables that select some if they are set, else the driver's list.
    """
    listed = _list_nvidia(_ask_driver(*_NVIDIA), environ)
    is_amd = False
    if not listed:
        answers = (_list_amd(_ask_driver(*command)) for command in _AMD)
        listed = next((found for found in answers if found), {})
        is_amd = bool(listed)
    chosen = environ.get(VISIBLE)
    if is_amd:
        chosen = environ.get(_VISIBLE_TO_HIP, chosen)
    names = [*listed] if chosen is None else _names(chosen)
    return tuple(_device(name, listed, is_amd=is_amd) for name in names)


def _names(chosen: str) -> list[str]:
    names = [name.strip() for name in chosen.split(",")]
    # CUDA ignores everything after an invalid name.
    end = next((at for at, name in enumerate(names) if name in {"", "-1"}), len(names))
    return names[:end]


def _device(name: str, listed: Mapping[str, str | None], *, is_amd: bool) -> Device:
    """Return a device by its name; a UUID may be shortened."""
    key = listed.get(name)
    if key is None and not name.isdecimal():
        matching = [each for each in listed.values() if each and each.startswith(name)]
        key = matching[0] if len(matching) == 1 else name
    return Device(name, key or f"{host_key()}-{name}", is_amd)


def _ask_driver(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  # fixed commands; their path depends on the driver
            command,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=environment_without_secrets(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _list_nvidia(text: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    """Parse `nvidia-smi -L`: a line per GPU, followed by a line for each of its MIG devices.

    Returns the UUID of each device by its name, which is the UUID of a MIG device, else a number.
    """
    found: dict[str, list[str]] = {}
    keys: dict[str, str | None] = {}
    models = set()
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            found[gpu[1]] = []
            keys[gpu[1]] = gpu[3]
            models.add(gpu[2])
        elif found and (part := _MIG.match(line)):
            found[next(reversed(found))].append(part[1])
            keys[part[1]] = part[1]
    if len(models) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # CUDA numbers unequal GPUs in another order than the driver.
        keys = {name: key if key == name else None for name, key in keys.items()}
    return {name: keys[name] for gpu, parts in found.items() for name in (parts or [gpu])}


def _list_amd(text: str) -> dict[str, str | None]:
    """Parse `amd-smi list` or `rocm-smi --showuniqueid`: the UUID of each GPU by its number."""
    pairs = ((new or old, uuid or unique) for new, uuid, old, unique in _AMD_GPU.findall(text))
    return {number: None if key == "N/A" else key for number, key in pairs}
