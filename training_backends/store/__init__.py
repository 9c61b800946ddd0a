"""The run store: runs, launch journals, logs and metrics in one database."""

from training_backends.store.events import Delivery, MetricPoint
from training_backends.store.journal import JournalEntry
from training_backends.store.leases import Lease, LeaseLost
from training_backends.store.runs import LiveRuns
from training_backends.store.store import RunStore

__all__ = [
    "Delivery",
    "JournalEntry",
    "Lease",
    "LeaseLost",
    "LiveRuns",
    "MetricPoint",
    "RunStore",
]
