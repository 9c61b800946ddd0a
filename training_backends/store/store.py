"""The run store as a whole."""

from training_backends.store.events import Timeline
from training_backends.store.journal import Journals
from training_backends.store.leases import Leases
from training_backends.store.runs import Runs

__all__ = ["RunStore"]


class RunStore(Runs, Journals, Leases, Timeline):
    """Every run and all that is known of it, in one SQL database.

    Every method is one durable transaction, safe across threads and processes, and blocks
    for as long as that takes.
    """
