"""Webhook events of jobs."""

from typing import Any, Final

__all__ = ["JOB_EVENTS", "job_event"]

JOB_EVENTS: Final = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses of a job that have an event `fine_tuning.job.<status>`."""


def job_event(event_id: str, status: str, created_at: int, job_id: str) -> dict[str, Any]:
    """Return the event for a job that has finished."""
    return {
        "id": event_id,
        "object": "event",
        "created_at": created_at,
        "type": f"fine_tuning.job.{status}",
        "data": {"id": job_id},
    }
