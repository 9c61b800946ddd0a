"""Damaged stores: named, set aside, and read as far as they can be."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.conftest import MakeRun, sqlite_url, start_worker
from training_backends import StoreError, TrainingRun
from training_backends.store import JournalEntry, RunStore
from training_backends.store.salvage import check, salvage, set_aside

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COUNT = 60
PAGE = 4096


def noise(size: int) -> bytes:
    """Return bytes that mean nothing, always the same."""
    return Random(size).randbytes(size)


def truncate(path: Path) -> None:
    """Cut off the end from the middle of the runs, at the border of a page."""
    os.truncate(path, path.read_bytes().index(b'{"id":"run-030"') // PAGE * PAGE)


def overwrite_header(path: Path) -> None:
    """Write over what says that it is a database."""
    write_at(path, 0, noise(100))


def overwrite_page(path: Path) -> None:
    """Write over a page with documents."""
    place = path.read_bytes().index(b'{"id":"run-030"')
    write_at(path, place // PAGE * PAGE, noise(PAGE))


def overwrite_all(path: Path) -> None:
    """Leave nothing."""
    path.write_bytes(b"this is not a database at all" * 1000)


def write_at(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


damages = pytest.mark.parametrize(
    "damage", [truncate, overwrite_header, overwrite_page, overwrite_all]
)
Damage = Callable[[Path], None]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Only files are recovered; a server has its own means."""
    return sqlite_url(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "runs.db"


@pytest.fixture
def runs(running: MakeRun) -> Sequence[TrainingRun]:
    return [running(f"run-{n:03}") for n in range(COUNT)]


@pytest.fixture
def filled(store: RunStore, path: Path, runs: Sequence[TrainingRun]) -> Path:
    """A store that was closed in good order, each run with a finished step."""
    for run in runs:
        store.insert(run)
        store.begin(run.id, "create")
        store.finish(run.id, "create", run.remote_id)
    store.close()
    return path


def use(store: RunStore) -> None:
    """Read everything and write something."""
    for run in store.list():
        store.entry(run.id, "create")
        store.update(run.id, lambda run: run.model_copy(update={"step": 1}))


@damages
def test_a_damaged_store_is_named_and_the_way_out_is_told(
    store: RunStore, filled: Path, damage: Damage
) -> None:
    """No stack of SQL, and no empty list as if there were no runs."""
    damage(filled)
    with pytest.raises(StoreError, match=r"runs\.db is damaged") as caught:
        use(store)
    assert "training-backends doctor --recover" in str(caught.value.hint)
    assert not caught.value.retryable


@damages
def test_a_check_finds_damage(url: str, filled: Path, damage: Damage) -> None:
    """Also where nobody has read yet."""
    assert check(url) == []
    damage(filled)
    assert check(url)


def test_a_check_makes_no_store(url: str, path: Path) -> None:
    """Looking leaves no traces."""
    assert check(url) == []
    assert not path.exists()


def test_a_check_finds_what_belongs_to_nothing(url: str, filled: Path) -> None:
    """A repair by hand may leave rows of runs that are gone."""
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("DELETE FROM runs WHERE id = 'run-001'")
    problems = check(url)
    assert any("journal has no parent row in runs" in problem for problem in problems)


def test_a_check_finds_other_versions_and_other_databases(url: str, filled: Path) -> None:
    """An older store is none of its findings: it migrates itself."""
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    assert "0999" in check(url)[0]
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("DROP TABLE alembic_version")
    assert check(url) == []
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("DROP TABLE schema_version")
    assert check(url) == ["it is the database of another program"]


def test_a_check_with_too_little_time_returns_what_it_found(url: str, filled: Path) -> None:
    """A gateway with a million runs must not read them all before it starts."""
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("DELETE FROM runs WHERE id = 'run-001'")
        connection.execute(
            "INSERT INTO uploads WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL "
            "SELECT n + 1 FROM numbers WHERE n < 20000) SELECT 'scope', n, 'id', 'now' FROM numbers"
        )
    complete = check(url)
    assert complete
    assert check(url, within=60) == complete
    assert check(url, within=0) == []


# -- set aside ---------------------------------------------------------------------------


def test_a_store_is_set_aside_with_all_its_files(
    store: RunStore, url: str, path: Path, make_run: MakeRun
) -> None:
    """What was not yet written into the database itself goes with it."""
    store.insert(make_run("a"))
    files = {part: path.with_name(path.name + part).read_bytes() for part in ("", "-wal")}
    store.close()
    for part, data in files.items():
        path.with_name(path.name + part).write_bytes(data)
    aside = set_aside(url, AT)
    assert aside == path.with_name("runs.db.damaged-20260102T030405Z")
    for part, data in files.items():
        assert aside.with_name(aside.name + part).read_bytes() == data
    assert not path.exists()
    assert store.list() == []
    store.close()
    assert [run.id for run in salvage(aside).runs] == ["a"]


def test_a_store_that_is_not_there_is_not_set_aside(url: str) -> None:
    """Neither one in memory nor one on a server has a file."""
    assert set_aside(url, AT) is None
    assert set_aside("sqlite://", AT) is None


def test_a_store_in_use_is_not_set_aside(url: str, filled: Path) -> None:
    """What another process goes on writing would be lost."""
    worker = start_worker("open", url)
    worker.release()
    assert worker.result() == "open"
    with pytest.raises(StoreError, match="in use by another process"):
        set_aside(url, AT)
    assert filled.exists()
    worker.end()
    assert set_aside(url, AT) is not None


# -- salvage -----------------------------------------------------------------------------


def known(runs: Sequence[TrainingRun]) -> dict[str, TrainingRun]:
    return {run.id: run for run in runs}


@pytest.mark.parametrize("damage", [overwrite_header, lambda _: None], ids=["header", "none"])
def test_everything_is_saved_that_is_still_there(
    filled: Path, runs: Sequence[TrainingRun], damage: Damage
) -> None:
    """Without its first bytes a database is as good as whole."""
    damage(filled)
    found = salvage(filled)
    assert known(found.runs) == known(runs)
    assert {run_id: [step.name for step in steps] for run_id, steps in found.steps.items()} == {
        run.id: ["create"] for run in runs
    }


def test_only_what_lies_in_a_damaged_page_is_lost(
    filled: Path, runs: Sequence[TrainingRun]
) -> None:
    """It is read from both ends, so damage in between hides nothing behind it."""
    overwrite_page(filled)
    found = known(salvage(filled).runs)
    assert found.items() <= known(runs).items()
    assert len(found) >= COUNT - 8  # of runs that fit into a page
    assert {runs[0].id, runs[-1].id} <= set(found)


def test_a_torn_store_gives_what_is_left_of_it(filled: Path, runs: Sequence[TrainingRun]) -> None:
    """The beginning of a file is worth something without its end."""
    truncate(filled)
    found = known(salvage(filled).runs)
    assert found
    assert found.items() <= known(runs).items()


def test_nothing_is_saved_of_nothing(filled: Path, tmp_path: Path) -> None:
    """That is no error; a file that is not there is one."""
    overwrite_all(filled)
    assert salvage(filled).runs == []
    with pytest.raises(StoreError):
        salvage(tmp_path / "no such file")


def test_reading_leaves_the_file_as_it_is(filled: Path) -> None:
    """Somebody may want to try better means on it."""
    overwrite_header(filled)
    before = filled.read_bytes()
    salvage(filled)
    assert filled.read_bytes() == before
    assert [path.name for path in filled.parent.iterdir()] == [filled.name]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_the_damage_what_is_saved_is_true(
    filled: Path, runs: Sequence[TrainingRun], data: st.DataObject
) -> None:
    """Bytes may be anything anywhere; no run comes out that never was."""
    whole = filled.with_name("whole.db")
    if not whole.exists():
        shutil.copyfile(filled, whole)
    shutil.copyfile(whole, filled)
    size = whole.stat().st_size
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, size - 1))
        write_at(filled, place, noise(data.draw(st.integers(1, 3 * PAGE))))
    if data.draw(st.booleans()):
        os.truncate(filled, data.draw(st.integers(0, size)))
    found = salvage(filled)
    assert {run.id for run in found.runs} <= {run.id for run in runs}


# -- a run that was saved ----------------------------------------------------------------


def test_a_saved_journal_is_never_taken_for_complete(
    url: str, filled: Path, store: RunStore, runs: Sequence[TrainingRun]
) -> None:
    """A step that it does not tell of may have been begun, so it is looked for first."""
    found = salvage(filled)
    set_aside(url, AT)
    run = known(found.runs)["run-001"]
    store.restore(run, found.steps[run.id])
    assert store.get(run.id) == runs[1]
    assert store.entry(run.id, "create") == JournalEntry(finished=True, result="job-run-001")
    assert store.entry(run.id, "launched") == JournalEntry(
        finished=False, result=None, supposed=True
    )


def test_a_step_that_was_only_supposed_can_be_finished(store: RunStore, make_run: MakeRun) -> None:
    """Once it was done, or found, it is known for good; the others stay open."""
    store.restore(make_run("a"))
    store.finish("a", "create", "job-a")
    assert store.entry("a", "create") == JournalEntry(finished=True, result="job-a")
    store.forget("a", "start")
    start = store.entry("a", "start")
    assert start is not None
    assert start.supposed


def test_a_run_saved_twice_keeps_its_mark(
    url: str, store: RunStore, path: Path, make_run: MakeRun
) -> None:
    """The second damage does not make the first one good."""
    store.restore(make_run("a"))
    store.close()
    found = salvage(path)
    set_aside(url, AT)
    store.restore(found.runs[0], found.steps["a"])
    entry = store.entry("a", "create")
    assert entry is not None
    assert entry.supposed
