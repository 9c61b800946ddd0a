"""A store on a server that restarts, is out of reach or refuses; no secret is told."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from tests.postgres import Postgres
from tests.store.conftest import MakeRun, execute, start_worker
from tests.store.worker import LOOKS
from training_backends import ConfigError, StoreError, TrainingRun
from training_backends.core.redaction import redact
from training_backends.store import RunStore, database
from training_backends.store import database as ours

SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'training-backends'"


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_url()


def one_more(run: TrainingRun) -> TrainingRun:
    return run.model_copy(update={"step": (run.step or 0) + 1})


def test_a_server_that_restarted_between_two_calls_is_not_noticed(
    postgres: Postgres, store: RunStore, make_run: MakeRun
) -> None:
    """Every connection of the pool is dead by then."""
    store.insert(make_run("a"))
    postgres.stop()
    postgres.start()
    assert store.update("a", one_more).step == 1
    postgres.stop()
    postgres.start()
    assert store.get("a").step == 1


def test_a_server_that_starts_again_is_waited_for(
    postgres: Postgres, store: RunStore, make_run: MakeRun
) -> None:
    """Whatever watches runs for days outlives the server's next update."""
    store.insert(make_run("a"))
    postgres.stop()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store.update, "a", one_more)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        postgres.start()
        assert waiting.result().step == 1


def test_a_server_that_stays_away_is_named(
    postgres: Postgres, store: RunStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait has an end, and who comes new does not wait at all."""
    store.list()
    monkeypatch.setattr(database, "RESTART_PATIENCE", 0.5)
    postgres.stop()
    try:
        for either in (store, RunStore(url)):
            with pytest.raises(StoreError, match=str(postgres.directory)) as caught:
                either.list()
            assert caught.value.retryable
            assert "TRAINING_BACKENDS_STORE_URL" in str(caught.value.hint)
    finally:
        postgres.start()


def test_a_connection_that_breaks_in_the_middle_leaves_nothing_half_done(
    postgres: Postgres, store: RunStore, make_run: MakeRun
) -> None:
    """The error says that it may be tried again, and then it works."""
    store.insert(make_run("a"))

    def break_it(run: TrainingRun) -> TrainingRun:
        postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'training-backends'"
        )
        return one_more(run)

    with pytest.raises(StoreError) as caught:
        store.update("a", break_it)
    assert caught.value.retryable
    assert store.get("a").step is None
    assert store.update("a", one_more).step == 1


def test_who_falls_silent_while_it_writes_loses_its_turn(
    store: RunStore, url: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost its power says no goodbye; the others do not wait for it for ever."""
    monkeypatch.setattr(ours, "BEGIN", ours.BEGIN.replace("'15s'", "'300ms'"))
    store.insert(make_run("a"))
    silent, others = threading.Event(), threading.Event()

    def fall_silent(run: TrainingRun) -> TrainingRun:
        silent.set()
        others.wait(30)
        return run.model_copy(update={"step": 100})

    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(store.update, "a", fall_silent)
        assert silent.wait(30)
        other = RunStore(url)
        assert other.update("a", one_more).step == 1
        other.close()
        others.set()
        with pytest.raises(StoreError) as caught:
            lost.result()
    assert caught.value.retryable
    assert store.get("a").step == 1


@pytest.mark.parametrize("bound", ["lock_timeout", "statement_timeout"])
def test_a_turn_that_does_not_come_is_an_error_to_try_again_after(
    store: RunStore, url: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Our own patience has an end, and the administrator's may be shorter."""
    store.insert(make_run("a"))
    if bound == "lock_timeout":
        monkeypatch.setattr(ours, "BEGIN", ours.BEGIN.replace("'30s'", "'200ms'"))
        other = RunStore(url)
    else:
        other = RunStore(url + "%20-cstatement_timeout%3D200ms")
    other.list()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ours.WRITE_LOCK})")
        with pytest.raises(StoreError, match="timeout") as caught:
            other.update("a", one_more)
    assert caught.value.retryable
    assert other.update("a", one_more).step == 1
    engine.dispose()
    other.close()


def test_processes_and_threads_that_write_at_once_fail_for_nobody_s_sake(
    store: RunStore, url: str, make_run: MakeRun
) -> None:
    """No serialization failure, no deadlock, nothing lost, and a bounded number of connections."""
    store.insert(make_run("r"))
    store.insert(make_run("a"))
    workers = [start_worker("look", url) for _ in range(2)]
    for worker in workers:
        worker.release()
    with ThreadPoolExecutor(20) as threads:
        list(threads.map(lambda _: store.update("a", one_more), range(40)))
        assert {len(runs) for runs in threads.map(lambda _: store.list(), range(40))} == {2}
    assert sum(int(worker.result()) for worker in workers) == LOOKS
    for worker in workers:
        worker.end()
    assert store.get("a").step == 40
    assert execute(url, SESSIONS)[0][0] <= 5


def test_a_reader_sees_one_state_and_cannot_write(store: RunStore, make_run: MakeRun) -> None:
    """What another one writes between two of its queries is not half seen."""
    store.insert(make_run("a"))
    count = sa.text("SELECT count(*) FROM runs")
    with store._reading() as connection:
        assert connection.execute(count).scalar() == 1
        store.insert(make_run("b"))
        assert connection.execute(count).scalar() == 1
    with pytest.raises(StoreError, match="read-only"), store._reading() as connection:
        connection.execute(sa.text("DELETE FROM runs"))


def test_what_is_written_lasts_whatever_the_server_does_by_default(url: str) -> None:
    """A server may be set to answer before it has written."""
    store = RunStore(url + "%20-csynchronous_commit%3Doff")
    with store._writing() as connection:
        assert connection.execute(sa.text("SHOW synchronous_commit")).scalar() == "on"
    store.close()


def _in_the_child(store: RunStore, answers: Any) -> None:
    answers.put(store.update("a", one_more).step)


def test_a_forked_process_has_connections_of_its_own(store: RunStore, make_run: MakeRun) -> None:
    """Two that talk on one connection would read each other's answers; a lock may be held."""
    store.insert(make_run("a"))
    context = multiprocessing.get_context("fork")
    answers: Any = context.SimpleQueue()
    with store._turn:
        child = context.Process(target=_in_the_child, args=(store, answers))
        child.start()
    assert answers.get() == 1
    child.join()
    assert store.update("a", one_more).step == 2


def test_a_stopped_process_that_does_not_write_holds_up_nobody(
    store: RunStore, url: str, make_run: MakeRun
) -> None:
    """Between two transactions nothing is held."""
    worker = start_worker("open", url)
    worker.release()
    assert worker.result() == "open"
    assert worker.process.pid
    os.kill(worker.process.pid, signal.SIGSTOP)
    store.insert(make_run("a"))
    os.kill(worker.process.pid, signal.SIGCONT)
    worker.end()


# -- what is told ------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    """Neither in the message, nor in the text of what it came from, nor in a log line."""
    for place in (
        "postgresql://me:hunter22@127.0.0.1:1/runs",
        "postgresql://me@127.0.0.1:1/runs?password=hunter22&sslpassword=hunter33",
        "postgres://me:hunter22@127.0.0.1:1/runs",
    ):
        with pytest.raises(StoreError, match=r"postgresql://me@127\.0\.0\.1:1/runs") as caught:
            RunStore(place).list()
        error: BaseException | None = caught.value
        assert "Connection refused" in str(error)
        while error is not None:
            assert "hunter" not in f"{error!r} {error}"
            error = error.__cause__ or error.__context__
        assert "hunter22" not in redact("hunter22")


def test_a_wrong_password_is_told_of_and_not_repeated(postgres: Postgres) -> None:
    """Who is let in is the administrator's matter."""
    url = sa.make_url(postgres.url()).set(username="guest", password="battery staple")
    with pytest.raises(StoreError, match='password authentication failed for user "guest"') as told:
        RunStore(url.render_as_string(hide_password=False)).list()
    assert "staple" not in str(told.value)


def test_who_may_make_no_tables_is_told_so(url: str) -> None:
    """The message is the server's own."""
    other = sa.make_url(url).set(username="reader")
    with pytest.raises(StoreError, match="cannot be used") as caught:
        RunStore(other.render_as_string()).list()
    assert not caught.value.retryable
    assert "permission to create" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("EXECUTE nothing", "pooler"),
        ("SELECT 1/0", "rejected a statement"),
        ("DO $$ BEGIN RAISE SQLSTATE '53100'; END $$", "disk space"),
        ("DO $$ BEGIN RAISE SQLSTATE '57P03'; END $$", "TRAINING_BACKENDS_STORE_URL"),
    ],
    ids=["session", "statement", "resources", "starting"],
)
def test_the_hint_fits_what_the_server_said(store: RunStore, statement: str, hint: str) -> None:
    """A server that answers is not looked for."""
    with pytest.raises(StoreError) as caught, store._writing() as connection:
        connection.exec_driver_sql(statement)
    assert hint in str(caught.value.hint)


def test_the_way_to_get_a_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words that can be typed."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match="driver") as caught:
        RunStore("postgresql://me:hunter22@host/runs")
    assert "pip install 'training-backends[postgres]'" in str(caught.value.hint)
    assert "hunter22" not in str(caught.value)


def test_the_url_need_not_name_the_driver(store: RunStore, url: str, make_run: MakeRun) -> None:
    """`postgresql://` means psycopg, whichever release of SQLAlchemy reads it."""
    store.insert(make_run("a"))
    other = RunStore(url.replace("postgresql+psycopg:", "postgresql:"))
    assert [run.id for run in other.list()] == ["a"]
    other.close()
