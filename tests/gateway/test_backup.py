"""Backups as docs/operations.md describes them, restored elsewhere."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from tests.gateway.conftest import Site, jsonl, scripted, site
from tests.pages import code_blocks
from tests.postgres import Postgres
from training_backends.gateway.audit import AuditLog

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


async def contents(here: Site) -> dict[str, Any]:
    """Return all that clients and operators can see."""
    found: dict[str, Any] = {}
    for path in ("/v1/files", JOBS, "/v1/models"):
        found[path] = [
            # base models are as old as the process
            {name: value for name, value in entry.items() if name != "created"}
            for entry in (await here.http.get(path)).json()["data"]
        ]
    for entry in found["/v1/files"]:
        answer = await here.http.get(f"/v1/files/{entry['id']}/content")
        assert answer.status_code == 200
        found[entry["id"]] = answer.content
    for entry in found[JOBS]:
        found[entry["id"]] = await here.get(entry["id"])
    found["keys"] = await to_thread.run_sync(here.served.gateway.keys.list)
    return found


async def fill(here: Site) -> tuple[str, str]:
    """Leave a job of each kind, and return a key and a signed URL."""
    made = await to_thread.run_sync(lambda: here.served.gateway.keys.create("ci", project="p"))
    file_id = await here.upload()
    await here.finished(files=[file_id], suffix="mine")
    open_job = await here.create(files=[await here.upload(jsonl() + b"\n", "second.jsonl")])
    await here.until(open_job["id"], "VALIDATED")
    url = (await here.http.get(f"/v1/files/{file_id}/url")).json()["url"]
    return made.key.get_secret_value(), url.removeprefix(here.served.url)


async def restored(
    tmp_path: Path, backup: Callable[[Site], dict[str, Any]], **settings: Any
) -> None:
    """Back a gateway up while it serves, restore it, and compare what both show."""
    backend = scripted()
    async with site(tmp_path / "old", backend, **settings) as here:
        key, link = await fill(here)
        elsewhere = await to_thread.run_sync(backup, here)
        later = await here.upload(name="later.jsonl")
        before = await contents(here)
        log = AuditLog(here.served.gateway.store)
        audited = await to_thread.run_sync(lambda: list(log.entries()))
    del before[later]
    before["/v1/files"] = [each for each in before["/v1/files"] if each["id"] != later]
    shutil.rmtree(tmp_path / "old")
    async with site(tmp_path / "new", backend, **(settings | elsewhere)) as here:
        assert await contents(here) == before
        assert (await here.http.get(link)).content == jsonl()
        log = AuditLog(here.served.gateway.store)
        kept = await to_thread.run_sync(lambda: list(log.entries()))
        assert kept[:6] == audited[:6]
        here.http.headers["authorization"] = f"Bearer {key}"
        assert (await here.http.get("/v1/files")).json()["data"] == []
        assert await here.upload()


def run(script: str, **variables: Any) -> None:
    """Run a code block of the page."""
    (block,) = [each for each in code_blocks("operations.md", "sh") if each.title == script]
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = ["sh", "-e", "-u", "-c", block.text]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)


async def test_a_gateway_on_sqlite_is_restored(tmp_path: Path) -> None:
    """From a copy that SQLite makes while the gateway writes."""

    def backup(here: Site) -> dict[str, Any]:
        run("back-up.sh", TRAINING_BACKENDS_HOME=here.home, BACKUP=tmp_path / "backup")
        run("restore.sh", TRAINING_BACKENDS_HOME=tmp_path / "new", BACKUP=tmp_path / "backup")
        return {}

    await restored(tmp_path, backup)


async def test_a_gateway_on_postgresql_is_restored(tmp_path: Path, postgres: Postgres) -> None:
    """By pg_dump and pg_restore, into another database."""
    if shutil.which("pg_dump") is None:
        pytest.skip("not installed: pg_dump (package postgresql-client)")
    postgres.execute("CREATE DATABASE gateway")
    server = {"PGHOST": postgres.directory, "PGUSER": "postgres"}
    url = f"postgresql://postgres@/{{}}?host={postgres.directory}"

    def backup(here: Site) -> dict[str, Any]:
        dump = tmp_path / "gateway.dump"
        run("back-up-postgres.sh", **server, DATABASE="gateway", DUMP=dump)
        run("restore-postgres.sh", **server, NEW_DATABASE="restored", DUMP=dump)
        for name in ("files", "secret"):
            new = tmp_path / "new" / "gateway"
            new.mkdir(parents=True, exist_ok=True, mode=0o700)
            subprocess.run(["cp", "-a", here.home / "gateway" / name, new], check=True)
        return {"store_url": url.format("restored")}

    await restored(tmp_path, backup, store_url=url.format("gateway"))
