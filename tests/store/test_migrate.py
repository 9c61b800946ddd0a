"""Stores of other versions: older ones become new ones, newer ones are left alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from tests.client.conftest import NewUrl
from tests.store.conftest import (
    MakeRun,
    WriteVersion1,
    at_once,
    execute,
    told,
)
from training_backends import StoreError, TrainingStatus
from training_backends.core.run import RunState, utc_now
from training_backends.store import JournalEntry, RunStore, gateway_schema, schema

_NEW_INDEXES = ("records_of_status", "runs_by_time", "runs_live")
"""Of the tables of revision 0003."""


def test_an_old_store_keeps_its_runs_and_journals(
    store: RunStore,
    url: str,
    running: MakeRun,
    make_run: MakeRun,
    write_version_1: WriteVersion1,
) -> None:
    """Runs that were launched long ago are watched on, and never launched again."""
    state = RunState(status=TrainingStatus.RUNNING, step=5)
    runs = [running("a").updated(state, seen_at=utc_now()), make_run("b")]
    write_version_1(url, *runs)
    assert {run.id: run for run in store.list()} == {run.id: run for run in runs}
    assert store.entry("a", "create") == JournalEntry(finished=True, result="job-a")
    live = store.live()
    assert list(live.changed) == runs[:1]
    assert live.seen_at == {"a": runs[0].last_seen_at}
    assert store.claimed("b", ["job-a"]) == {"job-a"}


def test_a_migrated_store_can_do_all_that_a_new_one_can(
    store: RunStore, url: str, running: MakeRun, write_version_1: WriteVersion1
) -> None:
    """Deleting a run still deletes what belongs to it."""
    write_version_1(url, running("a"))
    store.begin("a", "start")
    store.delete("a")
    store.insert(running("a"))
    assert store.entry("a", "create") is None
    assert store.entry("a", "start") is None


def test_a_run_that_cannot_be_read_keeps_no_others_from_moving(
    store: RunStore, running: MakeRun, url: str, write_version_1: WriteVersion1
) -> None:
    """Reading it fails, as it did before."""
    write_version_1(url, running("a"), running("b"))
    execute(url, "UPDATE runs SET document = 'no JSON' WHERE id = 'b'")
    assert store.get("a").id == "a"
    with pytest.raises(StoreError, match="'b'"):
        store.get("b")


def test_losses_that_checkpoints_had_overwritten_are_put_back(
    store: RunStore, url: str, running: MakeRun
) -> None:
    """A store of revision 0002 kept whatever was told last of a step."""
    store.insert(running("r"))
    step = told("m", 1, "metrics", train_loss=2.0, grad_norm=1, note="x", ok=True)
    point = told("c", 1, "checkpoint", train_loss=4.0, valid_loss=3.0)
    later = told("m", 2, "metrics", train_loss=5.0).model_copy(update={"step": 11})
    found = [*(record.model_copy(update={"step": 10}) for record in (step, point)), later]
    store.observed("r", lambda run: run, found, after=None, cursor="1")
    sound = store.metrics("r")
    store.close()
    execute(
        url,
        "UPDATE metrics SET value = 4.0 WHERE step = 10 AND name = 'train_loss'",
        *(f"DROP INDEX {index}" for index in _NEW_INDEXES),
        *(f"DROP TABLE {table}" for table in gateway_schema.GATEWAY_TABLES),
        "DROP TABLE gateway_job_counts",
        "DROP TABLE destinations",
        "UPDATE alembic_version SET version_num = '0002'",
    )
    assert store.metrics("r") == sound
    assert execute(url, "SELECT version_num FROM alembic_version") == [(schema.REVISION,)]


@pytest.mark.parametrize("before", ["nothing", "an older store", "another program's table"])
def test_every_store_has_the_tables_of_the_schema(
    store: RunStore, url: str, running: MakeRun, write_version_1: WriteVersion1, before: str
) -> None:
    """A created store and a migrated one are equal, also beside tables of other programs."""
    if before == "an older store":
        write_version_1(url, running("a"))
    if before == "another program's table":
        execute(url, "CREATE TABLE theirs (id INTEGER)")
    store.list()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        differences = compare_metadata(context, schema.metadata)
        revision = connection.execute(sa.select(schema.revision.c.version_num)).scalars().all()
        (foreign,) = sa.inspect(connection).get_foreign_keys("journal")
    engine.dispose()
    theirs = [("remove_table", "theirs")] if before == "another program's table" else []
    assert [(what, table.name) for what, table in differences] == theirs
    assert revision == [schema.REVISION]
    assert (foreign["referred_table"], foreign["constrained_columns"]) == ("runs", ["run_id"])
    assert foreign["options"] == {"ondelete": "CASCADE"}


def test_a_recovery_knows_every_table_of_the_gateway() -> None:
    """Otherwise it would lose their rows; it counts the jobs again."""
    tables = {name for name in schema.metadata.tables if name.startswith("gateway_")}
    assert tables - {gateway_schema.job_counts.name} == set(gateway_schema.GATEWAY_TABLES)


def test_processes_that_open_an_old_store_at_once_migrate_it_once(
    url: str, running: MakeRun, write_version_1: WriteVersion1
) -> None:
    """One does it, the others wait, and all go on."""
    write_version_1(url, *(running(f"r{n}") for n in range(50)))
    assert at_once(3, "count", url) == ["50"] * 3
    assert execute(url, "SELECT version_num FROM alembic_version") == [(schema.REVISION,)]


def test_processes_that_make_a_store_at_once_make_one(url: str) -> None:
    """The first command of two terminals may be the same."""
    assert at_once(3, "count", url) == ["0"] * 3


def test_threads_may_make_different_stores_at_once(new_url: NewUrl) -> None:
    """A program may have several clients, each with a home of its own."""

    def make(url: str) -> int:
        store = RunStore(url)
        count = len(store.list())
        store.close()
        return count

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(make, [new_url() for _ in range(8)])) == [0] * 8


@pytest.mark.parametrize(
    "newer",
    ["UPDATE alembic_version SET version_num = '0999'", "DROP TABLE alembic_version"],
    ids=["alembic's word", "the old word"],
)
def test_a_newer_store_is_refused(store: RunStore, url: str, newer: str) -> None:
    """An older program does not write into what a newer one made."""
    store.list()
    execute(url, newer, "UPDATE schema_version SET version = 999")
    with pytest.raises(StoreError, match="newer version") as caught:
        RunStore(url).list()
    assert caught.value.hint == "Upgrade training-backends."


def test_the_first_version_refuses_what_this_one_made(store: RunStore, url: str) -> None:
    """It looks into a table of its own and refuses every number above 1."""
    store.list()
    assert execute(url, "SELECT version FROM schema_version") == [(2,)]


def test_a_store_is_created_and_opened_without_alembic(url: str) -> None:
    """Its import would cost more than most commands."""
    program = (
        "import sys\n"
        "from training_backends.store import RunStore\n"
        "for _ in range(2):\n"
        "    store = RunStore(sys.argv[1])\n"
        "    store.list()\n"
        "    store.close()\n"
        "sys.exit('alembic' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, url], check=True)


def test_a_place_with_a_percent_sign_is_a_place_like_any_other(
    tmp_path: Path, make_run: MakeRun
) -> None:
    """Nothing in a path is taken for more than a name."""
    store = RunStore(f"sqlite:///{tmp_path / '100%(home)s' / 'runs.db'}")
    store.insert(make_run("a"))
    store.close()
    assert (tmp_path / "100%(home)s" / "runs.db").exists()
