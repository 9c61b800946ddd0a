"""Projects: what one key makes does not exist for the keys of other projects."""

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from anyio import to_thread

from tests.gateway.conftest import NO_CERTIFICATES, ROWS, Site, jsonl
from training_backends.core.errors import Issue
from training_backends.core.run import ValidationReport
from training_backends.gateway.app import create_app
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.keys import Principal, Scope

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"
LISTS = ("/v1/files", JOBS, "/v1/models")


@pytest.fixture
async def keyed(shared: Site) -> AsyncIterator[Site]:
    """The gateway that several tests ask, and a client that may take any key."""
    async with httpx.AsyncClient(
        base_url=shared.served.url, headers=shared.http.headers, timeout=30, verify=NO_CERTIFICATES
    ) as http:
        yield replace(shared, http=http)


async def key(here: Site, project: str, scope: Scope = "write") -> dict[str, str]:
    """Return the headers that present a new key of a project."""
    made = await to_thread.run_sync(
        lambda: here.served.gateway.keys.create(project=project, scope=scope)
    )
    return {"authorization": f"Bearer {made.key.get_secret_value()}"}


async def enter(here: Site, project: str, scope: Scope = "write") -> dict[str, str]:
    """Ask as a project from now on, and return the headers that do."""
    headers = await key(here, project, scope)
    here.http.headers.update(headers)
    return headers


async def owned(here: Site, project: str) -> dict[str, str]:
    """Return the ids of a file, a finished job and its model that a project owns."""
    await enter(here, project)
    file_id = await here.upload(name=f"{project}.jsonl")
    job = await here.finished(files=[file_id])
    return {"file_id": file_id, "job_id": job["id"], "model_id": job["fine_tuned_model"]}


def operations(gateway: Gateway) -> list[tuple[str, str]]:
    """Return method and path of every operation that names an object and needs a key."""
    paths = create_app(gateway).openapi()["paths"]
    return [
        (method, path)
        for path, entry in paths.items()
        if path.startswith("/v1/") and "{" in path
        for method in entry
    ]


async def shown(here: Site, headers: dict[str, str] | None = None) -> set[str]:
    """Return the ids of everything that the lists show, base models left out."""
    found = set()
    for path in LISTS:
        page = (await here.http.get(path, headers=headers)).json()
        found |= {entry["id"] for entry in page["data"] if entry.get("type") != "base"}
    return found


def comparable(answer: httpx.Response) -> tuple[int, str, set[str]]:
    """Return what a client can tell answers apart by; ids that it sent do not count."""
    body = re.sub(r"[0-9a-f-]{36}", "ID", answer.text)
    return answer.status_code, body, set(answer.headers)


async def test_what_another_project_owns_is_answered_as_if_it_did_not_exist(here: Site) -> None:
    """Every operation, with the same status and body as for an id that was never given."""
    mine = await owned(here, "one")
    other = await key(here, "two")
    unknown = {"file_id": str(uuid4()), "job_id": str(uuid4()), "model_id": "ft:none"}
    asked = 0
    for method, path in operations(here.served.gateway):
        body: Any = {"json": {"name": "x"}} if method == "patch" else {}
        theirs = await here.http.request(method, path.format_map(mine), headers=other, **body)
        nobodys = await here.http.request(method, path.format_map(unknown), headers=other, **body)
        assert comparable(theirs) == comparable(nobodys), path
        assert theirs.status_code == 404, path
        asked += 1
    assert asked == 13
    assert await shown(here, other) == set()
    assert await shown(here) == set(mine.values())
    assert (await here.http.get(f"/v1/models/{mine['model_id']}")).json()["name"] is None


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize("role", ["training_files", "validation_files"])
async def test_a_job_cannot_use_the_files_of_another_project(
    keyed: Site, query: str, role: str
) -> None:
    """The error is that of an unknown file, for admin keys too."""
    foreign = (await owned(keyed, "one"))["file_id"]
    for scope in ("write", "admin"):
        await enter(keyed, "two", scope)
        answers = []
        for file_id in (foreign, str(uuid4())):
            files = {"training_files": [await keyed.upload()], role: [file_id]}
            body = {"model": "tiny-mistral", "hyperparameters": {}, **files}
            answers.append(comparable(await keyed.http.post(JOBS + query, json=body)))
        assert answers[0] == answers[1]
        assert answers[0][0] == 422
        assert "file_not_found" in answers[0][1]


async def test_an_admin_key_sees_and_changes_what_every_project_owns(here: Site) -> None:
    """What it makes itself belongs to its own project."""
    one, two = await owned(here, "one"), await owned(here, "two")
    write = await key(here, "two")
    await enter(here, "three", "admin")
    assert await shown(here) == {*one.values(), *two.values()}
    for path in (f"/v1/files/{one['file_id']}/content", f"{JOBS}/{one['job_id']}"):
        assert (await here.http.get(path)).status_code == 200
    assert (await here.http.delete(f"/v1/models/{two['model_id']}")).status_code == 200
    assert (await here.http.delete(f"/v1/files/{two['file_id']}")).status_code == 200
    assert await shown(here, write) == {two["job_id"]}
    await here.upload()
    assert await shown(here, write) == {two["job_id"]}


async def test_the_static_key_sees_every_project_and_makes_in_the_default_one(here: Site) -> None:
    """It comes from the settings of the gateway's operator."""
    static, file_id = dict(here.http.headers), await here.upload()
    one = await owned(here, "one")
    assert await shown(here, static) == {*one.values(), file_id}
    assert await shown(here, await key(here, "default")) == {file_id}


async def test_keys_of_one_project_share_what_is_in_it(here: Site) -> None:
    """Also to change it; a key that may only read sees the same."""
    mine = await owned(here, "one")
    assert await shown(here, await key(here, "one", "read")) == set(mine.values())
    again = await key(here, "one")
    assert (
        await here.http.delete(f"/v1/files/{mine['file_id']}", headers=again)
    ).status_code == 200
    assert await shown(here) == set(mine.values()) - {mine["file_id"]}


async def test_the_same_content_in_two_projects_is_two_files(here: Site) -> None:
    """The bytes are there once, and stay while one of both needs them."""
    first = await enter(here, "one")
    mine = await here.upload()
    second = await enter(here, "two")
    theirs = await here.upload()
    assert theirs != mine
    assert len(list((here.home / "gateway" / "files").iterdir())) == 1
    assert (await here.http.delete(f"/v1/files/{mine}", headers=first)).status_code == 200
    assert (await here.http.get(f"/v1/files/{theirs}/content", headers=second)).content == jsonl()


async def test_content_that_is_there_already_is_written_all_the_same(here: Site) -> None:
    """A faster answer would say that another project has uploaded it."""
    await enter(here, "one")
    await here.upload()
    (blob,) = (here.home / "gateway" / "files").iterdir()
    before = blob.stat().st_ino
    await enter(here, "two")
    await here.upload()
    assert blob.stat().st_ino != before


async def test_similar_jobs_of_two_projects_are_not_in_each_others_way(here: Site) -> None:
    """Each is found by its own project only, whatever it is filtered by."""
    for project in ("one", "two"):
        await enter(here, project)
        job = await here.create(suffix="same")
        for query in ("", "?suffix=same", "?model=tiny-mistral", "?created_by_me=true"):
            page = (await here.http.get(JOBS + query)).json()
            assert ([entry["id"] for entry in page["data"]], page["total"]) == ([job["id"]], 1)


async def test_a_signed_link_stands_for_its_file(keyed: Site) -> None:
    """Created by a key that sees the file, it works without a key until the file is deleted."""
    mine = await owned(keyed, "one")
    path = f"/v1/files/{mine['file_id']}"
    url = (await keyed.http.get(f"{path}/url")).json()["url"]
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        assert (await anybody.get(url)).content == jsonl()
        await keyed.http.delete(path)
        assert (await anybody.get(url)).status_code == 404


async def test_a_job_s_error_names_its_own_files_only(here: Site) -> None:
    """Others hold the same bytes under names that are not its business, deleted or not."""
    await enter(here, "two")
    secret = await here.upload(name="acme-merger-tickets.jsonl")
    await here.http.delete(f"/v1/files/{secret}")
    await enter(here, "one")
    await here.upload(name="another.jsonl")
    file_id = await here.upload(name="mine.jsonl")
    (blob,) = (here.home / "gateway" / "files").iterdir()
    here.backend.report = ValidationReport(
        issues=(Issue(code="x", message=f"{blob} is odd", path=str(blob), line=1),)
    )
    job = await here.create(files=[file_id])
    failed = await here.until(job["id"], "FAILED_VALIDATION")
    assert failed["events"][-1]["data"]["error"] == "mine.jsonl line 1: mine.jsonl is odd"


async def test_a_failed_run_names_files_as_the_client_does(here: Site) -> None:
    """Not by the path of their bytes on the gateway's machine."""
    job_id, remote = await here.started(files=[await here.upload(name="mine.jsonl")])
    (blob,) = (here.home / "gateway" / "files").iterdir()
    here.backend.fail(remote, f"{blob} cannot be read: it is odd")
    failed = await here.until(job_id, "FAILED")
    assert failed["events"][-1]["data"]["error"] == "mine.jsonl cannot be read: it is odd"


async def test_a_dry_run_names_no_other_project_s_job(
    keyed: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend may say on which earlier run its numbers rest."""
    foreign = (await owned(keyed, "one"))["job_id"]
    estimate = keyed.backend.estimate

    async def resting_on_a_run(*args: Any) -> Any:
        found = await estimate(*args)
        notes = (f"The duration rests on run {foreign}.", "It is free.")
        return found.model_copy(update={"notes": notes})

    monkeypatch.setattr(keyed.backend, "estimate", resting_on_a_run)
    await enter(keyed, "two")
    files = [await keyed.upload()]
    body = {"model": "tiny-mistral", "hyperparameters": {}, "training_files": files}
    answer = (await keyed.http.post(f"{JOBS}?dry_run=true", json=body)).json()
    assert answer["details"] == "It is free."


async def test_a_private_file_is_rejected_instead_of_shown_to_the_project(keyed: Site) -> None:
    """The answer says what to do."""
    answer = await keyed.http.post(
        "/v1/files", files={"file": ("a.jsonl", jsonl(ROWS))}, data={"visibility": "user"}
    )
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "visibility"]
    assert "project" in answer.json()["detail"][0]["msg"]


async def test_a_model_says_which_project_it_belongs_to(keyed: Site) -> None:
    """The protocol's workspace is the project."""
    mine = await owned(keyed, "one")
    path = f"/v1/fine_tuning/models/{mine['model_id']}"
    assert (await keyed.http.patch(path, json={})).json()["workspace_id"] == "one"


def test_a_principal_without_a_project_is_of_the_default_one() -> None:
    """And sees only that."""
    assert Principal("a") == Principal("a", "default", admin=False)
