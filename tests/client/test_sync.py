"""The synchronous client: the same shape, the same behaviour."""

import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Program
from tests.waiting import wait_until
from training_backends import (
    AsyncTrainingClient,
    RunNotFound,
    TrainingBackendError,
    TrainingClient,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.testing.backend import ScriptedBackend

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def client(tmp_path: Path, backend: ScriptedBackend) -> Iterator[TrainingClient]:
    with TrainingClient(home=tmp_path / "home", backends={"scripted": backend}) as client:
        yield client


def _shape(kind: type, rename: dict[str, str]) -> dict[str, tuple[tuple[str, object, object], ...]]:
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {
        rename.get(name, name): tuple(
            (p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()
        )
        for name, method in methods
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_methods() -> None:
    """Names, arguments and defaults agree, so that code moves between them."""
    expected = _shape(AsyncTrainingClient, {"aclose": "close"})
    del expected["watcher"]  # an object that is asynchronous itself; `watch` is there
    del expected["exclusive"]  # for servers, which are asynchronous
    assert _shape(TrainingClient, {}) == expected


def test_a_run_is_launched_waited_for_and_listed(
    client: TrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The usual life of a run needs no event loop of the caller's."""
    run = client.launch(make_config(), backend="scripted")
    backend.finish(str(run.remote_id))
    (over,) = client.wait(run.id, timeout=10)
    assert over.status is TrainingStatus.COMPLETED
    assert [listed.id for listed in client.list()] == [run.id]


def test_logs_are_an_ordinary_iterator(
    client: TrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """More records than the buffer holds arrive in order."""
    run = client.launch(make_config(), backend="scripted")
    for number in range(1000):
        backend.log(str(run.remote_id), str(number))
    logged = [record.message for record in client.logs(run.id) if record.source == "event"]
    assert logged == [str(n) for n in range(1000)]


def test_logs_may_be_left_early(
    client: TrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Leaving a followed log does not hang the client."""
    run = client.launch(make_config(), backend="scripted")
    for number in range(1000):
        backend.log(str(run.remote_id), str(number))
    records = client.logs(run.id, follow=True)
    first = next(records)
    records.close()  # type: ignore[attr-defined]
    assert (first.message, client.get(run.id).id) == ("running", run.id)


def test_errors_of_a_log_reach_the_caller(client: TrainingClient) -> None:
    """An error inside the other thread is raised here."""
    with pytest.raises(RunNotFound):
        next(client.logs("none"))


def test_an_interrupt_ends_the_call_and_the_client_closes(
    tmp_path: Path, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Ctrl-C during a wait without a limit does not leave a program that cannot end."""
    main = threading.main_thread().ident
    assert main is not None
    with TrainingClient(home=tmp_path / "home", backends={"scripted": backend}) as client:
        run = client.launch(make_config(), backend="scripted")
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.wait(run.id)


def test_closing_ends_a_log_that_another_thread_follows(
    tmp_path: Path, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A reader does not wait for ever for records that nobody will bring."""
    client = TrainingClient(home=tmp_path / "home", backends={"scripted": backend})
    run = client.launch(make_config(), backend="scripted")
    backend.log(str(run.remote_id), "one")
    seen = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in client.logs(run.id, follow=True):
                seen.set()
        except TrainingBackendError as error:
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert seen.wait(10)
    client.close()
    reader.join(10)
    assert [str(error) for error in errors] == ["This TrainingClient is closed."]


def test_closing_ends_a_call_of_another_thread_with_an_error(
    tmp_path: Path, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """A wait that will never return raises an error of this package."""
    client = TrainingClient(home=tmp_path / "home", backends={"scripted": backend})
    run = client.launch(make_config(), backend="scripted")
    asked, errors = len(backend.looks), []

    def wait() -> None:
        try:
            client.wait(run.id)
        except TrainingBackendError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    wait_until(lambda: len(backend.looks), lambda looks: looks > asked)
    client.close()
    waiter.join(10)
    assert errors == ["This TrainingClient is closed."]


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.list(),
        lambda client: client.backend("scripted"),
        lambda client: client.launch({}, backend="scripted"),
        lambda client: next(client.logs("mine")),
        lambda client: client.watch(),
    ],
)
def test_every_call_after_close_raises(tmp_path: Path, call: Callable[[Any], object]) -> None:
    """It says that the client is closed; closing again is harmless."""
    client = TrainingClient(home=tmp_path / "home")
    client.close()
    client.close()
    with pytest.raises(TrainingBackendError, match="is closed") as caught:
        call(client)
    assert caught.value.hint


def test_a_client_left_open_is_closed_when_collected(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """Neither its thread nor its backends outlive it."""
    before = set(threading.enumerate())
    made = TrainingClient(home=tmp_path / "home")
    made.list()
    del made
    gc.collect()
    wait_until(lambda: set(threading.enumerate()) - before, lambda threads: not threads)


SCRIPT = """
import os, sys, threading
from contextlib import suppress
from training_backends import TrainingBackendError, TrainingClient
from training_backends.testing.backend import ScriptedBackend

backend = ScriptedBackend()
client = TrainingClient(backends={"scripted": backend})
config = {"model": "m", "data": {"train": "train.jsonl"}}
"""


CALL_UNDER_WAY = """
def wait():
    with suppress(TrainingBackendError):
        client.wait(run.id)

run = client.launch(config, backend="scripted")
looks = len(backend.looks)
threading.Thread(target=wait, daemon=True).start()
while len(backend.looks) == looks:
    pass
sys.exit(4)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("client.list()", 0),
        ("client.list(); 1 / 0", 1),
        ("client.list(); sys.exit(3)", 3),
        ("class Task: client = client\nTask.itself = Task; Task.client.list()", 0),
        ("logs = client.logs(client.launch(config, backend='scripted').id); next(logs, None)", 0),
        (CALL_UNDER_WAY, 4),
    ],
    ids=["unused", "used", "exception", "exit", "in a class", "in a log", "call under way"],
)
def test_an_open_client_lets_the_interpreter_end(
    train_file: Path, program: Program, end: str, code: int
) -> None:
    """A script or a task that does not come to `close` ends with its own exit code."""
    python = sys.executable if end == CALL_UNDER_WAY else program.python
    done = _python(train_file.parent, SCRIPT + end, python)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_client_inherited_over_fork_raises(train_file: Path, program: Program) -> None:
    """The child is told to make its own, which works; the parent's is not harmed."""
    script = (
        SCRIPT
        + """
client.list()
pid = os.fork()
if pid == 0:
    try:
        client.list()
    except TrainingBackendError as error:
        print(error, error.hint, flush=True)
    client.close()
    with TrainingClient() as own:
        print(own.list(), flush=True)
    sys.exit(7)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status), client.list())
"""
    )
    done = _python(train_file.parent, script, program.python)
    lines = done.stdout.splitlines()
    assert "forked after it was created" in lines[0]
    assert "Create a new TrainingClient" in lines[0]
    assert lines[1:] == ["[]", "7 []"]


def _python(directory: Path, script: str, python: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [python, "-c", script],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "TRAINING_BACKENDS_HOME": str(directory / "home")},
        timeout=100,
        check=False,
    )


def test_a_callback_that_calls_its_client_gets_an_error(
    client: TrainingClient, make_config: MakeConfig
) -> None:
    """It would wait for itself."""

    def look(run: TrainingRun) -> None:
        client.get(run.id)

    with pytest.raises(TrainingBackendError, match="callback"):
        client.launch(make_config(), backend="scripted", on_update=look)
