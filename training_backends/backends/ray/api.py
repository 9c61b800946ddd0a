"""Typed client for the Jobs API of a Ray cluster (Ray 2.60, checked against a head in 2026-11)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, Field, ValidationError

from training_backends.core.errors import ProtocolError, RunNotFound
from training_backends.http.client import HttpClient
from training_backends.http.error_table import ErrorTable
from training_backends.http.urls import path_segment

__all__ = ["ERRORS", "Node", "RayAPI", "RayJob"]

ERRORS: Final = ErrorTable(backend="ray")
"""The usual meanings of the statuses hold."""

_JOBS: Final = "/api/jobs/"
_ENDED: Final = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})

_M = TypeVar("_M", bound=BaseModel)


class RayJob(BaseModel, frozen=True, extra="ignore"):
    """A submitted job.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: Why it has this status.
        end_time: Milliseconds since the epoch.
    """

    submission_id: str | None = None
    status: str
    message: str | None = None
    metadata: Mapping[str, str] | None = None
    end_time: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its driver has exited."""
        return self.status in _ENDED

    @property
    def ended_at(self) -> datetime | None:
        """When it ended, by the cluster's clock."""
        return datetime.fromtimestamp(self.end_time / 1000, UTC) if self.end_time else None


class Node(BaseModel, frozen=True, extra="ignore"):
    """A machine of the cluster.

    Attributes:
        resources_total: Amounts by name, such as `CPU`, `GPU` and `accelerator_type:H100`.
    """

    state: str
    resources_total: Mapping[str, float] = Field(default_factory=dict)


class RayAPI:
    """The operations over one HTTP client; has no other state."""

    def __init__(self, http: HttpClient) -> None:
        self.http: HttpClient = http

    async def version(self) -> str:
        """Return the version of Ray."""
        found = await self.http.json("GET", "/api/version")
        return str(found.get("ray_version", "of unknown version"))

    async def submit(self, body: Mapping[str, Any]) -> None:
        """Submit a job. Not retried once it may have arrived.

        A second job with the same `submission_id` is answered 500.
        """
        await self.http.json("POST", _JOBS, body=dict(body))

    async def job(self, submission_id: str) -> RayJob | None:
        """Return a job; None if the cluster does not have it, as after a restart of its head."""
        try:
            found = await self.http.json("GET", _JOBS + path_segment(submission_id))
        except RunNotFound:
            return None
        return _read(RayJob, found)

    async def jobs(self) -> Sequence[RayJob]:
        """Return all jobs of the cluster."""
        found = await self.http.json("GET", _JOBS, shape="array")
        return [_read(RayJob, each) for each in found]

    async def logs(self, submission_id: str) -> str:
        """Return what the driver of a job has printed."""
        found = await self.http.json("GET", f"{_JOBS}{path_segment(submission_id)}/logs")
        return str(found.get("logs") or "")

    async def stop(self, submission_id: str) -> None:
        """Stop a job; a repeated request has no further effect."""
        path = f"{_JOBS}{path_segment(submission_id)}/stop"
        await self.http.json("POST", path, repeatable=True)

    async def nodes(self) -> Sequence[Node]:
        """Return the nodes that are alive."""
        found = await self.http.json(
            "GET", "/api/v0/nodes", query=[("detail", "1"), ("limit", "10000")]
        )
        try:
            listed = found["data"]["result"]["result"]
        except (KeyError, TypeError) as error:
            raise ProtocolError("The list of nodes is not as expected.", backend="ray") from error
        return [node for each in listed if (node := _read(Node, each)).state == "ALIVE"]

    async def has_package(self, name: str) -> bool:
        """Return whether the cluster has a package."""
        try:
            await self.http.send("GET", f"/api/packages/gcs/{path_segment(name)}")
        except RunNotFound:
            return False
        return True

    async def put_package(self, name: str, content: bytes) -> None:
        """Store a package; safe to repeat, as its name contains its digest."""
        await self.http.send(
            "PUT",
            f"/api/packages/gcs/{path_segment(name)}",
            content=content,
            headers={"Content-Type": "application/octet-stream"},
            repeatable=True,
        )


def _read(model: type[_M], document: Any) -> _M:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ProtocolError(
            f"The cluster's answer is not a {model.__name__}.", backend="ray"
        ) from error
