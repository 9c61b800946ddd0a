"""The audit log: who changed or downloaded what, when, from where, and with what outcome."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from anyio import to_thread

from tests.gateway.conftest import KEY, NO_CERTIFICATES, Site, jsonl, openai_client, site
from tests.waiting import until
from training_backends.gateway.audit import AuditLog
from training_backends.store.gateway_schema import audit

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


async def entries(here: Site, **filters: Any) -> list[dict[str, Any]]:
    """Return what the log has."""
    log = AuditLog(here.served.gateway.store)
    return await to_thread.run_sync(lambda: list(log.entries(**filters)))


def actions(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what was done to what."""
    return [(entry["action"], entry["target"]) for entry in found]


async def test_every_change_and_every_download_is_recorded(here: Site) -> None:
    """In both APIs, with the key and the request that made it; what only reads is not."""
    made = await to_thread.run_sync(lambda: here.served.gateway.keys.create(project="p"))
    key = made.key.get_secret_value()
    here.http.headers["authorization"] = f"Bearer {key}"
    file_id = await here.upload()
    assert await here.upload() == file_id  # changes nothing
    job = await here.create(files=[file_id])
    await here.until(job["id"], "VALIDATED")
    for _ in range(2):  # the second start changes nothing
        await here.http.post(f"{JOBS}/{job['id']}/start")
    (remote,) = await until(lambda: here.backend.created)
    here.backend.finish(remote)
    model = (await here.until(job["id"], "SUCCESS"))["fine_tuned_model"]
    other = await here.create(files=[file_id], suffix="x")
    await here.http.post(f"{JOBS}/{other['id']}/cancel")
    await here.http.patch(f"/v1/fine_tuning/models/{model}", json={"name": "n"})
    await here.http.post(f"/v1/fine_tuning/models/{model}/archive")
    await here.http.delete(f"/v1/fine_tuning/models/{model}/archive")
    for path in ("/v1/files", f"/v1/files/{file_id}", JOBS, "/v1/models", "/openai/v1/files"):
        assert (await here.http.get(path)).status_code == 200
    await here.http.get(f"/v1/files/{file_id}/content")
    link = (await here.http.get(f"/v1/files/{file_id}/url")).json()["url"]
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        linked = await anybody.get(link)
    async with openai_client(here) as sdk:
        keyed = sdk.with_options(api_key=key)
        second = await keyed.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune")
        await keyed.files.content(second.id)
        await keyed.files.delete(second.id)
    second_id = str(UUID(second.id.removeprefix("file-")))
    await here.http.delete(f"/v1/models/{model}")
    found = await entries(here)
    assert actions(found) == [
        ("key.create", made.info.id),
        ("file.create", file_id),
        ("job.create", job["id"]),
        ("job.start", job["id"]),
        ("job.create", other["id"]),
        ("job.cancel", other["id"]),
        ("model.update", model),
        ("model.archive", model),
        ("model.unarchive", model),
        ("file.download", file_id),
        ("file.link", file_id),
        ("file.download", file_id),
        ("file.create", second_id),
        ("file.download", second_id),
        ("file.delete", second_id),
        ("model.delete", model),
    ]
    by_link = found[11]
    assert (by_link["actor"], by_link["request_id"]) == ("link", linked.headers["x-request-id"])
    rest = [each for each in found[1:] if each is not by_link]
    assert {(each["actor"], each["project"], each["address"]) for each in rest} == {
        (made.info.id, "p", "127.0.0.1")
    }
    assert {entry["outcome"] for entry in found} == {"ok"}
    began = datetime.fromisoformat(found[0]["at"])
    assert timedelta(0) < datetime.now(UTC) - began < timedelta(minutes=5)
    assert key not in str(found)


async def test_a_change_that_is_rejected_is_recorded_with_its_status(here: Site) -> None:
    """Of known keys: others could fill the log; no body and no query is in it."""
    await here.try_create(files=[], suffix="no-such")
    await here.http.delete("/v1/models/ft:none?note=private")
    await here.http.get("/v1/models/ft:none")
    await here.http.post("/v1/chat/completions", json={})
    await here.http.post(JOBS, headers={"authorization": "Bearer nobody"}, json={})
    found = await entries(here)
    assert [(each["target"], each["outcome"]) for each in found] == [
        (f"POST {JOBS}", "422"),
        ("DELETE /v1/models/{model_id}", "404"),
    ]
    assert {each["actor"] for each in found} == {"static"}


@pytest.mark.parametrize(
    ("trusted", "sent", "recorded"),
    [
        ([], "203.0.113.9", "127.0.0.1"),
        (["10.0.0.0/8"], "203.0.113.9", "127.0.0.1"),
        (["127.0.0.0/8"], "203.0.113.9", "203.0.113.9"),
        (["127.0.0.1", "10.0.0.0/8"], "198.51.100.1, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        (["127.0.0.1"], "<script>", ""),
    ],
)
async def test_only_a_trusted_proxy_says_where_a_request_comes_from(
    tmp_path: Path, trusted: list[str], sent: str, recorded: str
) -> None:
    """Clients can send the header too; what a proxy did not add itself is not believed."""
    async with site(tmp_path, trusted_proxies=trusted) as here:
        here.http.headers["x-forwarded-for"] = sent
        await here.upload()
        assert [entry["address"] for entry in await entries(here)] == [recorded]


async def test_entries_are_selected_by_time_and_project(here: Site) -> None:
    """Read page by page, so that a long log is no trouble."""
    now = time.time()
    rows = [
        {"at": now - 86400 * (n % 4), "project": "p" if n % 2 else "q", "target": f"t{n}"}
        | dict.fromkeys(("actor", "action", "outcome", "address", "request_id"), "")
        for n in range(2500)
    ]
    write = here.served.gateway.store.write
    await to_thread.run_sync(write, lambda c: c.execute(audit.insert(), rows))
    assert len(await entries(here)) == 2500
    assert {each["project"] for each in await entries(here, project="q")} == {"q"}
    recent = datetime.now(UTC) - timedelta(days=1.5)
    assert len(await entries(here, since=recent)) == 1250
    assert len(await entries(here, until=recent, project="p")) == 625


async def test_only_old_entries_are_deleted(tmp_path: Path) -> None:
    """After the days of the settings."""
    async with site(tmp_path, audit_days=2) as here:
        await here.upload()
        old = audit.update().values(at=audit.c.at - 3 * 86400)
        await here.served.gateway.store.awrite(lambda c: c.execute(old))
        await here.upload(name="other.jsonl")
        assert len(await entries(here)) == 2
    async with site(tmp_path, audit_days=2) as here:
        left = await until(lambda: entries(here), lambda found: len(found) == 1)
        assert left[0]["action"] == "file.create"


async def test_a_change_that_cannot_be_recorded_is_not_made(here: Site) -> None:
    """Both are one transaction."""
    store = here.served.gateway.store
    await store.awrite(lambda c: c.execute(sa.text("DROP TABLE gateway_audit")))
    answer = await here.http.post("/v1/files", files={"file": ("train.jsonl", jsonl())})
    assert answer.status_code == 503
    assert (await here.http.get("/v1/files")).json()["data"] == []
    assert KEY not in answer.text
