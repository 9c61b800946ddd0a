"""Leases: one holder at a time, across tasks, processes and deaths."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from training_backends import StoreError
from training_backends.client.leases import Leases
from training_backends.store import RunStore

pytestmark = pytest.mark.anyio

HOLD = """
import sys, anyio
from pathlib import Path
from training_backends.client.leases import Leases
from training_backends.store import RunStore

async def main():
    home = Path(sys.argv[1])
    async with Leases(RunStore(sys.argv[2]), home / "leases").hold("work"):
        print("held", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.fixture
def store(url: str) -> Iterator[RunStore]:
    store = RunStore(url)
    yield store
    store.close()


@pytest.fixture
def leases(store: RunStore, tmp_path: Path) -> Iterator[Leases]:
    leases = Leases(store, tmp_path / "leases")
    yield leases
    leases.close()


@pytest.fixture
def others(store: RunStore, tmp_path: Path) -> Iterator[Leases]:
    """What another process on this machine has."""
    leases = Leases(store, tmp_path / "leases")
    yield leases
    leases.close()


async def test_one_holds_at_a_time(leases: Leases, others: Leases) -> None:
    """Whoever comes second gets nothing, or waits."""
    async with leases.hold("work"):
        async with others.try_hold("work") as lease:
            assert lease is None
        assert others.is_held("work")
    async with others.try_hold("work") as lease:
        assert lease is not None


async def test_tasks_of_one_process_exclude_each_other(leases: Leases) -> None:
    """They have the same owner, and are two all the same."""
    async with leases.hold("work"), leases.try_hold("work") as lease:
        assert lease is None


async def test_whoever_waits_gets_it_next(leases: Leases, others: Leases) -> None:
    """Waiting ends when the holder lets go."""
    order: list[str] = []

    async def second() -> None:
        async with others.hold("work"):
            order.append("second")

    async with anyio.create_task_group() as tasks, leases.hold("work"):
        tasks.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        order.append("first")
    assert order == ["first", "second"]


async def test_an_error_lets_go(leases: Leases, others: Leases) -> None:
    """Nothing stays locked behind a failure."""
    with pytest.raises(LookupError):
        async with leases.hold("work"):
            raise LookupError
    async with others.try_hold("work") as lease:
        assert lease is not None


async def test_a_killed_holder_blocks_nobody(tmp_path: Path, url: str, leases: Leases) -> None:
    """The next one does not have to wait until the time is over."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), url], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert leases.is_held("work")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert not leases.is_held("work")
    async with leases.try_hold("work") as lease:
        assert lease is not None


async def test_closing_lets_go(store: RunStore, tmp_path: Path, others: Leases) -> None:
    """A client that is closed leaves no lease and no file behind."""
    leases = Leases(store, tmp_path / "leases")
    held = leases.hold("work")
    await held.__aenter__()
    leases.close()
    async with others.try_hold("work") as lease:
        assert lease is not None
    assert len(list((tmp_path / "leases").iterdir())) == 1


async def test_what_a_store_out_of_reach_has_kept_blocks_nobody(
    store: RunStore, leases: Leases, others: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was taken or released, the answer was lost: this process goes on all the same."""

    def lose(answer: Callable[..., object]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            answer(*arguments, **named)
            raise StoreError("The connection is gone.")

        return call

    with monkeypatch.context() as patch:
        patch.setattr(store, "take", lose(store.take))
        with pytest.raises(StoreError):
            async with leases.hold("work"):
                pass
    assert not leases.is_held("work")
    with monkeypatch.context() as patch:
        patch.setattr(store, "release", lambda _: lose(str)())
        async with leases.hold("work"):
            assert others.is_held("work")
    async with leases.try_hold("work") as lease:
        assert lease is not None
