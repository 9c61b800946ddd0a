"""The run store: durable, shared between processes, honest about what it cannot do."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training_backends import (
    ConfigError,
    DuplicateRun,
    RunNotFound,
    StoreError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.client.store import SCHEMA_VERSION, RunStore


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'runs.db'}"


@pytest.fixture
def store(url: str) -> Iterator[RunStore]:
    store = RunStore(url)
    yield store
    store.close()


@pytest.fixture
def make_run(make_config: Callable[..., TrainingConfig]) -> Callable[[str], TrainingRun]:
    return lambda run_id: TrainingRun(id=run_id, backend="scripted", config=make_config())


def test_a_run_comes_back_as_it_was(
    store: RunStore, make_run: Callable[[str], TrainingRun]
) -> None:
    """Nothing of a record is lost or changed on its way."""
    run = make_run("a")
    store.insert(run)
    assert store.get("a") == run


def test_another_store_on_the_same_file_sees_the_run(
    store: RunStore, url: str, make_run: Callable[[str], TrainingRun]
) -> None:
    """What one process wrote, another one reads."""
    store.insert(make_run("a"))
    assert RunStore(url).get("a").id == "a"


def test_an_id_is_taken_once(store: RunStore, make_run: Callable[[str], TrainingRun]) -> None:
    """Two runs never share an id."""
    store.insert(make_run("a"))
    with pytest.raises(DuplicateRun):
        store.insert(make_run("a"))


def test_a_unique_beginning_finds_the_run(
    store: RunStore, make_run: Callable[[str], TrainingRun]
) -> None:
    """People type the first characters."""
    store.insert(make_run("alpha"))
    store.insert(make_run("beta"))
    assert store.get("al").id == "alpha"


def test_an_exact_id_wins_over_a_longer_one(
    store: RunStore, make_run: Callable[[str], TrainingRun]
) -> None:
    """A run whose id begins another one's can still be named."""
    store.insert(make_run("a"))
    store.insert(make_run("ab"))
    assert store.get("a").id == "a"


@pytest.mark.parametrize("asked", ["x", "a", "", "a%", "_"])
def test_unknown_and_ambiguous_ids_are_not_found(
    store: RunStore, make_run: Callable[[str], TrainingRun], asked: str
) -> None:
    """Neither none nor several is one; SQL wildcards mean themselves."""
    store.insert(make_run("a1"))
    store.insert(make_run("a2"))
    with pytest.raises(RunNotFound):
        store.get(asked)


def test_list_filters_by_status(store: RunStore, make_run: Callable[[str], TrainingRun]) -> None:
    """Only runs in the wanted status are listed."""
    store.insert(make_run("a"))
    store.insert(make_run("b"))
    store.update("b", lambda run: run.model_copy(update={"status": TrainingStatus.FAILED}))
    assert [run.id for run in store.list(status=TrainingStatus.FAILED)] == ["b"]


def test_deleting_a_run_deletes_its_journal(
    store: RunStore, make_run: Callable[[str], TrainingRun]
) -> None:
    """A new run with the same id starts from nothing."""
    store.insert(make_run("a"))
    store.begin("a", "create")
    store.delete("a")
    store.insert(make_run("a"))
    assert store.entry("a", "create") is None


def test_a_newer_store_is_refused(
    store: RunStore, url: str, tmp_path: Path, make_run: Callable[[str], TrainingRun]
) -> None:
    """An older program does not write into what a newer one made."""
    store.insert(make_run("a"))
    with sqlite3.connect(tmp_path / "state" / "runs.db") as connection:
        connection.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION + 1,))
    with pytest.raises(StoreError, match="newer version"):
        RunStore(url).get("a")


def test_a_damaged_store_is_an_error_of_ours(tmp_path: Path) -> None:
    """A file that is no database is named, not a stack of SQL."""
    path = tmp_path / "runs.db"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(StoreError, match=r"runs\.db"):
        RunStore(f"sqlite:///{path}").list()


def test_the_store_is_its_owner_s_only(tmp_path: Path) -> None:
    """Whatever the umask, nobody else reads the runs, and what is made above them is private."""
    before = os.umask(0)
    try:
        store = RunStore(f"sqlite:///{tmp_path / 'home' / 'runs.db'}")
        store.list()
    finally:
        os.umask(before)
    rights = [stat.S_IMODE(path.stat().st_mode) for path in sorted((tmp_path / "home").iterdir())]
    store.close()
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert set(rights) == {0o600}


@pytest.mark.parametrize(
    "url", ["nonsense", "nosuch://host/db", "postgresql://me:hunter2@host/db", "mysql://host/db"]
)
def test_a_url_that_cannot_be_used_names_its_setting(url: str) -> None:
    """A driver that is not there is a matter of configuration, and no password is repeated."""
    with pytest.raises(ConfigError) as caught:
        RunStore(url)
    assert "TRAINING_BACKENDS_STORE_URL" in str(caught.value.hint)
    assert "hunter2" not in str(caught.value)
