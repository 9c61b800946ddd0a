"""A killed process leaves a store that holds what it did, whole, and nothing half done."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.effort import is_thorough
from tests.forking import Program
from tests.postgres import Postgres
from tests.store import crashing
from tests.store.conftest import MakeRun, version_1
from training_backends import TrainingRun
from training_backends.store import RunStore

pytestmark = pytest.mark.slow


def contents(store: RunStore) -> object:
    """Return all that can be read from a store about the runs in the sequence."""
    runs = store.list()
    live = store.live()
    names = ("upload", "create")
    return (
        [run.model_dump_json() for run in runs],
        (dict(live.versions), dict(live.seen_at)),
        {(run.id, name): store.entry(run.id, name) for run in runs for name in names},
        {run.id: (store.records(run.id), store.metrics(run.id)) for run in runs},
        {run.id: (store.provider_cursor(run.id), store.is_complete(run.id)) for run in runs},
        store.undelivered(backend="scripted", limit=100),
        store.known_upload("server", "hash"),
        store.holder("launch:r"),
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of stores that a `NAME` in it tells apart."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/NAME.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url("NAME")


def test_whenever_it_is_killed_a_store_holds_what_was_done_and_nothing_half_done(
    tmp_path: Path, make_run: MakeRun, places: str, program: Program
) -> None:
    """Between any two statements, within any call, and while an old store becomes a new one."""
    run, old = make_run("r", created_at=crashing.AT), make_run("old")
    (tmp_path / "run.json").write_text(run.model_dump_json())
    statements = list(version_1(old))
    (tmp_path / "old.json").write_text(json.dumps(statements))
    done_in_order = states(places, run, statements)

    # Both kinds of stores are killed at points of their own, unless there is time for all.
    first, apart = (0, 1) if is_thorough() else (int(places.startswith("sqlite")) * 10, 20)
    points = (str(first), str(apart))
    subprocess.run([program.python, crashing.__file__, tmp_path, places, *points], check=True)

    killed = sorted(tmp_path.glob("*.done"))
    assert len(killed) > 16 + 90 // apart
    for path in killed:
        store = RunStore(crashing.at(places, path.stem))
        done = path.stat().st_size
        assert contents(store) in done_in_order[done : done + 2], path.name
        store.close()


def states(places: str, run: TrainingRun, statements: Sequence[str]) -> list[object]:
    """Return what a store holds after none, one, two, … of the calls."""
    crashing.make_old(places, "calm", statements)
    store = RunStore(crashing.at(places, "calm"))
    found = [contents(store)]
    for call in crashing.sequence(store, run):
        call()
        found.append(contents(store))
    store.close()
    return found
