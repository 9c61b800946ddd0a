"""A killed process leaves a store that holds what it did, whole, and nothing half done."""

import subprocess
import sys
from pathlib import Path

from tests.client.store import crashing
from tests.client.store.conftest import MakeRun, WriteVersion1
from training_backends import TrainingRun
from training_backends.client.store import RunStore


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
        {run.id: (store.provider_cursor(run.id), store.is_whole(run.id)) for run in runs},
        store.undelivered(backend="scripted", limit=100),
        store.known_upload("server", "hash"),
        store.holder("launch:r"),
    )


def test_whenever_it_is_killed_a_store_holds_what_was_done_and_nothing_half_done(
    tmp_path: Path, make_run: MakeRun, write_version_1: WriteVersion1
) -> None:
    """Between any two statements, within any call, and while an old store becomes a new one."""
    run, old = make_run("r", created_at=crashing.AT), make_run("old")
    (tmp_path / "run.json").write_text(run.model_dump_json())
    write_version_1(tmp_path / "old.db", old)
    done_in_order = states(tmp_path, run, write_version_1(tmp_path / "calm.db", old))

    subprocess.run([sys.executable, crashing.__file__, tmp_path], check=True)

    killed = sorted(tmp_path.glob("*-*.db"))
    assert len(killed) > 100
    for path in killed:
        store = RunStore(f"sqlite:///{path}")
        done = path.with_suffix(".done").stat().st_size
        assert contents(store) in done_in_order[done : done + 2], path.name
        store.close()


def states(directory: Path, run: TrainingRun, path: Path) -> list[object]:
    """Return what a store holds after none, one, two, … of the calls."""
    store = RunStore(f"sqlite:///{path}")
    found = [contents(store)]
    for call in crashing.sequence(store, run):
        call()
        found.append(contents(store))
    store.close()
    return found
