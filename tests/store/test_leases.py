"""Leases: one holder at a time, whatever dies, sleeps or comes too late."""

from datetime import timedelta
from pathlib import Path

import pytest

from tests.store.conftest import MakeRun, at_once
from training_backends import StoreError
from training_backends.store import Lease, LeaseLost, RunStore
from training_backends.store.leases import LeaseTable

HOUR = timedelta(hours=1)
OVER = timedelta(0)


def nobody_knows(_: str) -> None:
    """Answer as for an owner on another machine."""


def is_gone(_: str) -> bool:
    return True


def lives(_: str) -> bool:
    return False


def take(store: RunStore, owner: str, ttl: timedelta = HOUR) -> Lease:
    lease = store.take("work", owner, ttl, is_gone=is_gone)
    assert lease is not None
    return lease


def test_a_held_lease_is_given_to_nobody(store: RunStore) -> None:
    """Not even to its holder once more: two of its tasks could ask."""
    take(store, "a")
    for owner in ("a", "b"):
        assert store.take("work", owner, HOUR, is_gone=nobody_knows) is None
    assert store.holder("work") == "a"


def test_leases_of_different_names_are_independent(store: RunStore) -> None:
    """Whoever launches one run keeps nobody from launching another."""
    take(store, "a")
    assert store.take("other work", "b", HOUR, is_gone=nobody_knows) is not None


def test_a_released_lease_can_be_taken(store: RunStore) -> None:
    """The next one does not wait for the time to be over."""
    store.release(take(store, "a"))
    assert store.holder("work") is None
    assert store.take("work", "b", HOUR, is_gone=nobody_knows) is not None


def test_a_lease_runs_out_where_nobody_knows_its_owner(store: RunStore) -> None:
    """A machine that went away holds nothing for ever."""
    take(store, "a", OVER)
    assert store.holder("work") is None
    taken = store.take("work", "b", HOUR, is_gone=nobody_knows)
    assert taken is not None
    assert store.holder("work") == "b"


def test_a_renewed_lease_does_not_run_out(store: RunStore) -> None:
    """A sign of life is enough."""
    assert store.renew(take(store, "a", OVER), HOUR)
    assert store.take("work", "b", HOUR, is_gone=nobody_knows) is None


def test_an_owner_that_is_gone_is_not_waited_for(store: RunStore) -> None:
    """Where it can be seen that it died, its time does not matter."""
    take(store, "a")
    assert store.take("work", "b", HOUR, is_gone=is_gone) is not None


def test_a_living_owner_is_not_robbed_however_late_it_is(store: RunStore) -> None:
    """A stopped or slow process on this machine will go on where it was."""
    take(store, "a", OVER)
    assert store.take("work", "b", HOUR, is_gone=lives) is None
    assert store.holder("work", is_gone=lives) == "a"


def test_each_taking_has_a_greater_token(store: RunStore) -> None:
    """Also after all leases were released, so an old one is never mistaken for a new one."""
    tokens = []
    for _ in range(3):
        lease = take(store, "a")
        tokens.append(lease.token)
        store.release(lease)
    assert tokens == sorted(set(tokens))


def test_a_lost_lease_is_neither_renewed_nor_released(store: RunStore) -> None:
    """Who was taken for dead does no harm when it comes back."""
    lost = take(store, "a")
    take(store, "b")
    assert not store.renew(lost, HOUR)
    store.release(lost)
    assert store.holder("work") == "b"


def test_under_a_lost_lease_nothing_is_written_to_the_journal(
    store: RunStore, make_run: MakeRun
) -> None:
    """Two launches of one run cannot write over each other."""
    store.insert(make_run("r"))
    lost = take(store, "a")
    store.begin("r", "create", lease=lost)
    mine = take(store, "b")
    with pytest.raises(LeaseLost, match="'work' was taken over by b"):
        store.begin("r", "start", lease=lost)
    with pytest.raises(LeaseLost):
        store.finish("r", "create", "theirs", lease=lost)
    with pytest.raises(LeaseLost):
        store.forget("r", "create", lease=lost)
    store.finish("r", "create", "mine", lease=mine)
    entry = store.entry("r", "create")
    assert entry is not None
    assert entry.result == "mine"
    assert store.entry("r", "start") is None


def test_a_late_holder_may_write_while_nobody_has_taken_over(
    store: RunStore, make_run: MakeRun
) -> None:
    """It is the next holder that fences off the last one, not the clock."""
    store.insert(make_run("r"))
    store.begin("r", "create", lease=take(store, "a", OVER))
    assert store.entry("r", "create") is not None


def test_a_released_lease_is_no_leave_to_write(store: RunStore, make_run: MakeRun) -> None:
    """Somebody may have held it in between; the error is one of the store's."""
    store.insert(make_run("r"))
    lease = take(store, "a")
    store.release(lease)
    with pytest.raises(StoreError):
        store.begin("r", "create", lease=lease)


def test_only_one_of_many_processes_holds_a_lease(url: str, tmp_path: Path) -> None:
    """What is done under a lease is done alone."""
    number = tmp_path / "number"
    number.write_text("0")
    owners = at_once(3, "up", url, number)
    assert int(number.read_text()) == 6 * len(set(owners))


def test_a_lease_that_another_process_has_lost_counts_as_moved(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a released one, one's own, or one that could not be stored."""
    moves = LeaseTable.moves
    store.release(take(store, "a"))
    take(store, "a")
    take(store, "a")
    assert LeaseTable.moves == moves
    with monkeypatch.context() as patched:
        patched.setattr("training_backends.store.leases.utc_now", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(store, "b")
    assert LeaseTable.moves == moves
    take(store, "b")
    assert LeaseTable.moves == moves + 1
