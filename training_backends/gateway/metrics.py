"""Prometheus metrics: requests of this process, and jobs, bytes and speed of the database.

No label has an unbounded set of values: routes are templates, and neither jobs nor projects are
labels.
"""

import time
from collections.abc import Iterable
from typing import Any, Final

import anyio
import sqlalchemy as sa
from anyio import to_thread
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from training_backends.gateway.store import GatewayStore, present
from training_backends.protocols.mistral.status import ACTIVE
from training_backends.store.gateway_schema import IS_OPEN, files, jobs
from training_backends.store.leases import LeaseTable
from training_backends.store.schema import metrics

__all__ = ["GatewayMetrics"]

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
JOBS_EVERY: Final = 5.0
"""Seconds for which the figures of jobs are used again."""
BYTES_EVERY: Final = 60.0
"""Seconds for the sum over all files."""


class GatewayMetrics:
    """The metrics of one application."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_LeaseMoves())
        self._requests = Counter(
            "training_backends_http_requests",
            "Requests, by the template of their route.",
            ("method", "route", "code"),
            registry=registry,
        )
        self._duration = Histogram(
            "training_backends_http_request_duration_seconds",
            "Time until the end of the response.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._received = Counter(
            "training_backends_http_received_bytes",
            "Bytes of request bodies, uploads among them.",
            ("route",),
            registry=registry,
        )
        self._sent = Counter(
            "training_backends_http_sent_bytes",
            "Bytes of response bodies.",
            ("route",),
            registry=registry,
        )
        self._jobs = Gauge(
            "training_backends_jobs",
            "Unfinished jobs in the database.",
            ("status",),
            registry=registry,
        )
        self._queue_age = Gauge(
            "training_backends_job_queue_age_seconds",
            "Age of the oldest job that waits to be validated or to train.",
            registry=registry,
        )
        self._speed = Gauge(
            "training_backends_trainer_tokens_per_second",
            "Sum of the latest speed of the running jobs.",
            registry=registry,
        )
        self._stored = Gauge(
            "training_backends_stored_bytes", "Size of all files.", registry=registry
        )
        self._lock = anyio.Lock()
        self._jobs_at = self._bytes_at = float("-inf")

    def count(
        self, method: str, route: str, code: int, seconds: float, *, received: int, sent: int
    ) -> None:
        """Count a request."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(code)).inc()
        self._duration.labels(method, route).observe(seconds)
        if received:
            self._received.labels(route).inc(received)
        if sent:
            self._sent.labels(route).inc(sent)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics as text, and its content type.

        Args:
            accept: Chooses between the text format 0.0.4 and OpenMetrics.

        Raises:
            StoreError: The database cannot be used.
        """
        async with self._lock:
            await self._refresh()
        encode, content_type = choose_encoder(accept)
        # In a thread: reads /proc.
        return await to_thread.run_sync(encode, self._registry), content_type

    async def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._jobs_at >= JOBS_EVERY:
            counts, oldest, speed = await self._store.aread(_read_jobs)
            for status in ACTIVE:
                self._jobs.labels(status).set(counts.get(status, 0))
            self._queue_age.set(max(time.time() - oldest, 0) if oldest is not None else 0)
            self._speed.set(speed)
            self._jobs_at = now
        if now - self._bytes_at >= BYTES_EVERY:
            self._stored.set(await self._store.aread(_read_bytes))
            self._bytes_at = now


def _read_jobs(connection: sa.Connection) -> tuple[dict[str, int], float | None, float]:
    """Return unfinished jobs by status, the oldest in the queue, and the speed of the running."""
    status, created_at = jobs.c.status, jobs.c.created_at
    grouped = sa.select(status, sa.func.count(), sa.func.min(created_at))
    active = grouped.where(IS_OPEN, status.in_(ACTIVE)).group_by(status)
    rows = connection.execute(active).all()
    queued = [row[2] for row in rows if row[0] in {"QUEUED", "VALIDATING"}]
    latest = (
        sa.select(metrics.c.value)
        .where(metrics.c.run_id == jobs.c.id, metrics.c.name == "tokens_per_second")
        .order_by(metrics.c.step.desc())
        .limit(1)
        .scalar_subquery()
    )
    speed = sa.select(sa.func.sum(latest)).where(IS_OPEN, status == "RUNNING")
    found = connection.execute(speed).scalar()
    return {row[0]: row[1] for row in rows}, min(queued, default=None), float(found or 0)


def _read_bytes(connection: sa.Connection) -> int:
    query = sa.select(sa.func.sum(files.c.bytes)).where(*present())
    return int(connection.execute(query).scalar() or 0)


class _LeaseMoves(Collector):
    """Reads the count of the process when it is asked."""

    def collect(self) -> Iterable[Metric]:
        """Return the metric."""
        name, text = "training_backends_lease_moves", "Leases taken over from a process that died."
        family: Any = CounterMetricFamily(name, text)
        family.add_metric([], LeaseTable.moves)
        return [family]
