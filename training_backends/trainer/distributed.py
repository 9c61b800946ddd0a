"""Several processes that train one model together, each on a GPU of its own.

One of them leads: it holds the run directory, tells of the run, hears requests to stop, and has
started the others, which follow it. Each takes its part of every step's rows; the gradients are
summed, so that what is learnt is what one process would learn. Each keeps the optimizer's state
of its part of the weights, updates these and hands them on (stage 1 of ZeRO).
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

from training_backends.trainer.errors import TeamLost, is_out_of_memory

__all__ = ["ALONE", "Team", "Update"]

T = TypeVar("T")

_PATIENCE: Final = timedelta(hours=1)
"""How long one may wait for another, such as for a checkpoint to be written; one that has died
is noticed at once, by its pipe."""
_BUCKET: Final = 1 << 24
"""Values that are sent together."""
_HERE: Final = "127.0.0.1"


class Team:
    """The processes of a run as one of them sees them; by default it is alone.

    Whatever they do together raises `TeamLost` where one of them is gone.

    Args:
        rank: Its number; 0 leads.
        size: How many there are.
        port: Where the leader's store listens, on this machine only; None for the leader, which
            opens one.
    """

    def __init__(self, rank: int = 0, size: int = 1, port: int | None = None) -> None:
        self.rank = rank
        self.size = size
        self._store: Any = None
        if size > 1:
            self._store = _open_store(size, port)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes the run directory."""
        return self.rank == 0

    @property
    def port(self) -> int:
        """Where the others find the leader."""
        return int(self._store.port) if self._store else 0

    def meet(self, device: torch.device) -> None:
        """Wait until all have loaded the model."""
        if self._store is None:
            return
        # All are on this machine, whose name need not lead to it.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        on_gpu = device.type == "cuda"
        with _together():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=_PATIENCE,
                device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
            )

    def part(self) -> None:
        """Leave, so that this process can train alone again."""
        if self._store is not None and distributed.is_initialized():
            with suppress(RuntimeError):  # the others may have gone
                distributed.destroy_process_group()

    def share(self, examples: Sequence[T]) -> Sequence[T]:
        """Return the part of something that is this process's to do."""
        return examples[self.rank :: self.size]

    def join(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """Put together again what was shared out."""
        whole: list[T] = [shares[0][0]] * sum(map(len, shares)) if shares[0] else []
        for rank, share in enumerate(shares):
            whole[rank :: self.size] = share
        return whole

    def tell(self, value: T) -> T:
        """Return the leader's value to all."""
        if self._store is None:
            return value
        told = [value]
        with _together():
            distributed.broadcast_object_list(told, src=0)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Return everybody's value to all."""
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _together():
            distributed.all_gather_object(values, value)
        return values

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put in place of each tensor its sum over all."""
        if self._store is None:
            return
        for bucket in _buckets(tensors):
            joined = _joined(bucket)
            with _together():
                distributed.all_reduce(joined)
            _part(joined, bucket)


ALONE: Final = Team()


def _open_store(size: int, port: int | None) -> Any:
    store: Any = distributed.TCPStore  # type: ignore[attr-defined]  # is there
    settled = {"world_size": size, "wait_for_workers": False, "timeout": _PATIENCE}
    if port is not None:
        return store(_HERE, port, **settled)
    # Left to itself the store would listen to other machines as well.
    with socket.create_server((_HERE, 0)) as listener:
        port = listener.getsockname()[1]
        return store(_HERE, port, is_master=True, master_listen_fd=listener.detach(), **settled)


@contextmanager
def _together() -> Iterator[None]:
    """Tell the end of another process from this one's own failures."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise TeamLost(str(error)) from error


class Update:
    """Who updates which weights, and how the others get them.

    Args:
        weights: All that are trained, in the same order everywhere.
    """

    def __init__(self, team: Team, weights: Sequence[torch.Tensor]) -> None:
        self._team = team
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(team.size)]
        loads = [0] * team.size
        for weight in sorted(weights, key=torch.Tensor.numel, reverse=True):
            least = loads.index(min(loads))
            self._parts[least].append(weight)
            loads[least] += weight.numel()

    def divide(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimizer update only this process's part, and hand it on after each step."""
        ours = {id(weight) for weight in self._parts[self._team.rank]}
        for group in optimizer.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) in ours]
        optimizer.register_step_post_hook(lambda *_: self._hand_on())

    @torch.no_grad()
    def _hand_on(self) -> None:
        for owner, weights in enumerate(self._parts):
            for bucket in _buckets(weights):
                joined = _joined(bucket)
                with _together():
                    distributed.broadcast(joined, src=owner)
                if owner != self._team.rank:
                    _part(joined, bucket)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Put small tensors of one kind together: each sending takes its time."""
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


def _joined(bucket: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].detach()  # itself, for it may be large
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def _part(joined: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    if joined.data_ptr() == bucket[0].data_ptr():
        return
    for tensor, values in zip(
        bucket, torch.split(joined, [t.numel() for t in bucket]), strict=True
    ):
        tensor.detach().copy_(values.view_as(tensor))
