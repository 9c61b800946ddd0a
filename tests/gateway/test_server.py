"""The server itself: where it listens, and how it answers what is no request of the API."""

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr, ValidationError

from tests.gateway.conftest import KEY, NO_CERTIFICATES, Site, scripted, site
from tests.waiting import until
from training_backends.core.errors import ConfigError, DuplicateRun, StoreError
from training_backends.gateway import app
from training_backends.gateway.gateway import Gateway, load_secret
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings

pytestmark = pytest.mark.anyio


async def test_the_default_is_loopback(shared: Site) -> None:
    """Nobody else can reach a gateway that was not told to be reachable."""
    assert shared.served.url.startswith("http://127.0.0.1:")
    assert shared.served.api_key is not None


async def test_a_port_that_is_taken_is_told_with_what_to_do(tmp_path: Path) -> None:
    """Before anything is opened."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"Port {port} on 127.0.0.1 is already in use"
        ) as raised:
            async with running(GatewaySettings(), home=tmp_path, backend="local", port=port):
                pass
    assert "--port" in str(raised.value.hint)
    assert not (tmp_path / "gateway").exists()


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
async def test_an_address_that_is_not_ours_is_told(tmp_path: Path, host: str) -> None:
    """Both a name that nobody knows and another machine's address."""
    with pytest.raises(ConfigError, match=host):
        async with running(GatewaySettings(), home=tmp_path, backend="local", host=host, port=0):
            pass


async def test_two_gateways_cannot_share_a_home(shared: Site) -> None:
    """The second says so instead of running every job twice."""
    with pytest.raises(DuplicateRun, match="Another gateway"):
        async with site(shared.home):
            pass


async def test_a_backend_that_is_not_installed_is_told(tmp_path: Path) -> None:
    """And the home is free again afterwards."""
    with pytest.raises(ConfigError, match="no backend named"):
        async with running(GatewaySettings(), home=tmp_path, backend="none", port=0):
            pass
    async with site(tmp_path):
        pass


async def test_an_error_of_the_block_arrives_as_it_is(tmp_path: Path) -> None:
    """Whoever serves within a block can catch what the block raises."""
    with pytest.raises(ConfigError, match="mine"):
        async with site(tmp_path):
            raise ConfigError("mine")


async def test_a_gateway_that_was_cancelled_leaves_room_for_another(tmp_path: Path) -> None:
    """In the same event loop, whose next socket has the number of the closed one."""
    for name in ("first", "second"):
        with anyio.CancelScope() as scope:
            async with site(tmp_path / name) as opened:
                answer = await opened.http.get("/health", timeout=5)
                assert answer.status_code == 200
                scope.cancel()


async def test_what_is_not_there_is_answered_in_json(shared: Site) -> None:
    """Unknown paths and methods too, each with an id to ask about."""
    answer = await shared.http.get("/v1/nothing")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert answer.headers["x-request-id"]
    answer = await shared.http.get("/elsewhere")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    answer = await shared.http.put("/v1/models")
    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})


async def test_a_bug_is_answered_with_an_id_and_no_trace(
    shared: Site, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has the trace under the same id."""

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("inner detail")

    monkeypatch.setattr(shared.served.gateway.models, "pages", bug)
    answer = await shared.http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "inner detail" not in answer.text
    assert any(entry.get("exc_info") for entry in logs)
    assert (await shared.http.get("/health")).status_code == 200


async def test_trouble_with_the_store_is_no_client_s_fault(
    shared: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, and nothing of where things lie."""

    def trouble(*_: object, **__: object) -> None:
        raise StoreError(f"{shared.home} is read-only")

    monkeypatch.setattr(shared.served.gateway.models, "pages", trouble)
    answer = await shared.http.get("/v1/models")
    assert answer.status_code == 503
    assert str(shared.home) not in answer.text
    assert answer.json()["request_id"]


@pytest.mark.parametrize(
    "query", ["page=-1", "page_size=0", "page=x", "status=DONE", "created_after=soon"]
)
async def test_bad_query_parameters_are_named(shared: Site, query: str) -> None:
    """In the service's list of details."""
    answer = await shared.http.get(f"/v1/fine_tuning/jobs?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.split("=", maxsplit=1)[0]]


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}'])
async def test_a_body_that_is_no_job_is_refused(shared: Site, body: bytes) -> None:
    """As a client's mistake, never as ours."""
    headers = {"content-type": "application/json"}
    answer = await shared.http.post("/v1/fine_tuning/jobs", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


async def test_text_that_is_no_unicode_is_refused_by_its_place(shared: Site) -> None:
    """JSON can write half a surrogate pair; neither the database nor an answer can hold it."""
    job = await shared.finished()
    headers = {"content-type": "application/json"}
    body = b'{"name": "\\ud800"}'
    path = f"/v1/fine_tuning/models/{job['fine_tuned_model']}"
    answer = await shared.http.patch(path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "name"])


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_without_end_is_not_held_in_memory(shared: Site, declared: bool) -> None:
    """Declared or not, a request that is no upload has a bound."""
    body = json.dumps({"model": "m" * shared.served.gateway.settings.max_request_bytes}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    headers = {"content-type": "application/json"}
    content = body if declared else chunks()
    answer = await shared.http.post("/v1/fine_tuning/jobs", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["detail"]


async def test_a_request_under_way_is_answered_before_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing is clean: no client sees its connection torn."""
    backend = scripted()
    release, begun = anyio.Event(), anyio.Event()
    codes: list[int] = []
    async with anyio.create_task_group() as tasks, site(tmp_path, backend) as here:
        retrieve = here.served.gateway.models.retrieve

        async def slow(*args: Any) -> Any:
            begun.set()
            await release.wait()
            return await retrieve(*args)

        monkeypatch.setattr(here.served.gateway.models, "retrieve", slow)

        async def ask() -> None:
            async with httpx.AsyncClient(verify=NO_CERTIFICATES) as http:
                answer = await http.get(
                    f"{here.served.url}/v1/models/tiny-mistral",
                    headers={"authorization": f"Bearer {KEY}"},
                )
                codes.append(answer.status_code)

        tasks.start_soon(ask)
        await begun.wait()
        tasks.start_soon(_once_closed, here.served.url, release)
    assert codes == [200]


async def test_an_upload_under_way_at_the_end_is_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be sent again later, and is no error of the server's."""
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: multipart/form-data; boundary=x\r\ncontent-length: 5000000\r\n\r\n"
    )
    incoming = tmp_path / "gateway" / "incoming"
    async with site(tmp_path, shutdown_timeout=0.1) as here:
        host, port = here.served.url.removeprefix("http://").split(":")
        stream = await anyio.connect_tcp(host, int(port))
        await stream.send(head.encode())
        await until(lambda: list(incoming.iterdir()))
    async with stream:
        answer = await stream.receive()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"shutting down" in answer
    assert list(incoming.iterdir()) == []
    assert "Exception in ASGI application" not in caplog.text


@pytest.mark.parametrize("path", ["/openapi.json", "/v1/models", "/elsewhere"])
async def test_all_but_health_and_links_need_a_key(shared: Site, path: str) -> None:
    """Whether or not there is something."""
    async with httpx.AsyncClient(base_url=shared.served.url, verify=NO_CERTIFICATES) as http:
        assert (await http.get(path)).status_code == 401
        assert (await http.get("/health")).status_code == 200
    assert (await shared.http.get("/openapi.json")).status_code == 200


async def test_health_says_when_a_database_cannot_be_used(
    here: Site, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    """503 with a reason that names no path; green again once it works."""

    async def damaged(_: Gateway) -> None:
        raise StoreError(f"{here.home}/runs.db: database disk image is malformed")

    async def status() -> int:
        return (await here.http.get("/health")).status_code

    monkeypatch.setattr(app, "HEALTH_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Gateway, "check", damaged)
        answer = await here.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "database" in answer.json()["reason"]
    assert str(here.home) not in answer.text
    assert any("malformed" in str(entry.get("reason")) for entry in logs)
    assert await status() == 200


async def test_a_gateway_over_a_damaged_run_store_does_not_start(tmp_path: Path) -> None:
    """It names the store and how to save what is left of it, and touches nothing."""
    async with site(tmp_path) as here:
        await here.finished()
    path = tmp_path / "gateway" / "runs.db"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreError, match=r"run store .* cannot be used") as caught:
        async with site(tmp_path):
            pass
    assert "doctor --recover" in str(caught.value.hint)
    assert path.read_bytes().startswith(b"this is no database")


async def _once_closed(url: str, event: anyio.Event) -> None:
    host, port = url.removeprefix("http://").split(":")

    async def refused() -> bool:
        try:
            async with await anyio.connect_tcp(host, int(port)):
                return False
        except OSError:
            return True

    await until(refused)
    event.set()


HOSTS = [
    {"host": "evil.example.com"},
    {"host": "["},
    {"host": "a b/../?#"},
    {"host": ""},
    {
        "x-forwarded-host": "evil.example.com",
        "x-forwarded-proto": "https",
        "x-forwarded-port": "1",
        "x-forwarded-prefix": "/evil",
        "forwarded": "host=evil.example.com;proto=https",
    },
]


@pytest.mark.parametrize("headers", HOSTS)
async def test_the_host_that_a_request_names_has_no_effect(
    shared: Site, headers: dict[str, str]
) -> None:
    """Neither a client nor a cache may decide where a signed URL points."""
    file_id = await shared.upload()
    answer = await shared.http.get(f"/v1/files/{file_id}/url", headers=headers)
    assert answer.json()["url"].startswith(f"{shared.served.url}/files/{file_id}?")
    for path in ("/health/", "/v1/files/", f"/v1/files/{file_id}/", "/openapi.json", "/nothing"):
        answer = await shared.http.get(path, headers=headers)
        assert answer.status_code in {200, 404}
        assert "location" not in answer.headers
        assert "evil" not in answer.text


@pytest.mark.parametrize("headers", HOSTS)
async def test_trouble_is_answered_whatever_the_host(
    shared: Site, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    """A name that makes no address must not make another error of it."""

    async def full(*_: Any) -> Any:
        raise StoreError("disk full")

    monkeypatch.setattr(shared.served.gateway.files, "retrieve", full)
    answer = await shared.http.get(
        "/v1/files/00000000-0000-4000-8000-000000000000", headers=headers
    )
    assert answer.status_code == 503


@pytest.mark.parametrize(
    ("public_url", "base"),
    [
        ("https://tuning.example.org", "https://tuning.example.org"),
        ("https://tuning.example.org/gateway/", "https://tuning.example.org/gateway"),
    ],
)
async def test_links_lead_to_the_public_url(tmp_path: Path, public_url: str, base: str) -> None:
    """A proxy may serve the gateway below a path of its own."""
    async with site(tmp_path, public_url=public_url) as here:
        file_id = await here.upload()
        url = (await here.http.get(f"/v1/files/{file_id}/url")).json()["url"]
        assert url.startswith(f"{base}/files/{file_id}?")
        assert (await here.http.get(url.removeprefix(base))).status_code == 200


@pytest.mark.parametrize(
    "public_url",
    [
        "tuning.example.org",
        "ftp://tuning.example.org",
        "https://user:secret@tuning.example.org",
        "https://tuning.example.org?a=b",
        "https://tuning.example.org#a",
        "https://",
    ],
)
def test_a_public_url_is_an_http_address_and_nothing_else(public_url: str) -> None:
    """Anything else is rejected at the start."""
    with pytest.raises(ValidationError):
        GatewaySettings(public_url=public_url)


def test_the_organization_is_eight_hex_digits() -> None:
    """Given as such, or made of its name."""
    assert GatewaySettings(organization="25bf8e1a").organization_id == "25bf8e1a"
    named = GatewaySettings(organization="ACME").organization_id
    assert len(named) == 8
    assert int(named, 16) >= 0


def test_a_static_key_that_can_be_guessed_is_rejected() -> None:
    """By its length, and without repeating it."""
    with pytest.raises(ValidationError, match="at least 16 characters") as caught:
        GatewaySettings(api_key=SecretStr("hunter2"))
    assert "hunter2" not in str(caught.value)


def test_the_static_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is never shown."""
    monkeypatch.setenv("TRAINING_BACKENDS_GATEWAY__API_KEY", "from-the-environment")
    settings = GatewaySettings()
    assert settings.api_key == SecretStr("from-the-environment")
    assert "from-the-environment" not in repr(settings)


def test_a_static_key_is_not_easily_guessed() -> None:
    """One of a few letters is rejected, and not repeated."""
    with pytest.raises(ValidationError) as raised:
        GatewaySettings(api_key=SecretStr("hunter2"))
    assert "at least 16" in str(raised.value)
    assert "hunter2" not in str(raised.value)


async def test_nobody_else_on_the_machine_can_read_the_state(tmp_path: Path) -> None:
    """Uploads, keys' hashes and the signing secret lie where only the owner gets in."""
    before = os.umask(0)
    try:
        async with site(tmp_path / "home") as here:
            await here.upload()
    finally:
        os.umask(before)
    root = tmp_path / "home" / "gateway"
    open_to_others = {
        path.relative_to(root).as_posix()
        for path in (root, *root.iterdir())
        if stat.S_IMODE(path.stat().st_mode) & 0o077
    }
    assert open_to_others == set()


def test_a_signing_secret_that_was_emptied_is_made_anew(tmp_path: Path) -> None:
    """With an empty one anybody could sign a link."""
    path = tmp_path / "secret"
    first = load_secret(path)
    path.write_bytes(b"")
    assert load_secret(path) not in {b"", first}
    assert load_secret(path) == path.read_bytes()
