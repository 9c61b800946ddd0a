"""API keys: made, shown once, checked, limited in time and scope, revoked."""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio import to_thread
from pydantic import SecretStr

from tests.gateway.conftest import KEY, NO_CERTIFICATES, Site, site
from tests.waiting import until
from training_backends.core.errors import ConfigError, CredentialNotFound, StoreError
from training_backends.core.logging import redact
from training_backends.core.run import utc_now
from training_backends.gateway import keys as keys_module
from training_backends.gateway.app import create_app
from training_backends.gateway.errors import HTTPProblem
from training_backends.gateway.keys import (
    STATIC_KEY_ID,
    KeyStore,
    NewKey,
    Principal,
    open_keys,
    read_expiry,
)
from training_backends.gateway.store import GatewayStore

pytestmark = pytest.mark.anyio


def secret(made: NewKey) -> str:
    """Return a key as its owner has it."""
    return made.key.get_secret_value()


def bearer(made: NewKey) -> dict[str, str]:
    """Return the headers that present a key."""
    return {"authorization": f"Bearer {secret(made)}"}


def refusal(keys: KeyStore, presented: str, *, writes: bool = False) -> tuple[int, str]:
    """Return how a key is refused."""
    with pytest.raises(HTTPProblem) as raised:
        keys.admit(presented, writes=writes)
    return raised.value.status, raised.value.body["detail"]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Turn the clock of the keys."""

    def turn(span: timedelta) -> None:
        now = utc_now() + span
        monkeypatch.setattr(keys_module, "utc_now", lambda: now)

    return turn


def test_a_new_key_is_known_by_its_id_and_kept_as_a_hash(tmp_path: Path) -> None:
    """Nothing on disk tells the key."""
    keys = open_keys(tmp_path)
    made = keys.create("laptop")
    key = secret(made)
    assert keys.admit(key, writes=True).key_id == made.info.id
    assert key.startswith(f"tb-{made.info.id}-")
    assert key not in repr(made)
    assert key not in redact(f"the key is {key}")
    for path in (tmp_path / "gateway").iterdir():
        assert key.encode() not in path.read_bytes()


def test_what_is_no_key_is_nobody(tmp_path: Path) -> None:
    """A right id with a wrong secret included, and without a word on which it was."""
    keys = open_keys(tmp_path)
    made = keys.create()
    keys.revoke(made.info.id)
    key, mine = secret(made), made.info.id
    nearly = (key[:-1], key + "x", f"tb-{mine}-{'x' * 43}", f"tb-{'0' * 8}-{'x' * 43}")
    for wrong in ("", "tb", "tb-", "tb--", f"tb-{mine}-x", *nearly, "\udce9"):
        assert refusal(keys, wrong) == (401, "Unauthorized")


def test_a_flood_of_wrong_keys_costs_one_look_each_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None for what has not the form of a key, and nothing is ever written."""
    store = GatewayStore(f"sqlite:///{tmp_path}/runs.db")
    keys = KeyStore(store)
    revoked, expired = keys.create(), keys.create(expires_at=utc_now() + timedelta(seconds=1))
    keys.revoke(revoked.info.id)
    soon = utc_now() + timedelta(seconds=2)
    monkeypatch.setattr(keys_module, "utc_now", lambda: soon)
    looks: list[Any] = []
    read = store.read

    def count(work: Any) -> Any:
        looks.append(work)
        return read(work)

    monkeypatch.setattr(store, "read", count)
    monkeypatch.setattr(store, "write", None)
    for wrong in ("", "x" * 100, "tb-zz", f"tb-{'0' * 8}-short"):
        refusal(keys, wrong)
    assert looks == []
    for wrong in (f"tb-{'0' * 8}-{'x' * 43}", secret(revoked), secret(expired)):
        refusal(keys, wrong)
    assert len(looks) == 3


def test_a_revoked_key_opens_nothing(tmp_path: Path) -> None:
    """At once, in another process too; revoking is safe to repeat."""
    keys, other = open_keys(tmp_path), open_keys(tmp_path)
    made, kept = keys.create("a"), keys.create("b")
    assert keys.admit(secret(made), writes=False).key_id == made.info.id
    assert other.revoke(made.info.id).state == "revoked"
    assert other.revoke(made.info.id).state == "revoked"
    assert refusal(keys, secret(made)) == (401, "This API key is revoked.")
    assert keys.admit(secret(kept), writes=False).key_id == kept.info.id
    assert [(key.name, key.state) for key in keys.list()] == [("a", "revoked"), ("b", "active")]


def test_a_key_works_until_it_expires(tmp_path: Path, later: Callable[[timedelta], None]) -> None:
    """Its owner hears why it does not any more; revoked says more than expired."""
    keys = open_keys(tmp_path)
    made = keys.create(expires_at=utc_now() + timedelta(days=30))
    later(timedelta(days=29))
    assert keys.admit(secret(made), writes=True).key_id == made.info.id
    assert keys.usable()
    later(timedelta(days=31))
    assert refusal(keys, secret(made)) == (401, "This API key is expired.")
    assert not keys.usable()
    assert [key.state for key in keys.list()] == ["expired"]
    assert keys.revoke(made.info.id).state == "revoked"


def test_a_key_that_would_never_work_is_not_made(tmp_path: Path) -> None:
    """The error says what to give instead."""
    keys = open_keys(tmp_path)
    with pytest.raises(ConfigError, match="in the past") as raised:
        keys.create(expires_at=utc_now() - timedelta(seconds=1))
    assert "30d" in str(raised.value.hint)
    assert keys.list() == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * 86400), ("12h", 12 * 3600), ("1d 12h", 36 * 3600), (" 90m ", 5400)],
)
def test_an_expiry_may_be_a_duration(text: str, seconds: int) -> None:
    """It begins now."""
    before = utc_now()
    expiry = read_expiry(text)
    span = timedelta(seconds=seconds)
    assert before + span <= expiry <= utc_now() + span


def test_an_expiry_may_be_a_day_or_a_moment() -> None:
    """A day counts to its end, and without a zone this machine's holds."""
    end = read_expiry("2031-01-31").astimezone()
    assert f"{end:%Y-%m-%d %H:%M:%S}" == "2031-01-31 23:59:59"
    assert f"{read_expiry('2031-01-31T12:30').astimezone():%Y-%m-%d %H:%M}" == "2031-01-31 12:30"
    assert read_expiry("2031-01-31T12:30+02:00") == datetime(2031, 1, 31, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["", "30", "soon", "0d", "-1d", "2031-02-30", "2031-01-31x", "9999-12-31", "9" * 20 + "d"],
)
def test_what_is_no_time_is_told_with_examples(text: str) -> None:
    """A number without a unit included."""
    with pytest.raises(ConfigError, match="Invalid --expires value") as raised:
        read_expiry(text)
    assert "30d" in str(raised.value.hint)


def test_a_key_to_read_may_not_write(tmp_path: Path) -> None:
    """The refusal says what is missing; without a choice a key may do everything."""
    keys = open_keys(tmp_path)
    made = keys.create(scope="read")
    assert keys.admit(secret(made), writes=False).key_id == made.info.id
    status, sentence = refusal(keys, secret(made), writes=True)
    assert (status, "write scope" in sentence) == (403, True)
    assert keys.create().info.scope == "write"


def test_a_key_opens_one_project_and_an_admin_s_all(tmp_path: Path) -> None:
    """The project is that of the key, `default` without a choice; the static key is an admin's."""
    keys = KeyStore(GatewayStore(f"sqlite:///{tmp_path}/runs.db"), SecretStr("static-key"))
    made = [
        keys.create(),
        keys.create(project="team-a", scope="read"),
        keys.create(project="team-a", scope="admin"),
    ]
    found = [keys.admit(secret(one), writes=False) for one in made]
    assert [(who.project, who.admin) for who in found] == [
        ("default", False),
        ("team-a", False),
        ("team-a", True),
    ]
    assert keys.admit(secret(made[2]), writes=True).admin
    assert [key.project for key in keys.list()] == ["default", "team-a", "team-a"]
    assert keys.admit("static-key", writes=True) == Principal(STATIC_KEY_ID, "default", admin=True)


@pytest.mark.parametrize("project", ["", "A", "-a", "a b", "a/b", "a\n", "\u00e9", "a" * 65])
def test_a_project_has_a_plain_name(tmp_path: Path, project: str) -> None:
    """The error says what one is made of."""
    keys = open_keys(tmp_path)
    with pytest.raises(ConfigError, match="Invalid project name") as raised:
        keys.create(project=project)
    assert "lowercase" in str(raised.value.hint)
    assert keys.list() == []


def test_the_last_use_is_known_to_the_minute(
    tmp_path: Path, later: Callable[[timedelta], None]
) -> None:
    """It is written down at most once a minute, and only for a key that worked."""
    keys = open_keys(tmp_path)
    made = keys.create(scope="read")

    def last_used() -> datetime | None:
        return keys.list()[0].last_used_at

    assert last_used() is None
    refusal(keys, secret(made), writes=True)
    assert last_used() is None
    keys.admit(secret(made), writes=False)
    first = last_used()
    assert first is not None
    later(timedelta(seconds=50))
    keys.admit(secret(made), writes=False)
    assert last_used() == first
    later(timedelta(seconds=70))
    keys.admit(secret(made), writes=False)
    again = last_used()
    assert again is not None
    assert again - first >= timedelta(seconds=60)


def test_a_full_disk_does_not_lock_anybody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a use cannot be written down is no reason to refuse it."""
    store = GatewayStore(f"sqlite:///{tmp_path}/runs.db")
    keys = KeyStore(store)
    made = keys.create()

    def full(_: Any) -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(store, "write", full)
    assert keys.admit(secret(made), writes=True).key_id == made.info.id


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    """The error says to upgrade."""
    open_keys(tmp_path).list()
    with sqlite3.connect(tmp_path / "gateway" / "runs.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    connection.close()
    with pytest.raises(StoreError, match="newer version") as raised:
        open_keys(tmp_path).list()
    assert "Upgrade" in str(raised.value.hint)


def test_an_unknown_id_cannot_be_revoked(tmp_path: Path) -> None:
    """The error says how to see the ids."""
    with pytest.raises(CredentialNotFound) as raised:
        open_keys(tmp_path).revoke("00000000")
    assert "keys list" in str(raised.value.hint)


def test_a_name_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    """Too long, or with control characters."""
    for name in ("a" * 81, "a\nb"):
        with pytest.raises(ConfigError):
            open_keys(tmp_path).create(name)


def test_the_static_key_stands_beside_the_others(tmp_path: Path) -> None:
    """It comes from the settings and is not stored."""
    store = GatewayStore(f"sqlite:///{tmp_path}/runs.db")
    assert not KeyStore(store).usable()
    keys = KeyStore(store, SecretStr("static-key"))
    assert keys.usable()
    assert keys.admit("static-key", writes=True).key_id == STATIC_KEY_ID
    assert refusal(keys, "static-kez") == (401, "Unauthorized")
    assert keys.list() == []


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer \u00e9"]
)
async def test_without_a_valid_key_nothing_is_served(shared: Site, header: str | None) -> None:
    """Whatever the route, and before the body is looked at."""
    headers = [(b"authorization", header.encode("latin-1"))] if header is not None else []
    async with httpx.AsyncClient(base_url=shared.served.url, verify=NO_CERTIFICATES) as http:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/v1/nothing")):
            answer = await http.request(method, path, headers=headers, content=b"{")
            assert (answer.status_code, answer.json()) == (401, {"detail": "Unauthorized"})
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_key_made_while_the_gateway_runs_works_until_it_is_revoked(shared: Site) -> None:
    """The command line and the gateway share the keys."""
    keys = await to_thread.run_sync(open_keys, shared.home)
    made = await to_thread.run_sync(keys.create, "later")
    headers = {"authorization": f"bearer {secret(made)}"}
    assert (await shared.http.get("/v1/models", headers=headers)).status_code == 200
    await to_thread.run_sync(keys.revoke, made.info.id)
    answer = await shared.http.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.json()) == (401, {"detail": "This API key is revoked."})
    assert answer.headers["www-authenticate"] == "Bearer"


async def make(here: Site, **options: Any) -> NewKey:
    """Make a key for a gateway that runs."""
    return await to_thread.run_sync(lambda: open_keys(here.home).create(**options))


async def revoke(here: Site, made: NewKey) -> None:
    """Revoke a key of a gateway that runs, as another process does."""
    await to_thread.run_sync(lambda: open_keys(here.home).revoke(made.info.id))


async def test_an_expired_key_is_refused_while_the_gateway_runs(shared: Site) -> None:
    """Its time is looked at with every request."""
    made = await make(shared, expires_at=utc_now() + timedelta(seconds=2))
    assert (await shared.http.get("/v1/models", headers=bearer(made))).status_code == 200
    answer = await until(
        lambda: shared.http.get("/v1/models", headers=bearer(made)),
        lambda answer: answer.status_code != 200,
    )
    assert (answer.status_code, answer.json()) == (401, {"detail": "This API key is expired."})


async def test_a_key_to_read_sees_everything_and_changes_nothing(shared: Site) -> None:
    """Whatever operation there is, before its body is looked at."""
    headers = bearer(await make(shared, scope="read"))
    file_id = await shared.upload()
    assert (await shared.http.get(f"/v1/files/{file_id}", headers=headers)).status_code == 200
    assert (await shared.http.get("/v1/fine_tuning/jobs", headers=headers)).status_code == 200
    changed = 0
    for path, operations in create_app(shared.served.gateway).openapi()["paths"].items():
        for method in operations:
            url = path.format_map(defaultdict(lambda: "none", file_id=file_id, job_id=file_id))
            answer = await shared.http.request(method, url, headers=headers, content=b"{")
            if method == "get":
                assert answer.status_code != 403 or path in {"/files/{file_id}", "/metrics"}
            else:
                assert answer.status_code == 403
                assert "read-only" in answer.text
                changed += 1
    assert changed >= 8
    assert (await shared.http.get(f"/v1/files/{file_id}")).status_code == 200


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_an_upload_under_way_needs_its_key_to_the_end(
    here: Site, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused as soon as it is whole, and nothing of it is kept."""
    made = await make(here, expires_at=utc_now() + timedelta(hours=1))
    arrived = anyio.Event()

    async def chunks() -> Any:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        await arrived.wait()
        if how == "revoked":
            await revoke(here, made)
        else:
            later = utc_now() + timedelta(hours=2)
            monkeypatch.setattr(keys_module, "utc_now", lambda: later)
        yield b'{"text": "abc"}\r\n--x--\r\n'

    async def until_it_is_received() -> None:
        await until(lambda: any((here.home / "gateway" / "incoming").iterdir()))
        arrived.set()

    headers = {**bearer(made), "content-type": "multipart/form-data; boundary=x"}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(until_it_is_received)
        answer = await here.http.post("/v1/files", headers=headers, content=chunks())
    assert (answer.status_code, answer.json()) == (401, {"detail": f"This API key is {how}."})
    assert (await here.http.get("/v1/files")).json()["total"] == 0
    assert list((here.home / "gateway" / "incoming").iterdir()) == []
    assert list((here.home / "gateway" / "files").iterdir()) == []


async def test_no_key_is_ever_logged(here: Site, logs: list[Any]) -> None:
    """Whether it was taken or refused, and for whatever reason."""
    good = await make(here)
    read = await make(here, scope="read")
    revoked = await make(here)
    await revoke(here, revoked)
    for made in (good, read, revoked):
        await here.http.get("/v1/models", headers=bearer(made))
        await here.http.post("/v1/fine_tuning/jobs", headers=bearer(made), content=b"{")
    await here.http.get("/v1/models", headers={"authorization": "Bearer a-wrong-key-altogether"})
    assert len(logs) >= 7
    for word in (KEY, "a-wrong-key-altogether", *map(secret, (good, read, revoked))):
        assert word not in repr(logs)


async def test_a_gateway_without_a_static_key_takes_stored_ones_only(tmp_path: Path) -> None:
    """An empty bearer never matches a key that is not set."""
    async with site(tmp_path, api_key=None) as here:
        assert (await here.http.get("/v1/models")).status_code == 401
        made = await to_thread.run_sync(here.served.gateway.keys.create)
        here.http.headers["authorization"] = f"Bearer {made.key.get_secret_value()}"
        assert (await here.http.get("/v1/models")).status_code == 200


async def test_health_needs_no_key(shared: Site) -> None:
    """So that a supervisor can ask."""
    async with httpx.AsyncClient(base_url=shared.served.url, verify=NO_CERTIFICATES) as http:
        answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert json.loads(answer.content)["backend"] == "scripted"
