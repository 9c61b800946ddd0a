"""The run store: every run, what its launch has done, what happened since, in one database."""

from training_backends.client.store.journal import JournalEntry
from training_backends.client.store.leases import Lease, LeaseLost
from training_backends.client.store.runs import LiveRuns
from training_backends.client.store.store import RunStore
from training_backends.client.store.timeline import Delivery, MetricPoint

__all__ = [
    "Delivery",
    "JournalEntry",
    "Lease",
    "LeaseLost",
    "LiveRuns",
    "MetricPoint",
    "RunStore",
]
