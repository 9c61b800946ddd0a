"""The workers of a run, and whether a cluster can have them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from training_backends.backends.ray.api import Node
from training_backends.core.config import Resources
from training_backends.core.errors import Issue

__all__ = ["Workers", "resource_issues"]


class Workers(NamedTuple):
    """Equal workers, each on one node.

    Attributes:
        cpus: Of each worker.
        gpus: Of each worker.
        accelerator: Ray's name of the GPU's type, such as `H100`.
    """

    number: int
    cpus: float
    gpus: int
    accelerator: str | None

    @classmethod
    def of(cls, resources: Resources, nodes: Sequence[Node]) -> "Workers":
        """Return the workers that a configuration asks for.

        By default one with one CPU core, and with one GPU if the cluster has any.
        """
        has_gpus = any(node.resources_total.get("GPU", 0) >= 1 for node in nodes)
        return cls(
            number=resources.workers or 1,
            cpus=resources.cpus or 1.0,
            gpus=int(has_gpus) if resources.gpus is None else resources.gpus,
            accelerator=resources.accelerator,
        )

    def per_node(self, node: Node) -> int:
        """Return how many of them fit on an idle node."""
        total = node.resources_total
        if self.accelerator and f"accelerator_type:{self.accelerator}" not in total:
            return 0
        fits = [total.get("CPU", 0) // self.cpus]
        if self.gpus:
            fits.append(total.get("GPU", 0) // self.gpus)
        return int(min(fits))


def resource_issues(
    resources: Resources, nodes: Sequence[Node], *, autoscaling: bool
) -> Iterator[Issue]:
    """Yield what the cluster does not have; Ray would wait for it forever."""
    wanted = Workers.of(resources, nodes)
    room = sum(map(wanted.per_node, nodes))
    if room >= wanted.number:
        return
    each = f"{wanted.cpus:g} CPU cores" + (f" and {wanted.gpus} GPUs" if wanted.gpus else "")
    kind = f" of type {wanted.accelerator}" if wanted.accelerator else ""
    yield Issue(
        code="insufficient_resources",
        message=f"the cluster's {len(nodes)} nodes have room for {room} of {wanted.number} workers "
        f"with {each}{kind}",
        field="resources",
        fix="reduce them, or set ray.autoscaling if the cluster adds nodes",
        severity="warning" if autoscaling else "error",
    )
