"""Databases are opened by several at once."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
