"""Work is spread over processes that nobody but the caller can notice."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import pytest

from tests.waiting import wait_until
from training_backends.core.errors import TrainingBackendError
from training_backends.datasets.worker_pool import cpu_count, run_parallel

TASKS = """
import os, signal, sys, time

def pid(argument):
    return os.getpid()

def square(number):
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number * number

def refuse(number):
    if number == 5:
        raise LookupError("five", number)
    return number

def wait(seconds):
    time.sleep(seconds)
    return os.getpid()

def die(parent):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

def talk(parent):
    if os.getpid() == parent:
        return None
    print("printed by a worker")
    return sys.stdin.read()

def secret(name):
    return os.getpid(), os.environ.get(name)

def not_portable(parent):
    return None if os.getpid() == parent else lambda: None
"""


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write tasks to a module that is found on `sys.path` alone."""
    (tmp_path / "some_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("some_tasks", None)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # An orphan may wait for a first process that never asks how it ended.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_results_come_in_the_order_of_the_arguments(processes: int) -> None:
    """However long each takes, and in whichever process."""
    found = list(run_parallel("some_tasks:square", range(50), processes=processes))
    assert found == [number * number for number in range(50)]


def test_several_processes_share_the_work() -> None:
    """The caller's is one of them, and as many are used as were asked for."""
    pids = set(run_parallel("some_tasks:pid", range(200), processes=3))
    assert os.getpid() in pids
    assert len(pids) == 3


def test_one_process_is_the_caller_s_own() -> None:
    """Nothing is started for it."""
    assert set(run_parallel("some_tasks:pid", range(5), processes=1)) == {os.getpid()}


def test_nothing_to_do_gives_nothing() -> None:
    """No argument, no result."""
    assert list(run_parallel("some_tasks:pid", [], processes=2)) == []


def test_arguments_are_not_taken_far_ahead() -> None:
    """An endless supply of them fills no memory."""
    taken = count()
    with closing(run_parallel("some_tasks:square", taken, processes=2)) as results:
        assert list(islice(results, 20)) == [number * number for number in range(20)]
    assert next(taken) < 20 + 10


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_stands_where_its_result_would(processes: int) -> None:
    """It comes back as itself, behind the results before it."""
    seen: list[int] = []
    with pytest.raises(LookupError) as caught:
        seen.extend(run_parallel("some_tasks:refuse", range(50), processes=processes))
    assert caught.value.args == ("five", 5)
    results = run_parallel("some_tasks:refuse", range(50), processes=processes)
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]


def test_workers_end_when_nobody_wants_more() -> None:
    """Whoever stops in the middle leaves no process behind."""
    results = run_parallel("some_tasks:pid", count(), processes=3)
    pids: set[int] = set()
    while len(pids) < 3:
        pids.add(next(results))
    del results
    assert all(is_gone(pid) for pid in pids - {os.getpid()})


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    """As it is when memory runs out."""
    with pytest.raises(TrainingBackendError, match="signal 9") as caught:
        list(run_parallel("some_tasks:die", [os.getpid()] * 20, processes=2))
    assert caught.value.hint


def test_a_result_that_cannot_travel_is_an_error() -> None:
    """The worker lives on and says so."""
    with pytest.raises(TypeError, match="cannot pickle"):
        list(run_parallel("some_tasks:not_portable", [os.getpid()] * 20, processes=2))


def test_secrets_stay_with_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker has a key in its environment."""
    monkeypatch.setenv("SOME_API_KEY", "abc")
    found = dict(run_parallel("some_tasks:secret", ["SOME_API_KEY"] * 100, processes=2))
    assert found.pop(os.getpid()) == "abc"
    assert list(found.values()) == [None]


def run(script: str, directory: Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    path = directory / "script.py"
    path.write_text(script)
    return subprocess.run(
        [sys.executable, path], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_caller_s_program_is_not_run_again(tasks: Path) -> None:
    """Neither needs it a guard, nor do workers touch its input and output."""
    script = (
        "import os, sys\n"
        "from training_backends.datasets.worker_pool import run_parallel\n"
        "print('main')\n"
        "print(set(run_parallel('some_tasks:talk', [os.getpid()] * 20, processes=2)) == {None, ''})"
        "\nprint(sys.stdin.read())\n"
    )
    ended = run(script, tasks, stdin="for the caller")
    assert ended.stdout.splitlines() == ["main", "True", "for the caller"]
    assert ended.stderr == ""


def test_a_daemonic_process_may_call(tasks: Path) -> None:
    """The workers of other pools are such."""
    script = (
        "import multiprocessing as mp\n"
        "from training_backends.datasets.worker_pool import run_parallel\n"
        "def work():\n"
        "    print(len(set(run_parallel('some_tasks:pid', range(100), processes=2))), flush=True)\n"
        "process = mp.get_context('fork').Process(target=work, daemon=True)\n"
        "process.start()\n"
        "process.join()\n"
    )
    assert run(script, tasks).stdout == "2\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_caller(tasks: Path, how: signal.Signals) -> None:
    """However it dies, in the middle of their work too."""
    (tasks / "script.py").write_text(
        "import os\n"
        "from itertools import chain, repeat\n"
        "from training_backends.datasets.worker_pool import run_parallel\n"
        "arguments = chain(repeat(0.01, 200), repeat(60))\n"
        "seen = set()\n"
        "for pid in run_parallel('some_tasks:wait', arguments, processes=2):\n"
        "    if pid != os.getpid() and pid not in seen:\n"
        "        seen.add(pid)\n"
        "        print(pid, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, tasks / "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as caller:
        assert caller.stdout is not None
        assert caller.stderr is not None
        worker = int(caller.stdout.readline())
        assert not is_gone(worker)
        os.killpg(caller.pid, how)
        wait_until(lambda: is_gone(worker))
        # Only the caller hears a Ctrl-C and says so.
        assert caller.stderr.read().count("Traceback") == (how is signal.SIGINT)


def test_processors_are_counted_as_they_may_be_used() -> None:
    """At least one, and no more than the affinity allows."""
    assert 1 <= cpu_count() <= len(os.sched_getaffinity(0))
