"""A store behind a pooler that gives each transaction another session of the server."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.client.conftest import NewUrl
from tests.postgres import PgBouncer
from tests.store.conftest import MakeRun, start_worker, told
from tests.store.test_model import Holders, Timelines
from tests.store.worker import EACH, LOOKS
from training_backends import TrainingRun
from training_backends.store import RunStore

HOUR = timedelta(hours=1)


@pytest.fixture
def new_url(pgbouncer: PgBouncer) -> NewUrl:
    return pgbouncer.new_url


def one_more(run: TrainingRun) -> TrainingRun:
    return run.model_copy(update={"step": (run.step or 0) + 1})


def test_equal_statements_of_many_threads_and_stores_all_work(
    store: RunStore, url: str, make_run: MakeRun
) -> None:
    """The driver prepares what it is asked five times, in a session that is another's next."""
    other = RunStore(url)
    store.insert(make_run("a"))
    stores = [store, other] * 30

    def work(each: RunStore) -> None:
        each.list()
        each.update("a", one_more)
        each.note("a", one_more, [told("m", 1, "metrics", loss=1.0)])
        lease = each.take("work", "me", HOUR, is_gone=lambda _: None)
        if lease is not None:
            each.release(lease)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, stores))
    assert other.get("a").step == 2 * len(stores)
    assert len(store.records("a")) == len(stores)
    other.close()


def test_processes_take_turns(store: RunStore, url: str, make_run: MakeRun) -> None:
    """Two clients at once, as two commands of one user are: nothing fails, nothing is lost."""
    store.insert(make_run("r"))
    workers = [start_worker("look", url) for _ in range(2)]
    for worker in workers:
        worker.release()
    said = [worker.result() for worker in workers]
    for worker in workers:
        worker.end()
    assert sum(map(int, said)) == LOOKS
    assert len(store.records("r")) == LOOKS * EACH


def test_nothing_is_left_in_a_session(store: RunStore, url: str, make_run: MakeRun) -> None:
    """Whoever gets it next finds no lock, no prepared statement and no setting of ours."""
    store.insert(make_run("a"))
    for _ in range(10):
        store.update("a", one_more)
    engine = sa.create_engine(url, connect_args={"prepare_threshold": None})
    with engine.connect() as connection:
        ask = connection.exec_driver_sql
        found = (
            ask("SELECT count(*) FROM pg_prepared_statements").scalar(),
            ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar(),
            ask("SHOW lock_timeout").scalar(),
            ask("SHOW transaction_read_only").scalar(),
            ask("SHOW transaction_isolation").scalar(),
        )
    engine.dispose()
    assert found == (0, 0, "0", "off", "read committed")


def test_a_store_behind_a_pooler_does_what_the_models_say(new_url: NewUrl) -> None:
    """The same walks as on SQLite and on the server itself."""
    often = settings(max_examples=settings().max_examples // 4)
    run_state_machine_as_test(partial(Timelines, new_url), settings=often)  # type: ignore[arg-type]
    run_state_machine_as_test(partial(Holders, new_url), settings=often)  # type: ignore[arg-type]
