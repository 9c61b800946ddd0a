"""Who may train, and in which order; nothing is trained."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.waiting import wait_until
from training_backends.core.files import hold_lock
from training_backends.trainer.errors import Stopped
from training_backends.trainer.queue import (
    Device,
    QueueEntry,
    Slot,
    hold_slots,
    host_key,
    slots_for,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ONE = slots_for((), 1)

WAITER = """
import sys
from datetime import datetime
from pathlib import Path
from training_backends.trainer.queue import QueueEntry, hold_slots, slots_for

turn = QueueEntry("dead", 5, datetime.fromisoformat(sys.argv[2]))
told = lambda position: print(position, flush=True)
never = lambda: False
with hold_slots(Path(sys.argv[1]), turn, slots_for((), 1), on_wait=told, should_stop=never):
    print("in", flush=True)
"""


def turn(run_id: str, priority: int = 0, minutes: int = 0) -> QueueEntry:
    """Make the turn of a run that came some minutes after noon."""
    return QueueEntry(run_id, priority, NOON + timedelta(minutes=minutes))


class Machine:
    """Runs that wait for a place, each in a thread, until it is told to leave."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.positions: dict[str, list[int]] = {}
        self.began: list[str] = []
        self.at: dict[str, tuple[Slot, ...]] = {}
        self.stopped: set[str] = set()
        self._leave = {"": threading.Event()}
        self._threads: list[threading.Thread] = []

    def add(self, turn: QueueEntry, places: Sequence[Slot] = ONE, gpus: int = 1) -> None:
        """Have a run wait."""
        self.positions[turn.run_id] = []
        self._leave[turn.run_id] = threading.Event()
        thread = threading.Thread(target=self._live, args=(turn, places, gpus), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self, turn: QueueEntry, places: Sequence[Slot], gpus: int) -> None:
        name = turn.run_id
        try:
            with hold_slots(
                self.directory,
                turn,
                places,
                gpus=gpus,
                on_wait=self.positions[name].append,
                should_stop=lambda: name in self.stopped or self._leave[""].is_set(),
            ) as held:
                self.at[name] = held
                self.began.append(name)
                self._leave[name].wait()
            del self.at[name]
        except Stopped:
            self.stopped.add(name)

    def devices(self) -> dict[str, list[str | None]]:
        """Return the GPUs of each run that trains."""
        return {
            name: [place.device and place.device.name for place in held]
            for name, held in self.at.copy().items()
        }

    def leave(self, run_id: str) -> None:
        """Have a run end that trains."""
        self._leave[run_id].set()

    def close(self) -> None:
        """End all."""
        for event in self._leave.values():
            event.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "slots")
    yield made
    made.close()


def test_the_highest_priority_first_then_who_came_first(machine: Machine) -> None:
    """Whatever order the processes come in; nobody who comes later overtakes."""
    machine.add(turn("first"))
    wait_until(lambda: machine.began == ["first"])
    order = ["urgent", "a", "b", "c", "idle"]
    machine.add(turn("idle", -1, minutes=1))
    machine.add(turn("c", minutes=4))
    machine.add(turn("a", minutes=2))
    machine.add(turn("b", minutes=3))
    machine.add(turn("urgent", 1, minutes=9))
    places = range(1, 6)
    wait_until(lambda: [machine.positions[name][-1:] for name in order] == [[n] for n in places])
    for name in ["first", *order]:
        wait_until(lambda name=name: list(machine.at) == [name])
        machine.leave(name)
    wait_until(lambda: not machine.at)
    assert machine.began == ["first", *order]


def test_a_position_is_told_once_and_again_when_it_changes(machine: Machine) -> None:
    """One who gets a place at once is told of none."""
    machine.add(turn("first"))
    wait_until(lambda: machine.at)
    machine.add(turn("second", minutes=1))
    wait_until(lambda: machine.positions["second"])
    machine.add(turn("third", minutes=2))
    wait_until(lambda: machine.positions["third"])
    machine.leave("first")
    wait_until(lambda: machine.positions["third"] == [2, 1])
    assert machine.positions == {"first": [], "second": [1], "third": [2, 1]}


def test_who_came_from_before_a_restart_keeps_its_turn(machine: Machine) -> None:
    """The time at which a run first asked counts, not that of its newest process."""
    machine.add(turn("first"))
    wait_until(lambda: machine.at)
    machine.add(turn("younger", minutes=2))
    wait_until(lambda: machine.positions["younger"] == [1])
    machine.add(turn("restarted", minutes=1))
    wait_until(lambda: machine.positions["younger"] == [1, 2])
    machine.leave("first")
    wait_until(lambda: list(machine.at) == ["restarted"])


def test_the_dead_do_not_wait(machine: Machine) -> None:
    """The ticket of a process that was killed holds nobody up, and is thrown away."""
    machine.add(turn("first"))
    wait_until(lambda: machine.at)
    command = [sys.executable, "-c", WAITER, str(machine.directory), NOON.isoformat()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "1\n"
        machine.add(turn("second", minutes=1))
        wait_until(lambda: machine.positions["second"] == [2])
        child.kill()
    wait_until(lambda: machine.positions["second"] == [2, 1])
    machine.leave("first")
    wait_until(lambda: list(machine.at) == ["second"])
    assert not any("dead" in path.name for path in machine.directory.rglob("*"))


def test_a_ticket_that_was_tidied_away_is_drawn_again(machine: Machine) -> None:
    """Whoever empties the directory changes nothing for who waits."""
    machine.add(turn("first"))
    wait_until(lambda: machine.at)
    machine.add(turn("second", minutes=1))
    wait_until(lambda: machine.positions["second"] == [1])
    (ticket,) = (machine.directory / "tickets").iterdir()
    ticket.unlink()
    wait_until(ticket.exists)
    machine.leave("first")
    wait_until(lambda: list(machine.at) == ["second"])


def test_who_stops_waiting_leaves_nothing(machine: Machine) -> None:
    """The ones behind it move up."""
    machine.add(turn("first"))
    wait_until(lambda: machine.at)
    machine.add(turn("second", minutes=1))
    machine.add(turn("third", minutes=2))
    wait_until(lambda: machine.positions["third"][-1:] == [2])
    machine.stopped.add("second")
    wait_until(lambda: machine.positions["third"][-1:] == [1])
    assert len(list((machine.directory / "tickets").iterdir())) == 1


def test_never_more_at_once_than_there_are_places(machine: Machine) -> None:
    """Three places, twelve runs: three train at any time, and each gets its turn in order."""
    places = slots_for((), 3)
    names = [f"run-{number:02d}" for number in range(12)]
    for minute, name in enumerate(names):
        machine.add(turn(name, minutes=minute), places)
        wait_until(lambda name=name: name in machine.began or machine.positions[name])
    for done, name in enumerate(names):
        expected = min(done + 3, len(names))
        wait_until(lambda expected=expected: len(machine.began) == expected)
        assert len(machine.at) <= 3
        machine.leave(name)
        wait_until(lambda name=name: name not in machine.at)
    assert machine.began == names


def gpus(*names: str) -> tuple[Device, ...]:
    """Make devices."""
    return tuple(Device(name, f"key-{name}") for name in names)


def test_each_gpu_has_one_run(machine: Machine) -> None:
    """A second run takes the other device, a third waits for whichever is free first."""
    places = slots_for(gpus("0", "GPU-8f2c"), None)
    for minute, name in enumerate(["a", "b", "c"]):
        machine.add(turn(name, minutes=minute), places)
        wait_until(lambda name=name: name in machine.at or machine.positions[name] == [1])
    assert machine.devices() == {"a": ["0"], "b": ["GPU-8f2c"]}
    machine.leave("b")
    wait_until(lambda: "c" in machine.at)
    assert machine.at["c"] == (places[1],)


def test_a_run_on_several_gpus_waits_for_all_of_them(machine: Machine) -> None:
    """Meanwhile it holds none, and nobody behind it overtakes it."""
    devices = gpus("0", "1", "2")
    places = slots_for(devices, None)
    machine.add(turn("a"), places)
    wait_until(lambda: machine.devices() == {"a": ["0"]})
    machine.add(turn("b", minutes=1), places)
    wait_until(lambda: "b" in machine.at)
    machine.add(turn("two", minutes=2), slots_for(devices, None, 2), gpus=2)
    wait_until(lambda: machine.positions["two"] == [1])
    machine.add(turn("c", minutes=3), places)
    wait_until(lambda: machine.positions["c"] == [2])
    machine.leave("a")
    wait_until(machine.devices, lambda held: held == {"b": ["1"], "two": ["0", "2"]})
    machine.leave("b")
    wait_until(machine.devices, lambda held: held == {"two": ["0", "2"], "c": ["1"]})


def test_one_run_at_a_time_may_have_several_gpus(machine: Machine) -> None:
    """The most that may train at once counts runs, not GPUs."""
    devices = gpus("0", "1")
    machine.add(turn("two"), slots_for(devices, 1, 2), gpus=2)
    wait_until(lambda: "two" in machine.at)
    machine.add(turn("one", minutes=1), slots_for(devices, 1))
    wait_until(lambda: machine.positions["one"] == [1])
    assert machine.devices() == {"two": ["0", "1"]}


def test_as_many_runs_as_is_said_have_several_gpus_each(machine: Machine) -> None:
    """Two at once take all four; a third waits."""
    places = slots_for(gpus("0", "1", "2", "3"), 2, 2)
    for minute, name in enumerate(["a", "b", "c"]):
        machine.add(turn(name, minutes=minute), places, gpus=2)
        wait_until(lambda name=name: name in machine.at or machine.positions[name] == [1])
    assert machine.devices() == {"a": ["0", "1"], "b": ["2", "3"]}


def test_a_run_on_the_cpu_waits_for_no_gpu(machine: Machine) -> None:
    """The two have places, and queues, of their own."""
    gpu = slots_for(gpus("0"), None)
    machine.add(turn("a"), gpu)
    wait_until(lambda: "a" in machine.at)
    machine.add(turn("b", minutes=1), gpu)
    wait_until(lambda: machine.positions["b"] == [1])
    machine.add(turn("c", minutes=2))
    wait_until(lambda: "c" in machine.at)


@pytest.mark.parametrize(
    ("devices", "most", "expected"),
    [
        ((), None, [None]),
        ((), 2, [None, None]),
        (("0", "1"), None, ["0", "1"]),
        (("0", "1"), 1, ["0"]),
        (("0", "1"), 3, ["0", "1", "0"]),
    ],
)
def test_places_are_shared_out_among_the_gpus(
    devices: tuple[str, ...], most: int | None, expected: list[str | None]
) -> None:
    """One a GPU unless told otherwise; more than there are GPUs share them."""
    places = slots_for(gpus(*devices), most)
    assert [place.device and place.device.name for place in places] == expected
    assert len({place.lock for place in places}) == len(places)


def test_without_a_directory_nobody_waits() -> None:
    """There is no limit, and no place."""
    told: list[int] = []
    with ExitStack() as stack:
        for name in ("a", "b"):
            holding = hold_slots(
                None, turn(name), ONE, on_wait=told.append, should_stop=lambda: False
            )
            assert stack.enter_context(holding) == ()
    assert told == []


def test_a_name_that_is_no_file_name_waits_too(machine: Machine) -> None:
    """A run may be called anything by who writes its spec."""
    machine.directory.mkdir()
    with hold_lock(machine.directory / f"cpu-{host_key()}.0.lock"):
        machine.add(turn("../a/b~c"))
        wait_until(lambda: machine.positions["../a/b~c"] == [1])
    wait_until(lambda: machine.at)
