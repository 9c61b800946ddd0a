"""The records of runs: durable, shared between processes, honest about what cannot be done."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.store.conftest import BEGINNING, MakeRun, execute, told
from training_backends import (
    ConfigError,
    DuplicateRun,
    RunNotFound,
    StoreError,
    TrainingRun,
    TrainingStatus,
)
from training_backends.core.run import RunState, Staleness
from training_backends.store import RunStore

LATER = BEGINNING + timedelta(hours=1)


def test_a_run_comes_back_as_it_was(store: RunStore, make_run: MakeRun) -> None:
    """Nothing of a record is lost or changed on its way."""
    run = make_run("a")
    store.insert(run)
    assert store.get("a") == run


@pytest.mark.parametrize(("kind", "former"), [("stalled", "still"), ("not_found", "vanished")])
def test_a_record_with_former_names_comes_back_with_those_of_today(
    store: RunStore, url: str, make_run: MakeRun, kind: str, former: str
) -> None:
    """Tags were stored as labels, and kinds of staleness had other names."""
    stale = Staleness(kind=kind, since=BEGINNING, message="no progress")
    run = make_run("a", stale=stale)
    run = run.model_copy(update={"config": run.config.model_copy(update={"tags": {"team": "x"}})})
    store.insert(run)
    execute(
        url,
        "UPDATE documents SET document = replace(document, '\"tags\":', '\"labels\":')",
        f"UPDATE documents SET document = replace(document, '\"{kind}\"', '\"{former}\"')",
    )
    ((document,),) = execute(url, "SELECT document FROM documents")
    assert '"labels":{"team":"x"}' in document
    assert f'"kind":"{former}"' in document
    assert RunStore(url).get("a") == run


def test_another_store_on_the_same_file_sees_the_run(
    store: RunStore, url: str, make_run: MakeRun
) -> None:
    """What one process wrote, another one reads."""
    store.insert(make_run("a"))
    assert RunStore(url).get("a").id == "a"


def test_an_id_is_taken_once(store: RunStore, make_run: MakeRun) -> None:
    """Two runs never share an id."""
    store.insert(make_run("a"))
    with pytest.raises(DuplicateRun):
        store.insert(make_run("a"))


def test_an_id_names_no_longer_one(store: RunStore, make_run: MakeRun) -> None:
    """Neither read nor written: a sweep's `exp-1` is not its `exp-10`."""
    ten = make_run("exp-10", step=1)
    store.insert(ten)

    def change(run: TrainingRun) -> TrainingRun:
        return run.model_copy(update={"step": 2})

    touches: list[Callable[[], object]] = [
        lambda: store.get("exp-1"),
        lambda: store.update("exp-1", change),
        lambda: store.observed("exp-1", change, [told("x")], after=None, cursor="1"),
        lambda: store.note("exp-1", change, [told("x")]),
    ]
    for touch in touches:
        with pytest.raises(RunNotFound) as caught:
            touch()
        assert caught.value.candidates == ("exp-10",)
        assert "exp-10" in str(caught.value.hint)
    store.delete("exp-1")
    assert (store.get("exp-10"), store.records("exp-10")) == (ten, [])


@pytest.mark.parametrize(
    ("asked", "candidates"),
    [
        ("x", ()),
        ("a", ("a1", "a1b", "a2")),
        ("", ()),
        ("a%", ()),
        ("_", ()),
        ("A1", ()),
        ("a3", ()),
        ("b", ("b1", "b2")),
        ("a1b", None),
    ],
)
def test_an_unknown_id_is_answered_with_those_that_begin_with_it(
    store: RunStore, make_run: MakeRun, asked: str, candidates: tuple[str, ...] | None
) -> None:
    """SQL wildcards mean themselves, and capitals are other letters."""
    for name in ("a1", "a2", "a1b", "b1", "b2"):
        store.insert(make_run(name))
    if candidates is None:
        assert store.get(asked).id == asked
        return
    with pytest.raises(RunNotFound) as caught:
        store.get(asked)
    assert caught.value.candidates == candidates


def test_a_run_made_again_under_an_id_outlives_the_delete_of_the_first(
    store: RunStore, make_run: MakeRun
) -> None:
    """A delete that was slow does not meet the new one."""
    store.insert(make_run("a", created_at=BEGINNING))
    store.delete("a")
    store.insert(make_run("a", created_at=LATER))
    store.delete("a", created_at=BEGINNING)
    assert store.get("a").created_at == LATER
    store.delete("a", created_at=LATER)
    assert store.list() == []


def test_runs_of_one_moment_are_listed_by_the_code_points_of_their_ids(
    store: RunStore, make_run: MakeRun
) -> None:
    """Not as people sort words, which differs from server to server."""
    ids = ["b", "A", "a_b", "a", "a-b", "B", "aB", "a.b", "10", "9"]
    for name in ids:
        store.insert(make_run(name, created_at=BEGINNING))
    assert [run.id for run in store.list()] == sorted(ids, reverse=True)


def test_list_filters_by_status(store: RunStore, make_run: MakeRun) -> None:
    """Only runs in the wanted status are listed."""
    store.insert(make_run("a"))
    store.insert(make_run("b"))
    store.update("b", lambda run: run.model_copy(update={"status": TrainingStatus.FAILED}))
    assert [run.id for run in store.list(status=TrainingStatus.FAILED)] == ["b"]


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
    "url",
    [
        "nonsense",
        "nosuch://me:hunter2@host/db",
        "mysql://me:hunter2@host/db",
        "postgresql+asyncpg://me:hunter2@host/db",
        "postgresql://me:hunter2@host:hunter2/db",
        "postgresql://me:secret@hunter2@host/db",
    ],
)
def test_a_url_that_cannot_be_used_names_its_setting(url: str) -> None:
    """It is a matter of configuration, and no password is repeated."""
    with pytest.raises(ConfigError) as caught:
        RunStore(url)
    assert "TRAINING_BACKENDS_STORE_URL" in str(caught.value.hint)
    assert "hunter2" not in str(caught.value)


def test_a_store_in_memory_works_across_threads(make_run: MakeRun) -> None:
    """It ends with the process, which is all that can be asked of it."""
    store = RunStore("sqlite://")
    store.insert(make_run("a"))
    with ThreadPoolExecutor(2) as threads:
        assert threads.submit(store.get, "a").result().id == "a"
    assert store.update("a", ended).status is TrainingStatus.COMPLETED


def test_many_threads_write_without_getting_in_each_other_s_way(
    store: RunStore, make_run: MakeRun
) -> None:
    """Each change gets the run as the one before it left it."""
    store.insert(make_run("a", step=0))

    def one_more(run: TrainingRun) -> TrainingRun:
        return run.model_copy(update={"step": (run.step or 0) + 1})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: store.update("a", one_more), range(40)))
    assert store.get("a").step == 40


# -- seen --------------------------------------------------------------------------------


def test_a_run_that_was_seen_says_when(store: RunStore, make_run: MakeRun) -> None:
    """The newest time counts, in whatever order looks are told of; other runs stay as they are."""
    store.insert(make_run("a"))
    store.insert(make_run("b"))
    store.seen(["a"], LATER)
    store.seen(["a", "no such run"], BEGINNING)
    assert store.get("a").last_seen_at == LATER
    assert store.list()[-1].last_seen_at == LATER
    assert store.get("b").last_seen_at is None


def test_a_change_does_not_take_back_when_a_run_was_seen(
    store: RunStore, make_run: MakeRun
) -> None:
    """A slow look that ends after a fast one is the older one."""
    store.insert(make_run("a"))
    store.seen(["a"], LATER)
    state = RunState(status=TrainingStatus.RUNNING)
    assert (
        store.update("a", lambda run: run.updated(state, seen_at=BEGINNING)).last_seen_at == LATER
    )
    assert store.get("a").last_seen_at == LATER


# -- live --------------------------------------------------------------------------------


def ended(run: TrainingRun) -> TrainingRun:
    return run.updated(RunState(status=TrainingStatus.COMPLETED), seen_at=BEGINNING)


def names(runs: Sequence[TrainingRun]) -> list[str]:
    return sorted(run.id for run in runs)


def test_live_runs_are_those_that_go_on_at_a_provider(
    store: RunStore, make_run: MakeRun, running: MakeRun
) -> None:
    """Not those that never got there, and not those that are over."""
    for run in (running("a"), running("b", backend="other"), make_run("c"), running("d")):
        store.insert(run)
    store.update("d", ended)
    live = store.live()
    assert names(live.changed) == ["a", "b"]
    assert sorted(live.versions) == sorted(live.seen_at) == ["a", "b"]
    assert names(store.live(backend="other").changed) == ["b"]
    assert names(store.live(only=["a", "c", "d", "x"]).changed) == ["a"]


def test_runs_that_stand_as_known_are_not_read_again(store: RunStore, running: MakeRun) -> None:
    """Being seen is no change; anything else of the record is."""
    for name in "abc":
        store.insert(running(name))
    known = store.live().versions
    store.seen(["a", "b"], LATER)
    store.update("b", lambda run: run.updated(RunState(status=run.status), seen_at=LATER))
    store.update("c", lambda run: run.model_copy(update={"step": 1}))
    live = store.live(known=known)
    assert names(live.changed) == ["c"]
    assert live.versions == {**known, "c": known["c"] + 1}
    assert live.seen_at == {"a": LATER, "b": LATER, "c": None}


def test_many_runs_are_changed_at_once(store: RunStore, running: MakeRun) -> None:
    """More than fit into one statement; those that are gone are passed over."""
    found = Staleness(kind="unreachable", since=BEGINNING, message="no answer")
    ids = [f"r{n}" for n in range(600)]
    for name in ids:
        store.insert(running(name))
    store.update_all([*ids, "gone"], lambda run: run.model_copy(update={"stale": found}))
    assert {run.stale for run in store.live(only=ids).changed} == {found}
    assert len(store.live().changed) == 600


def test_of_many_runs_all_change_or_none(store: RunStore, running: MakeRun) -> None:
    """An error in between leaves all as they were."""
    for name in "ab":
        store.insert(running(name))

    def fails_for_b(run: TrainingRun) -> TrainingRun:
        if run.id == "b":
            raise LookupError
        return ended(run)

    with pytest.raises(LookupError):
        store.update_all(["a", "b"], fails_for_b)
    assert store.get("a").status is TrainingStatus.RUNNING


def test_backends_to_watch_have_live_runs_or_events_to_tell(
    store: RunStore, make_run: MakeRun, running: MakeRun
) -> None:
    """The last event of the last run is told of, too."""
    store.insert(make_run("a", backend="idle"))
    store.insert(running("b", backend="busy"))
    store.insert(running("c", backend="just ended"))
    store.note("c", ended, [told("over", source="status")])
    assert store.backends_to_watch() == ["busy", "just ended"]


def test_a_provider_s_id_belongs_to_one_run(store: RunStore, running: MakeRun) -> None:
    """A job that another run has must not be taken for a lost one of this run."""
    store.insert(running("a"))
    store.insert(running("b"))
    assert store.claimed("a", ["job-a", "job-b", "job-c"]) == {"job-b"}


# -- what cannot be read -----------------------------------------------------------------


def test_a_record_that_makes_no_sense_is_named(
    store: RunStore, url: str, make_run: MakeRun
) -> None:
    """Whoever wrote it, the error says which run it is and what can be done."""
    store.insert(make_run("a"))
    execute(url, "UPDATE documents SET document = '{}'")
    with pytest.raises(StoreError, match="record of run 'a'") as caught:
        store.get("a")
    assert "doctor --recover" in str(caught.value.hint)


# -- cost --------------------------------------------------------------------------------


@contextmanager
def queries() -> Iterator[list[tuple[str, Any]]]:
    """Note what is asked of databases meanwhile."""
    asked: list[tuple[str, Any]] = []

    def note(_1: object, _2: object, statement: str, values: Any, *_: object) -> None:
        asked.append((statement, values))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield asked
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


def _not_found(store: RunStore, run_id: str) -> None:
    with pytest.raises(RunNotFound):
        store.get(run_id)


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.live(),
        lambda store: store.live(backend="scripted", known={}),
        lambda store: store.list(status=TrainingStatus.RUNNING),
        lambda store: store.claimed("a", ["job-b"]),
        lambda store: store.get("a"),
        lambda store: _not_found(store, "beg"),
    ],
    ids=["live", "live of a backend", "by status", "claimed", "get", "get an unknown one"],
)
def test_runs_that_ended_long_ago_cost_nothing(
    store: RunStore, url: str, running: MakeRun, ask: Callable[[RunStore], object]
) -> None:
    """What is asked for again and again is found by an index, however many runs there were.

    PostgreSQL reads tables as small as these whole, whatever indexes they have.
    """
    store.insert(running("a"))
    store.insert(running("begun"))
    with queries() as asked:
        ask(store)
    plans = []
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        for statement, values in asked:
            if statement.startswith("SELECT"):
                plans += connection.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
    assert plans
    scans = [plan for *_, plan in plans if plan.startswith("SCAN")]
    assert set(scans) <= {"SCAN runs USING INDEX runs_live"}  # has no others


def test_opening_a_store_costs_one_small_query(store: RunStore, url: str) -> None:
    """Every command opens it."""
    counts = []
    store.list()
    other = RunStore(url)
    for _ in range(2):
        with queries() as asked:
            other.list()
        counts.append(sum(statement.startswith("SELECT") for statement, _ in asked))
    other.close()
    assert counts == [2, 1]
