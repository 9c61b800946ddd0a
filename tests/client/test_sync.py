"""The synchronous client: the same shape, the same behaviour."""

import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training_backends import (
    AsyncTrainingClient,
    RunNotFound,
    TrainingClient,
    TrainingConfig,
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

    def read() -> None:
        for _ in client.logs(run.id, follow=True):
            seen.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert seen.wait(10)
    client.close()
    reader.join(10)
    assert not reader.is_alive()
