"""The run store."""

from training_backends.store.destinations import Destinations
from training_backends.store.events import Timeline
from training_backends.store.journal import Journals
from training_backends.store.leases import LeaseTable
from training_backends.store.runs import Runs

__all__ = ["RunStore"]


class RunStore(Runs, Journals, LeaseTable, Timeline, Destinations):
    """All runs with their journals, logs, metrics and leases in one SQL database.

    Every method is one durable, blocking transaction, safe across threads and processes.
    """
