"""The model hub's token, as a parent hands it over; it is handed on to nobody."""

import os
import sys

from training_backends.rundir.handover import ON_STDIN

__all__ = ["environment_without_token", "take_token"]


def take_token() -> None:
    """Read the token from standard input if that is where it is, for the hub's library.

    What is set here does not show in the environment that the system tells of a process.
    """
    if os.environ.pop(ON_STDIN, None):
        os.environ["HF_TOKEN"] = sys.stdin.buffer.readline().decode().strip()


def environment_without_token() -> dict[str, str]:
    """Return the environment for a process that is started here, which shows what it gets."""
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
