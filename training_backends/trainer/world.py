"""The processes that train one run, as seen from one of them.

The leader (rank 0) writes the run directory. Each process computes its share of every step's rows;
the gradients are summed, so that the result equals single-process training.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import distributed

__all__ = ["ALONE", "World", "has_lost_contact", "join_world"]

T = TypeVar("T")

_PATIENCE: Final = timedelta(hours=1)
"""Maximum wait for another process, for example while a checkpoint is written. The agent notices a
dead process at once.
"""


class World:
    """The processes of a run; by default a single one. All methods are collective.

    Attributes:
        is_apart: Each process has a run directory of its own.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, is_apart: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.is_apart = is_apart

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def leave(self) -> None:
        """Leave the process group, so that this process can continue alone."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def shard(self, examples: Sequence[T]) -> Sequence[T]:
        """Return this process's share of a sequence."""
        return examples[self.rank :: self.size]

    def unshard(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """Reassemble a sequence from the shares of all processes."""
        joined: list[T] = [shares[0][0]] * sum(map(len, shares)) if shares[0] else []
        for rank, share in enumerate(shares):
            joined[rank :: self.size] = share
        return joined

    def micro_batches(self, examples: Sequence[T], size: int) -> list[tuple[Sequence[T], bool]]:
        """Divide this process's share of a sequence into batches, and tell which ones count.

        Every process receives the same number of batches, because each of them gathers weights
        from all processes. A process without rows left repeats the last row, which does not count.
        """
        share = self.shard(examples)
        longest = -(-len(examples) // self.size)
        return [
            (share[first : first + size] or examples[-1:], first < len(share))
            for first in range(0, longest, size)
        ]

    def broadcast(self, value: T) -> T:
        """Return the leader's value in every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Copy the leader's values into a contiguous tensor of every process."""
        if self.size > 1 and tensor.numel():
            # As bytes, because not every backend knows every type.
            distributed.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        return self._reduce(value, distributed.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the largest value of a number in any process."""
        return self._reduce(value, distributed.ReduceOp.MAX)

    def _reduce(self, value: float, operation: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)  # on the CPU: it waits for no GPU
        distributed.all_reduce(tensor, operation)
        return tensor.item()


ALONE: Final = World()


def join_world(device: torch.device, *, is_apart: bool = False) -> World:
    """Join the process group that the environment describes, as torch's elastic agent sets it.

    A group that exists already, such as Ray Train's, is used as it is.

    Args:
        is_apart: See `World`.
    """
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        _connect(device, rank=int(os.environ["RANK"]), size=int(os.environ["WORLD_SIZE"]))
    return World(distributed.get_rank(), distributed.get_world_size(), is_apart=is_apart)


def _connect(device: torch.device, *, rank: int, size: int) -> None:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if host == "127.0.0.1":  # gloo would look up the hostname, which may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Any = distributed.TCPStore(  # type: ignore[attr-defined]  # missing from the stubs
        host, port, size, is_master=rank == 0 and not has_store, timeout=_PATIENCE
    )
    # After a restart, the agent's store still has the addresses of the processes before it.
    life = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/"
    life += os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=distributed.PrefixStore(life, store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )


_LOST: Final = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def has_lost_contact(error: BaseException) -> bool:
    """Return whether an error means that another process has died, not that this one failed."""
    # gloo raises plain RuntimeErrors.
    is_report = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
    return is_report or isinstance(error, distributed.DistError)
