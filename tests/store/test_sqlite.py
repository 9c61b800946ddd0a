"""Databases are opened by several at once."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.store.conftest import MakeRun, sqlite_url
from training_backends.store import RunStore
from training_backends.store.database import sqlite_engine


def test_who_opens_a_database_waits_for_who_changes_it(tmp_path: Path) -> None:
    """SQLite itself refuses at once to turn a database to WAL while another one writes."""
    path = tmp_path / "a.db"
    engine = sqlite_engine(f"sqlite:///{path}")
    with sqlite3.connect(path, isolation_level=None) as other, ThreadPoolExecutor(1) as pool:
        other.execute("CREATE TABLE t (a)")
        other.execute("BEGIN IMMEDIATE")
        opened = pool.submit(engine.connect)
        with pytest.raises(TimeoutError):
            opened.result(timeout=0.5)
        other.execute("COMMIT")
        with opened.result(timeout=30) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    engine.dispose()
    assert mode == "wal"


def test_two_stores_of_one_process_keep_their_locks(tmp_path: Path, make_run: MakeRun) -> None:
    """Otherwise the next process to close the database deletes the log that they still use."""
    url = sqlite_url(tmp_path)
    writes = (
        "import sys\n"
        "from training_backends.store import RunStore\n"
        "store = RunStore(sys.argv[1])\n"
        "store.update('a', lambda run: run.model_copy(update={'step': 7}))\n"
        "store.close()\n"
    )
    with closing(RunStore(url)) as first, closing(RunStore(url)) as second:
        first.insert(make_run("a"))
        assert second.get("a").step is None
        subprocess.run([sys.executable, "-c", writes, url], check=True, timeout=60)
        assert first.get("a").step == 7
        first.insert(make_run("b"))
        with closing(RunStore(url)) as third:
            assert {run.id for run in third.list()} == {"a", "b"}
