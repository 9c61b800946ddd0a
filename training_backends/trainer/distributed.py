"""Data-parallel training with one process per GPU.

The leader holds the run directory, writes events and metrics, handles stop requests, and has
started the others, its followers. Each process computes its share of every step's rows, and the
gradients are summed, so that the result equals single-process training. Each keeps the optimizer
state of its shard of the weights, updates those and broadcasts them (ZeRO stage 1).
"""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import distributed

from training_backends.trainer.errors import ProcessLost, is_out_of_memory

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "ShardedUpdate"]

T = TypeVar("T")

_PATIENCE: Final = timedelta(hours=1)
"""Maximum wait for another process, for example while a checkpoint is written. A dead process is
noticed at once, by its pipe.
"""
_BUCKET: Final = 1 << 24
"""Values per transfer."""
_HERE: Final = "127.0.0.1"


class ProcessGroup:
    """The processes of a run, as seen from one of them; by default a single process.

    Collective operations raise `ProcessLost` if another process has died.

    Args:
        rank: Number of this process; 0 is the leader.
        size: Number of processes.
        port: Local port of the leader's store; None in the leader, which opens one.
    """

    def __init__(self, rank: int = 0, size: int = 1, port: int | None = None) -> None:
        self.rank = rank
        self.size = size
        self._store: Any = None
        if size > 1:
            self._store = _open_store(size, port)

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    @property
    def port(self) -> int:
        """Port on which the followers reach the leader."""
        return int(self._store.port) if self._store else 0

    def connect(self, device: torch.device) -> None:
        """Wait until all processes have loaded the model."""
        if self._store is None:
            return
        # All processes are on this machine, whose hostname may not resolve to it.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        on_gpu = device.type == "cuda"
        with _collective():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=_PATIENCE,
                device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
            )

    def disconnect(self) -> None:
        """Leave the group, so that this process can continue alone."""
        if self._store is not None and distributed.is_initialized():
            with suppress(RuntimeError):  # the others may have exited
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

    def broadcast(self, value: T) -> T:
        """Return the leader's value in every process."""
        if self._store is None:
            return value
        values = [value]
        with _collective():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes in every process."""
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _collective():
            distributed.all_gather_object(values, value)
        return values

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor with its sum over all processes."""
        if self._store is None:
            return
        for bucket in _buckets(tensors):
            joined = _flatten(bucket)
            with _collective():
                distributed.all_reduce(joined)
            _unflatten(joined, bucket)


SINGLE_PROCESS: Final = ProcessGroup()


def _open_store(size: int, port: int | None) -> Any:
    store: Any = distributed.TCPStore  # type: ignore[attr-defined]  # missing from the stubs
    options = {"world_size": size, "wait_for_workers": False, "timeout": _PATIENCE}
    if port is not None:
        return store(_HERE, port, **options)
    # By default the store would listen on all interfaces.
    with socket.create_server((_HERE, 0)) as listener:
        port = listener.getsockname()[1]
        return store(_HERE, port, is_master=True, master_listen_fd=listener.detach(), **options)


@contextmanager
def _collective() -> Iterator[None]:
    """Distinguish the death of another process from errors of this one."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ProcessLost(str(error)) from error


class ShardedUpdate:
    """Assigns each weight to the process that updates it, and distributes the updates.

    Args:
        weights: All trained weights, in the same order in every process.
    """

    def __init__(self, group: ProcessGroup, weights: Sequence[torch.Tensor]) -> None:
        self._group = group
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(group.size)]
        loads = [0] * group.size
        for weight in sorted(weights, key=torch.Tensor.numel, reverse=True):
            least = loads.index(min(loads))
            self._parts[least].append(weight)
            loads[least] += weight.numel()

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Restrict an optimizer to this process's shard, and broadcast it after each step."""
        own = {id(weight) for weight in self._parts[self._group.rank]}
        for group in optimizer.param_groups:
            others = [weight for weight in group["params"] if id(weight) not in own]
            group["params"] = [weight for weight in group["params"] if id(weight) in own]
            for weight in others:
                optimizer.state.pop(weight, None)
        optimizer.register_step_post_hook(lambda *_: self._broadcast())

    @torch.no_grad()
    def _broadcast(self) -> None:
        for owner, weights in enumerate(self._parts):
            for bucket in _buckets(weights):
                joined = _flatten(bucket)
                with _collective():
                    distributed.broadcast(joined, src=owner)
                if owner != self._group.rank:
                    _unflatten(joined, bucket)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group small tensors of one dtype: every transfer has a fixed cost."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _flatten(bucket: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].detach()  # no copy: it may be large
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def _unflatten(joined: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    if joined.data_ptr() == bucket[0].data_ptr():
        return
    for tensor, values in zip(
        bucket, torch.split(joined, [t.numel() for t in bucket]), strict=True
    ):
        tensor.detach().copy_(values.view_as(tensor))
