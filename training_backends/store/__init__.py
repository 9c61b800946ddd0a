"""The run store: runs, launch journals, logs and metrics in one database."""

from training_backends.store.events import EVENT_SOURCES, Delivery, MetricPoint, Metrics
from training_backends.store.journal import JournalEntry
from training_backends.store.leases import Lease, LeaseLost
from training_backends.store.runs import LiveRuns
from training_backends.store.store import RunStore

__all__ = [
    "EVENT_SOURCES",
    "Delivery",
    "JournalEntry",
    "Lease",
    "LeaseLost",
    "LiveRuns",
    "MetricPoint",
    "Metrics",
    "RunStore",
]
