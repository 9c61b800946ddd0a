"""The console's own routes: sessions, the list of runs, live updates, data files and keys."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import sqlalchemy as sa

from tests.gateway.conftest import KEY, ROWS, Site, jsonl, site
from tests.waiting import until
from training_backends.core.status import TrainingStatus
from training_backends.gateway import console_feed, console_sessions
from training_backends.gateway.console_sessions import CSRF_HEADER, SESSION_SECONDS
from training_backends.gateway.keys import Scope
from training_backends.store.gateway_schema import audit, sessions

pytestmark = pytest.mark.anyio

SAME = {"sec-fetch-site": "same-origin"}


class Browser:
    """A client that has signed in, and sends what a browser would."""

    def __init__(self, http: httpx.AsyncClient, session: dict[str, Any], cookie: str) -> None:
        self.http = http
        self.session = session
        self.cookie = cookie
        self.headers = {
            "cookie": cookie.partition(";")[0],
            CSRF_HEADER: session["token"],
            **SAME,
        }

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send a request of the console's scripts."""
        headers = self.headers | more.pop("headers", {})
        return await self.http.request(method, path, headers=headers, **more)

    async def get(self, path: str, **query: Any) -> Any:
        """Return what a route answers."""
        answer = await self.ask("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def signed_in(here: Site, key: str = KEY) -> AsyncIterator[Browser]:
    """Sign in with a key."""
    async with httpx.AsyncClient(base_url=here.served.url, timeout=30, verify=False) as http:
        answer = await http.post("/console/session", json={"key": key}, headers=SAME)
        assert answer.status_code == 200, answer.text
        cookie = answer.headers["set-cookie"]
        http.cookies.clear()
        yield Browser(http, answer.json(), cookie)


async def new_key(here: Site, scope: Scope = "write", project: str = "default") -> str:
    """Create a key."""
    keys = here.served.gateway.keys
    made = await anyio.to_thread.run_sync(lambda: keys.create("k", scope=scope, project=project))
    return made.key.get_secret_value()


@pytest.fixture
async def browser(here: Site) -> AsyncIterator[Browser]:
    """Sign in with the static key."""
    async with signed_in(here) as found:
        yield found


@pytest.fixture(scope="module")
async def visitor(shared: Site) -> AsyncIterator[Browser]:
    """Sign in to the gateway that several tests ask."""
    async with signed_in(shared) as found:
        yield found


# -- sessions --------------------------------------------------------------------------


async def test_the_cookie_cannot_be_read_or_sent_by_other_sites(shared: Site) -> None:
    """HttpOnly and SameSite=Strict; each port has a cookie of its own; the key is not in it."""
    async with signed_in(shared) as browser:
        name, *flags = browser.cookie.split("; ")
        port = shared.served.url.rpartition(":")[2]
        assert name.startswith(f"tb-session-{port}=")
        assert set(flags) == {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_SECONDS}"}
        assert KEY not in browser.cookie + json.dumps(browser.session)


async def test_the_cookie_is_secure_behind_https(tmp_path: Path) -> None:
    """`__Host-` makes browsers insist on it."""
    async with (
        site(tmp_path, public_url="https://ft.example.org/ft") as here,
        signed_in(here) as browser,
    ):
        assert browser.cookie.startswith("__Host-tb-session-443=")
        assert browser.cookie.endswith("; Secure")
        headers = {**browser.headers, "origin": "https://ft.example.org"}
        del headers["sec-fetch-site"]
        answer = await browser.http.post("/v1/fine_tuning/jobs", json={}, headers=headers)
        assert answer.status_code == 422


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("POST", {CSRF_HEADER: ""}),
        ("POST", {CSRF_HEADER: "0" * 64}),
        ("POST", {"sec-fetch-site": "cross-site"}),
        ("POST", {"sec-fetch-site": "same-site"}),
        ("POST", {"sec-fetch-site": "none"}),
        ("POST", {"sec-fetch-site": "", "origin": "https://evil.example"}),
        ("GET", {"sec-fetch-site": "cross-site"}),
        ("GET", {"sec-fetch-site": "same-site"}),
    ],
)
async def test_a_request_of_another_site_is_rejected(
    visitor: Browser, method: str, changes: dict[str, str]
) -> None:
    """Although the browser might send the cookie with it."""
    headers = {name: value for name, value in (visitor.headers | changes).items() if value}
    answer = await visitor.http.request(method, "/v1/fine_tuning/jobs", json={}, headers=headers)
    assert answer.status_code == 403


async def test_signing_in_from_another_site_is_rejected(shared: Site) -> None:
    """It would put the user into the session of somebody else."""
    headers = {"sec-fetch-site": "cross-site", "authorization": ""}
    answer = await shared.http.post("/console/session", json={"key": KEY}, headers=headers)
    assert answer.status_code == 403


@pytest.mark.parametrize("key", ["wrong", "tb-00000000-" + "a" * 43, " "])
async def test_a_wrong_key_does_not_sign_in(shared: Site, key: str) -> None:
    """The answer is that of the API, without a cookie."""
    answer = await shared.http.post("/console/session", json={"key": key}, headers=SAME)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Unauthorized"})
    assert "set-cookie" not in answer.headers


async def test_a_session_is_the_key(shared: Site) -> None:
    """It sees the key's project, ends when the key is revoked, and a read-only one only reads."""
    key = await new_key(shared, "read", "support")
    async with signed_in(shared, key) as browser:
        assert browser.session["key"]["scope"] == "read"
        assert browser.session["key"]["project"] == "support"
        assert (await browser.get("/v1/files"))["data"] == []
        assert (await browser.ask("POST", "/v1/files")).status_code == 403
        assert (await browser.ask("GET", "/console/keys")).status_code == 403
        await anyio.to_thread.run_sync(shared.served.gateway.keys.revoke, key.split("-")[1])
        assert (await browser.ask("GET", "/v1/files")).status_code == 401
        assert await browser.get("/console/session") is None


async def test_signing_out_ends_the_session(shared: Site) -> None:
    """Also for a copy of the cookie, and with a key that only reads."""
    async with signed_in(shared, await new_key(shared, "read")) as browser:
        answer = await browser.ask("DELETE", "/console/session")
        assert answer.status_code == 204
        assert "Max-Age=0" in answer.headers["set-cookie"]
        assert (await browser.ask("GET", "/console/runs")).status_code == 401


async def test_a_session_survives_a_restart_and_ends_with_another_static_key(
    tmp_path: Path,
) -> None:
    """It is stored in the database, without the token or the key."""
    async with site(tmp_path) as here, signed_in(here) as browser:
        headers = browser.headers
    token = headers["cookie"].partition("=")[2]
    port = int(here.served.url.rpartition(":")[2])
    database = (tmp_path / "gateway" / "runs.db").read_bytes()
    assert token.encode() not in database
    assert KEY.encode() not in database
    for key, status in ((KEY, 200), ("another-static-key-x", 401)):
        async with (
            site(tmp_path, public_url=f"http://127.0.0.1:{port}", api_key=key) as again,
            httpx.AsyncClient(base_url=again.served.url, verify=False) as http,
        ):
            assert (await http.get("/console/runs", headers=headers)).status_code == status


async def test_an_expired_session_is_removed_at_the_next_sign_in(
    here: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cookie alone does not keep it alive."""
    async with signed_in(here) as browser:
        later = SimpleNamespace(time=lambda: time.time() + SESSION_SECONDS + 1)
        monkeypatch.setattr(console_sessions, "time", later)
        assert (await browser.ask("GET", "/console/runs")).status_code == 401
        assert await browser.get("/console/session") is None
        async with signed_in(here):
            count = sa.select(sa.func.count()).select_from(sessions)
            assert await here.served.gateway.store.aread(lambda c: c.execute(count).scalar()) == 1


# -- files of the page -----------------------------------------------------------------


async def test_the_page_is_strict(shared: Site) -> None:
    """Only scripts and styles of this gateway, nothing inline, in no frame; no key is needed."""
    answer = await shared.http.get("/", headers={"authorization": ""})
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "://" not in answer.text
    assert not {" style=", "<style", "onclick"} & set(answer.text.split())


async def test_assets_are_cached_until_they_change(shared: Site) -> None:
    """Their address has a digest of the content; paths outside are 404."""
    text = (await shared.http.get("/")).text
    base = text.partition('href="')[2].partition("icon.svg")[0]
    script = await shared.http.get(f"/{base}app.js", headers={"authorization": ""})
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["content-encoding"] == "gzip"
    assert "immutable" in script.headers["cache-control"]
    stale = await shared.http.get("/console/assets/0/app.js")
    assert (stale.text, stale.headers["cache-control"]) == (script.text, "no-cache")
    for path in ("nothing.js", "../routes.py", "%2e%2e/routes.py", ""):
        assert (await shared.http.get(f"/{base}{path}")).status_code == 404


async def test_the_console_can_be_switched_off(tmp_path: Path) -> None:
    """With it go its routes."""
    async with site(tmp_path, console=False) as here:
        assert (await here.http.get("/")).status_code == 404
        assert (await here.http.get("/console/runs")).status_code == 404


# -- runs ------------------------------------------------------------------------------


async def test_runs_are_listed_page_by_page(here: Site, browser: Browser) -> None:
    """Newest first, without repeats; the first page has the total."""
    files = [await here.upload()]
    made = [
        (await here.create(files=files, suffix=f"run-{n}", auto_start=False))["id"]
        for n in range(5)
    ]
    seen: list[str] = []
    after: dict[str, str] = {}
    totals = []
    while True:
        found = await browser.get("/console/runs", limit=2, **after)
        seen += [run["id"] for run in found["data"]]
        totals.append(found.get("total"))
        if not found["has_more"]:
            break
        after = {"after": seen[-1]}
    assert seen == made[::-1]
    assert totals == [5, None, None]


async def test_runs_are_filtered(here: Site, browser: Browser) -> None:
    """By status, also paused, and by text in name, model or id."""
    running, one = await here.started(suffix="alpha")
    paused, two = await here.started(suffix="beta_x")
    here.backend.measure(one, 3, train_loss=1.5)
    here.backend.say(one, TrainingStatus.RUNNING, step=3, total_steps=10, metrics={"train_loss": 2})
    here.backend.say(two, TrainingStatus.PAUSED)
    await here.until(running, "RUNNING")
    await here.until(paused, "RUNNING")

    async def ids(**query: str) -> set[str]:
        return {run["id"] for run in (await browser.get("/console/runs", **query))["data"]}

    await until(lambda: ids(status="paused"), {paused}.__eq__)
    assert await ids(status="running") == {running}
    assert await ids(status="running,paused") == {running, paused}
    assert await ids(status="finished") == set()
    assert await ids(text="ALPHA") == {running}
    assert await ids(text="beta_X") == {paused}
    assert await ids(text="betaX") == set()
    assert await ids(text=paused[:8]) == {paused}
    (shown,) = (await browser.get("/console/runs", text="alpha"))["data"]
    wanted = {"status": "running", "step": 3, "total_steps": 10, "train_loss": 2, "name": "alpha"}
    assert wanted.items() <= shown.items()
    assert (await browser.ask("GET", "/console/runs?status=odd")).status_code == 422


async def test_a_queued_run_shows_its_position(
    here: Site, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the backend reports it."""
    adopt = here.backend.adopt

    def enqueue(remote_id: str) -> None:
        adopt(remote_id)
        here.backend.say(remote_id, TrainingStatus.PENDING, raw_status="queued, position 3")

    monkeypatch.setattr(here.backend, "adopt", enqueue)
    job_id, _ = await here.started()
    found = await until(
        lambda: browser.get(f"/console/runs/{job_id}"), lambda run: run["queue_position"]
    )
    assert (found["status"], found["queue_position"]) == ("pending", 3)


async def test_a_failed_run_says_why_and_what_to_do(shared: Site, visitor: Browser) -> None:
    """The hint depends on the kind of the failure."""
    job_id, remote_id = await shared.started()
    shared.backend.fail(remote_id, "CUDA out of memory")
    await shared.until(job_id, "FAILED")
    failure = (await visitor.get(f"/console/runs/{job_id}"))["failure"]
    assert (failure["kind"], failure["message"]) == ("internal", "CUDA out of memory")
    assert "log" in failure["hint"]


async def test_metrics_of_a_long_run_are_averaged(
    shared: Site, visitor: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a chart costs the same, however long the run."""
    monkeypatch.setattr("training_backends.gateway.console_runs.MOST_POINTS", 10)
    job_id, remote_id = await shared.started()
    for step in range(1, 101):
        shared.backend.measure(remote_id, step, train_loss=float(step))
    shared.backend.finish(remote_id)
    await shared.until(job_id, "SUCCESS")
    found = await visitor.get(f"/console/runs/{job_id}/metrics")
    steps, values = found["series"]["train_loss"]
    assert found["steps_per_point"] == 10
    assert (steps[0], values[0]) == (9, 5.0)
    assert (steps[1], values[1]) == (19, 14.5)
    assert len(steps) == 11


async def test_the_log_names_files_instead_of_paths(shared: Site, visitor: Browser) -> None:
    """Directories of the gateway's machine are not its clients' business."""
    job_id, remote_id = await shared.started()
    file_id = (await shared.get(job_id))["training_files"][0]
    gateway = shared.served.gateway
    async with signed_in(shared) as again:
        path = (await gateway.files.stored(file_id, await _principal(again, shared))).source
    shared.backend.log(remote_id, f"reading {path} and {shared.home}/gateway/tmp")
    shared.backend.finish(remote_id)
    await shared.until(job_id, "SUCCESS")
    log = await visitor.get(f"/console/runs/{job_id}/log")
    assert "reading train.jsonl and …/tmp" in [record["message"] for record in log]
    last = await visitor.get(f"/console/runs/{job_id}/log", before=log[-1]["seq"], limit=1)
    assert last == log[-2:-1]


async def _principal(browser: Browser, here: Site) -> Any:
    token = browser.headers["cookie"].partition("=")[2]
    sessions = here.served.gateway.sessions
    return await anyio.to_thread.run_sync(lambda: sessions.admit(token, writes=False))


async def test_another_projects_objects_do_not_exist(shared: Site) -> None:
    """For every route that takes an id, the answer is that of an unknown one."""
    job = await shared.finished()
    file_id = job["training_files"][0]
    async with signed_in(shared, await new_key(shared, project="other")) as browser:
        assert (await browser.get("/console/runs")) == {
            "data": [],
            "has_more": False,
            "total": 0,
            "at": pytest.approx(job["created_at"], abs=300),
        }
        for path in (
            f"/console/runs/{job['id']}",
            f"/console/runs/{job['id']}/metrics",
            f"/console/runs/{job['id']}/log",
            f"/console/stream?run={job['id']}",
            f"/console/files/{file_id}/inspection",
            f"/console/files/{file_id}/preview?model=tiny-mistral",
        ):
            assert (await browser.ask("GET", path)).status_code == 404, path


# -- live updates ----------------------------------------------------------------------


class Stream:
    """The events of a page, as they arrive."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.cursor = ""

    async def next(self) -> tuple[str, Any]:
        """Return name and data of the next event."""
        found: dict[str, str] = {}
        async for line in self._lines:
            if not line and found:
                self.cursor = found["id"]
                return found["event"], json.loads(found["data"])
            name, _, value = line.partition(": ")
            if name:
                found[name] = value
        return "end", None

    async def until(self, name: str) -> Any:
        """Return the data of the next event of this name."""
        with anyio.fail_after(30):
            while True:
                found, data = await self.next()
                if found == name:
                    return data
                assert found != "end"


@asynccontextmanager
async def streaming(browser: Browser, cursor: str, *runs: str) -> AsyncIterator[Stream]:
    """Open the stream of a page."""
    headers = {**browser.headers, "last-event-id": cursor}
    params = {"run": list(runs)}
    async with browser.http.stream(
        "GET", "/console/stream", headers=headers, params=params, timeout=30
    ) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than once a second."""
    monkeypatch.setattr(console_feed, "LOOK_EVERY", 0.02)


@pytest.mark.usefixtures("quick")
async def test_a_page_hears_of_its_projects_runs(here: Site, browser: Browser) -> None:
    """Changes and log records, once; after a reconnect only what is new."""
    job_id, remote_id = await here.started(suffix="mine")
    state = await browser.get(f"/console/runs/{job_id}")
    here.backend.measure(remote_id, 1, train_loss=2.0)
    async with (
        signed_in(here, await new_key(here, project="other")) as foreign,
        streaming(foreign, str(state["at"])) as theirs,
        streaming(browser, f"{state['at']};{job_id}={state['cursor']}", job_id) as stream,
    ):
        assert await theirs.until("runs") == []
        log = await stream.until("log")
        while log["records"][-1]["step"] is None:  # the status came first
            log = await stream.until("log")
        assert (log["run"], log["records"][-1]["metrics"]) == (job_id, {"train_loss": 2.0})
        before = stream.cursor
    here.backend.measure(remote_id, 2, train_loss=1.0)
    here.backend.finish(remote_id)
    await here.until(job_id, "SUCCESS")
    async with streaming(browser, before, job_id) as stream:
        (run,) = await stream.until("runs")
        assert (run["id"], run["status"], run["name"]) == (job_id, "completed", "mine")
        log = await stream.until("log")
        assert log["records"][0]["step"] == 2
        created = await here.create(suffix="next", auto_start=False)
        assert created["id"] in {each["id"] for each in await stream.until("runs")}


async def test_a_page_that_missed_much_loads_its_list_again(visitor: Browser) -> None:
    """Instead of a stream of everything."""
    async with streaming(visitor, "0") as stream:
        assert await stream.next() == ("reload", {})


@pytest.mark.usefixtures("quick")
async def test_nobody_looking_costs_nothing(here: Site, browser: Browser) -> None:
    """The database is read only while a page is open."""
    feed = here.served.gateway.feed
    async with streaming(browser, "0") as stream:
        await stream.next()
        assert len(feed._pages) == 1
    await until(lambda: not feed._pages)


async def test_open_pages_are_limited(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more gets 503 and comes back later."""
    monkeypatch.setattr(console_feed, "MOST_STREAMS", 1)
    async with streaming(browser, "0") as stream:
        await stream.next()
        answer = await browser.ask("GET", "/console/stream")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


@pytest.mark.usefixtures("quick")
async def test_a_revoked_key_ends_the_stream(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon, and the page asks for another key."""
    monkeypatch.setattr(console_feed, "_ALIVE_EVERY", 0.02)
    key = await new_key(here)
    async with signed_in(here, key) as browser, streaming(browser, "0") as stream:
        await stream.next()
        await anyio.to_thread.run_sync(here.served.gateway.keys.revoke, key.split("-")[1])
        assert await stream.until("signed-out") == {}


async def test_a_shutdown_does_not_wait_for_open_pages(here: Site, browser: Browser) -> None:
    """Their streams end, and the pages connect to the next gateway."""
    async with streaming(browser, "0") as stream:
        await stream.next()
        here.served.gateway.feed.close()
        with anyio.fail_after(10):
            while (await stream.next())[0] != "end":
                pass


@pytest.mark.parametrize(
    "cursor", ["x", "1;a=b", "-1", "nan", "1;a=-1", "1;a=99999999999999999999"]
)
async def test_an_invalid_cursor_is_422(visitor: Browser, cursor: str) -> None:
    """It is a value that only the gateway makes."""
    answer = await visitor.ask("GET", "/console/stream", headers={"last-event-id": cursor})
    assert answer.status_code == 422


# -- data and keys ---------------------------------------------------------------------


async def test_a_file_is_inspected(shared: Site, visitor: Browser) -> None:
    """By the rules of the backend, with line, problem and fix of each issue."""
    rows: list[object] = [*ROWS, ROWS[0]]
    file_id = await shared.upload(jsonl(rows))
    found = await visitor.get(f"/console/files/{file_id}/inspection")
    assert (found["rows"], found["errors"], found["sample_type"]) == (9, 0, "instruct")
    (issue,) = found["issues"]
    assert (issue["line"], issue["severity"]) == (9, "warning")
    assert str(shared.home) not in json.dumps(found)


async def test_a_preview_marks_what_is_trained_on(shared: Site, visitor: Browser) -> None:
    """The assistant's text, not the question."""
    file_id = await shared.upload()
    path = f"/console/files/{file_id}/preview"
    first, second = await visitor.get(path, model="tiny-mistral", rows=2)
    trained = "".join(part["text"] for part in first["segments"] if part["trained"])
    assert "It is 0." in trained
    assert "What is" not in trained
    assert first["trained_tokens"] < first["tokens"]
    assert second["line"] == 2
    assert (await visitor.ask("GET", path, params={"model": "gpt-9"})).status_code == 404


async def test_keys_are_managed_by_an_admin(here: Site, browser: Browser) -> None:
    """A new one is shown once; a revoked one no longer works."""
    given = {"name": "ci", "scope": "write", "project": "support", "expires": "30d"}
    made = (await browser.ask("POST", "/console/keys", json=given)).json()
    (listed,) = await browser.get("/console/keys")
    assert made == listed | {"key": made["key"]}
    async with signed_in(here, made["key"]) as theirs:
        assert (await theirs.ask("POST", "/console/keys", json=given)).status_code == 403
        revoked = await browser.ask("DELETE", f"/console/keys/{made['id']}")
        assert revoked.json()["state"] == "revoked"
        assert (await theirs.ask("GET", "/v1/files")).status_code == 401
    assert (await browser.ask("DELETE", "/console/keys/00000000")).status_code == 404
    for wrong in ({"project": "No!"}, {"expires": "banana"}, {"scope": "root"}):
        answer = await browser.ask("POST", "/console/keys", json=given | wrong)
        assert answer.status_code == 422
        assert "--" not in answer.text


async def test_signing_in_is_in_the_audit_log(here: Site, browser: Browser) -> None:
    """With the address that it came from."""
    query = sa.select(audit.c.actor, audit.c.address).where(audit.c.action == "session.open")
    rows = await here.served.gateway.store.aread(lambda c: c.execute(query).all())
    assert [tuple(row) for row in rows] == [(browser.session["key"]["id"], "127.0.0.1")]


async def test_the_audit_log_names_who_changed_a_key(here: Site) -> None:
    """The key of the session, not the machine."""
    async with signed_in(here, await new_key(here, "admin")) as browser:
        made = (await browser.ask("POST", "/console/keys", json={"name": "ci"})).json()
        await browser.ask("DELETE", f"/console/keys/{made['id']}")
        query = sa.select(audit.c.action, audit.c.actor).where(audit.c.target == made["id"])
        rows = await here.served.gateway.store.aread(lambda c: c.execute(query).all())
        actor = browser.session["key"]["id"]
        assert [tuple(row) for row in rows] == [("key.create", actor), ("key.revoke", actor)]


async def test_models_to_train_are_offered_with_their_methods(visitor: Browser) -> None:
    """As far as the backend has the method."""
    found = {model["id"]: model["methods"] for model in await visitor.get("/console/models")}
    assert found["tiny-mistral"] == ["sft"]
