"""What an operator sees of a gateway: health, readiness, metrics, access log, its end."""

import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio import to_thread
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.gateway.conftest import KEY, NO_CERTIFICATES, Site, jsonl, site
from tests.waiting import until
from training_backends.core.backend import Health
from training_backends.core.errors import BackendUnavailable
from training_backends.gateway import metrics, readiness
from training_backends.store.gateway_schema import jobs
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-the-scraper"
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(autouse=True)
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is answered afresh."""
    for module, name in (
        (readiness, "READY_SECONDS"),
        (readiness, "BACKEND_SECONDS"),
        (metrics, "JOBS_EVERY"),
        (metrics, "BYTES_EVERY"),
    ):
        monkeypatch.setattr(module, name, 0.0)


# -- health ------------------------------------------------------------------------------------


async def ready(here: Site) -> tuple[int, str, dict[str, str]]:
    """Ask without a key."""
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        answer = await anybody.get(f"{here.served.url}/readyz")
    assert here.home.name not in answer.text
    body = answer.json()
    return answer.status_code, body["status"], body["checks"]


async def test_a_gateway_is_ready_when_all_of_its_parts_are(here: Site) -> None:
    """Both answers need no key."""
    assert await ready(here) == (200, "ready", dict.fromkeys(("store", "files", "backend"), "ok"))
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        assert (await anybody.get(f"{here.served.url}/healthz")).json() == {"status": "ok"}


async def test_readiness_names_the_part_that_fails(
    here: Site, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    """The reason, which may hold an address or a path, is in the log; the process is alive."""

    async def unreachable(_: ScriptedBackend) -> Health:
        raise BackendUnavailable("no answer from 10.9.8.7")

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedBackend, "health", unreachable)
        status, word, checks = await ready(here)
    assert (status, word, checks["backend"], checks["store"]) == (
        503,
        "unavailable",
        "unavailable",
        "ok",
    )
    assert "10.9.8.7" in str([entry for entry in logs if entry["event"] == "not ready"])
    assert (await ready(here))[0] == 200
    files = here.home / "gateway" / "files"
    files.rename(files.with_name("elsewhere"))
    assert (await ready(here))[2] == {"store": "ok", "files": "unavailable", "backend": "ok"}
    assert (await here.http.get("/healthz")).status_code == 200


async def test_readiness_does_not_wait_for_a_part_that_hangs(
    here: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has failed, and the others have not; the thread ends once it can."""
    monkeypatch.setattr(readiness, "PATIENCE", 0.2)
    release = threading.Event()
    monkeypatch.setattr(type(here.served.gateway.files), "check", lambda _: release.wait(30))
    try:
        assert (await ready(here))[2] == {"store": "ok", "files": "unavailable", "backend": "ok"}
    finally:
        release.set()


# -- metrics -----------------------------------------------------------------------------------


async def scrape(here: Site, token: str = KEY) -> dict[tuple[str, frozenset[str]], float]:
    """Return the value of each sample by its name and the values of its labels."""
    headers = {"authorization": f"Bearer {token}"}
    answer = await here.http.get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("training_backends_"), frozenset(sample.labels.values())): (
            sample.value
        )
        for family in parse(answer.text)
        for sample in family.samples
    }


async def test_requests_are_counted_by_route_and_code(here: Site) -> None:
    """Under the template of the route, whatever ids and unknown paths are asked for."""
    file_id = await here.upload()
    for path in (f"/v1/files/{file_id}", "/v1/files/x", "/no/such", "/v1/nothing"):
        await here.http.get(path)
    await here.http.request("PROPFIND", "/v1/models")
    found = await scrape(here)
    requests = {key[1]: value for key, value in found.items() if key[0] == "http_requests_total"}
    assert requests == {
        frozenset({"POST", "/v1/files", "200"}): 1,
        frozenset({"GET", "/v1/files/{file_id}", "200"}): 1,
        frozenset({"GET", "/v1/files/{file_id}", "422"}): 1,
        frozenset({"GET", "unknown", "404"}): 2,
        frozenset({"other", "/v1/models", "405"}): 1,
    }
    seconds = ("http_request_duration_seconds_count", frozenset({"POST", "/v1/files"}))
    assert found[seconds] == 1
    assert found["http_received_bytes_total", frozenset({"/v1/files"})] > len(jsonl())
    assert found["http_sent_bytes_total", frozenset({"/v1/files"})] > 100


async def test_jobs_bytes_and_speed_are_read_from_the_database(here: Site) -> None:
    """All unfinished statuses are there from the beginning; no job and no project is named."""
    fresh = await scrape(here)
    assert fresh["jobs", frozenset({"RUNNING"})] == 0
    assert fresh["job_queue_age_seconds", frozenset()] == 0
    file_id = await here.upload()
    job_id, remote = await here.started(files=[file_id], suffix="mine")
    await here.until(job_id, "RUNNING")
    for step, speed in ((1, 10.0), (2, 250.0)):
        here.backend.measure(remote, step, train_loss=1.0, tokens_per_second=speed)
    here.backend.gate = anyio.Event()
    waiting = await here.create(files=[file_id])
    await here.until(waiting["id"], "VALIDATING")
    age = jobs.update().where(jobs.c.id == waiting["id"])
    write = here.served.gateway.store.awrite
    await write(lambda c: c.execute(age.values(created_at=1.0)))

    async def figures() -> Mapping[Any, float]:
        return await scrape(here)

    fastest = ("trainer_tokens_per_second", frozenset[str]())
    found = await until(figures, lambda found: found[fastest] == 250)
    assert found["jobs", frozenset({"RUNNING"})] == 1
    assert found["jobs", frozenset({"VALIDATING"})] == 1
    assert found["job_queue_age_seconds", frozenset()] > 1e9
    assert found["stored_bytes", frozenset()] == len(jsonl())
    assert found["lease_moves_total", frozenset()] >= 0
    text = (await here.http.get("/metrics")).text
    here.backend.gate.set()
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}|default|mine|train\.jsonl", text)


async def test_openmetrics_is_spoken_to_who_asks_for_it(here: Site) -> None:
    """As Prometheus does."""
    headers = {"accept": "application/openmetrics-text;version=1.0.0"}
    answer = await here.http.get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


async def test_metrics_are_not_for_everybody(tmp_path: Path) -> None:
    """For the token of the settings, which opens nothing else, and for keys of scope admin."""
    async with site(tmp_path, metrics_token=TOKEN) as here:
        keys = here.served.gateway.keys
        made = await to_thread.run_sync(lambda: keys.create(project="p"))
        codes = {}
        for name, token in {
            "token": TOKEN,
            "admin": KEY,
            "write": made.key.get_secret_value(),
            "nobody": "x",
        }.items():
            headers = {"authorization": f"Bearer {token}"}
            answers = [await here.http.get(path, headers=headers) for path in ("/metrics", JOBS)]
            codes[name] = tuple(answer.status_code for answer in answers)
        assert codes == {
            "token": (200, 401),
            "admin": (200, 200),
            "write": (403, 200),
            "nobody": (401, 401),
        }
    async with site(tmp_path) as here, httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        assert (await anybody.get(f"{here.served.url}/metrics")).status_code == 401


# -- access log --------------------------------------------------------------------------------


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[Any]]:
    """Return the lines that were written to standard error."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


async def test_the_access_log_has_a_line_for_each_request(tmp_path: Path, lines: Any) -> None:
    """With its route, key and project, and without its query, which may be a signature."""
    async with site(tmp_path, access_log=True) as here:
        file_id = await here.upload()
        url = (await here.http.get(f"/v1/files/{file_id}/url")).json()["url"]
        async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
            content = await anybody.get(url)
            await anybody.get(f"{here.served.url}/v1/models?api_key=hidden")
    found = lines()
    assert len(found) == 4
    upload, linked, rejected = (
        next(line for line in found if line[name] == value)
        for name, value in (("method", "POST"), ("route", "/files/{file_id}"), ("status", 401))
    )
    assert upload.pop("timestamp").endswith("Z")
    assert 0 < upload.pop("seconds") < 60
    assert upload.pop("received") > len(jsonl())
    assert upload.pop("sent") > 100
    assert re.fullmatch("[0-9a-f-]{36}", upload.pop("request_id"))
    assert upload == {
        "event": "request",
        "method": "POST",
        "route": "/v1/files",
        "path": "/v1/files",
        "status": 200,
        "key_id": "static",
        "project": "default",
        "address": "127.0.0.1",
    }
    assert (linked["route"], linked["sent"]) == ("/files/{file_id}", len(content.content))
    assert (rejected["status"], rejected["key_id"]) == (401, None)
    signature = url.partition("signature=")[2]
    assert signature not in str([linked, rejected])
    assert "hidden" not in str(rejected)


async def test_without_the_setting_requests_are_only_in_the_log(here: Site, lines: Any) -> None:
    """Which shows them at level info."""
    await here.http.get("/v1/models")
    assert lines() == []


# -- the end -----------------------------------------------------------------------------------


async def test_an_upload_in_progress_is_finished_at_the_end(tmp_path: Path) -> None:
    """Within `shutdown_timeout`; meanwhile /readyz sends clients elsewhere."""
    sent, stopping = anyio.Event(), anyio.Event()
    answers: list[httpx.Response] = []
    content = jsonl()
    head = (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n',
        content[:200],
    )

    async def body() -> Any:
        for part in head:
            yield part
        sent.set()
        await stopping.wait()
        yield content[200:] + b"\r\n--x--\r\n"

    async with anyio.create_task_group() as tasks, site(tmp_path, shutdown_delay=0.5) as here:
        url = here.served.url

        async def upload() -> None:
            async with httpx.AsyncClient(base_url=url, verify=NO_CERTIFICATES) as http:
                headers = {
                    "authorization": f"Bearer {KEY}",
                    "content-type": "multipart/form-data; boundary=x",
                }
                answers.append(await http.post("/v1/files", content=body(), headers=headers))

        async def watch() -> None:
            async with httpx.AsyncClient(base_url=url, verify=NO_CERTIFICATES) as http:

                async def state() -> str:
                    return str((await http.get("/readyz")).json()["status"])

                await until(state, lambda word: word == "stopping")
                stopping.set()

        tasks.start_soon(upload)
        await sent.wait()
        tasks.start_soon(watch)
    assert [answer.status_code for answer in answers] == [200]
    async with site(tmp_path) as here:
        listed = (await here.http.get("/v1/files")).json()["data"]
        assert [entry["bytes"] for entry in listed] == [len(content)]
