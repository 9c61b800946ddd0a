"""What the processes of a run share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training_backends.trainer.world import ALONE, World, has_lost_contact

pytestmark = pytest.mark.engine


@given(st.lists(st.integers()), st.integers(1, 5))
def test_shares_are_reassembled_in_order(values: list[int], size: int) -> None:
    """Each value is in exactly one share."""
    shares = [World(rank, size).shard(values) for rank in range(size)]
    assert World(0, size).unshard(shares) == values


@given(st.lists(st.integers(), min_size=1), st.integers(1, 5), st.integers(1, 4))
def test_processes_run_equally_many_micro_batches(
    values: list[int], processes: int, size: int
) -> None:
    """Every value counts once, and no batch is empty or too large."""
    all_batches = [World(rank, processes).micro_batches(values, size) for rank in range(processes)]
    assert len({len(batches) for batches in all_batches}) == 1
    assert all(1 <= len(part) <= size for batches in all_batches for part, _ in batches)
    counted = [v for batches in all_batches for part, counts in batches if counts for v in part]
    assert sorted(counted) == sorted(values)


def test_one_process_alone_has_everything() -> None:
    """It waits for nobody."""
    assert ALONE.is_leader
    assert ALONE.shard([1, 2]) == [1, 2]
    assert ALONE.unshard([[1, 2]]) == [1, 2]
    assert ALONE.micro_batches([], 2) == []
    assert (ALONE.broadcast(3), ALONE.all_gather(3)) == (3, [3])
    assert (ALONE.sum(0.1), ALONE.max(0.1)) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
    ],
)
def test_a_lost_connection_is_not_a_failure_of_this_process(
    error: Exception, *, is_lost: bool
) -> None:
    """The process that failed first reports why; the others only lose contact with it."""
    assert has_lost_contact(error) is is_lost
