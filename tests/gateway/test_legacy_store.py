"""The database of the gateway's earlier versions is imported once.

The files in `legacy` are the databases that version 0.1 wrote of four jobs: one finished, one
running, two validated.
"""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from tests.gateway.conftest import scripted, site
from tests.waiting import until
from training_backends.core.errors import StoreError
from training_backends.gateway.keys import open_keys
from training_backends.gateway.store import lock_home

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"
DUMPS = Path(__file__).parent / "legacy"
KEY = "tb-4b8693bd-RH-z83QxBunGVxrqSG4fII5usrb8LiTuQ-dN13vMn5E"
DONE, LIVE = "26e18070-62f8-404b-89ad-91338a292381", "1c9d4d49-8407-4fb2-bfc4-162abe843e75"
REMOTE = "7f5b2eb2-407c-4523-ae05-633a120b9772"
BEFORE_PROJECTS = (
    *(f"ALTER TABLE {table} DROP COLUMN project" for table in ("files", "jobs", "models", "keys")),
    "UPDATE files SET visibility = 'user'",
    "PRAGMA user_version=3",
)
FIRST = (
    *(f"ALTER TABLE keys DROP COLUMN {name}" for name in ("scope", "expires_at", "last_used_at")),
    "ALTER TABLE jobs ADD COLUMN checkpoint_stride INTEGER",
    "PRAGMA user_version=1",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home as version 0.1 left it."""
    root = tmp_path / "home" / "gateway"
    root.mkdir(parents=True)
    for name in ("gateway", "runs"):
        dump = (DUMPS / f"{name}.sql").read_text().replace("{HOME}", str(tmp_path / "home"))
        with closing(sqlite3.connect(root / f"{name}.db")) as connection:
            connection.executescript(dump)
    return tmp_path / "home"


def change(home: Path, *statements: str) -> None:
    """Make a home what an earlier version left."""
    with closing(sqlite3.connect(home / "gateway" / "gateway.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def words(job: dict[str, Any]) -> list[str]:
    """Return the statuses of a job's events."""
    return [event["data"]["status"] for event in job["events"]]


async def test_finished_and_running_jobs_continue_in_the_new_database(home: Path) -> None:
    """Each with the events and checkpoints that it had; the old file is kept."""
    backend = scripted()
    backend.adopt(REMOTE)
    backend.log(REMOTE, "The record that was stored last.")
    async with site(home, backend) as here:
        done = await here.get(DONE)
        assert words(done) == ["QUEUED", "VALIDATING", "VALIDATED", "SUCCESS"]
        assert [point["step_number"] for point in done["checkpoints"]] == [20, 10]
        model = (await here.http.get(f"/v1/models/{done['fine_tuned_model']}")).json()
        assert model["job"] == DONE
        live = await here.get(LIVE)
        assert words(live) == ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING"]
        assert [point["step_number"] for point in live["checkpoints"]] == [10]
        backend.finish(REMOTE)
        # The older the run, the longer until it is observed by itself; an observation that
        # began before counts for this one, too.
        client = here.served.gateway.client
        await until(lambda: client.status(LIVE), lambda run: run.status.is_terminal)
        ended = await here.until(LIVE, "SUCCESS")
        assert words(ended) == [*words(live), "SUCCESS"]
        assert (await here.http.get(JOBS)).json()["total"] == 4
        assert (await here.http.get(f"{JOBS}?status=VALIDATED")).json()["total"] == 2
        assert (await here.http.get("/v1/files")).json()["total"] == 1
    root = home / "gateway"
    assert not (root / "gateway.db").exists()
    assert (root / "gateway.db.orig").exists()


def test_keys_work_as_before_whoever_imports_them_first(home: Path) -> None:
    """Several processes may do so at once; what changes afterwards is not undone."""
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(open_keys, [home] * 4))
    for keys in stores:
        found = keys.admit(KEY, writes=True)
        assert (found.key_id, found.project) == ("4b8693bd", "team-a")
    stores[0].revoke("4b8693bd")
    root = home / "gateway"
    (root / "gateway.db.orig").rename(root / "gateway.db")  # as if a crash prevented the renaming
    assert [key.state for key in open_keys(home).list()] == ["revoked"]


@pytest.mark.parametrize("older", [BEFORE_PROJECTS, (*BEFORE_PROJECTS, *FIRST)])
async def test_databases_of_still_earlier_versions_are_imported_too(
    home: Path, older: tuple[str, ...]
) -> None:
    """Everything belongs to the default project, and no file is private to a key."""
    change(home, *older)
    async with site(home) as here:
        (file,) = (await here.http.get("/v1/files")).json()["data"]
        assert file["visibility"] == "workspace"
        assert words(await here.get(DONE))[-1] == "SUCCESS"
    (key,) = await to_thread.run_sync(lambda: open_keys(home).list())
    assert (key.project, key.scope, key.state) == ("default", "write", "active")


def test_a_damaged_old_database_is_named_and_kept(home: Path) -> None:
    """Starting without the keys in it would lock every client out."""
    path = home / "gateway" / "gateway.db"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="cannot be imported") as raised:
        open_keys(home)
    assert "backup" in str(raised.value.hint)
    assert path.exists()


def test_a_database_that_an_earlier_gateway_uses_is_left_to_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not see what changes in the new one."""
    monkeypatch.setattr("training_backends.gateway.legacy_store.PATIENCE", 0.1)
    lock_home(home / "gateway")
    with pytest.raises(StoreError, match="earlier version"):
        open_keys(home)
    assert (home / "gateway" / "gateway.db").exists()
