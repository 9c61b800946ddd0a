"""Identify a home directory, so that each run on a machine is observed only from there."""

import socket
from pathlib import Path
from uuid import uuid4

from training_backends.core.files import hold_lock, make_private_directory, write_atomic
from training_backends.core.run import Place, TrainingRun

__all__ = ["find_place", "is_visible", "make_place"]

_MARK = "home-id"


def find_place(home: Path) -> Place | None:
    """Return the id and host of this home; None if no run was started in it yet."""
    try:
        mark = (home / _MARK).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    return Place(id=mark, host=socket.gethostname(), path=home)


def make_place(home: Path) -> Place:
    """Give a home an id that distinguishes its runs from those of others; safe to repeat."""
    make_private_directory(home)
    with hold_lock(home / f".{_MARK}.lock"):
        place = find_place(home)
        if place is None:
            write_atomic(home / _MARK, uuid4().hex, private=True)
    return place or make_place(home)


def is_visible(run: TrainingRun, own: Place | None, file: Path) -> bool:
    """Return whether a run belongs to this home on this machine.

    Args:
        own: This home, see `find_place`.
        file: A file that exists if the run was started in this home.
    """
    place = run.place
    if place is None or own is None:
        return place is None
    # On a shared or moved disk, the home has another host's name but still the directories.
    return own.id == place.id and (own.host == place.host or file.is_file())
