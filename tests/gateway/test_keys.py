"""API keys: made, shown once, checked, revoked."""

import json
from pathlib import Path

import pytest
from anyio import to_thread
from pydantic import SecretStr

from tests.gateway.conftest import KEY, Site, site
from training_backends.core.errors import ConfigError, CredentialNotFound
from training_backends.core.logs import redact
from training_backends.gateway.keys import STATIC_KEY_ID, KeyStore, open_keys
from training_backends.gateway.store import GatewayStore

pytestmark = pytest.mark.anyio


def test_a_new_key_is_known_by_its_id_and_kept_as_a_hash(tmp_path: Path) -> None:
    """Nothing on disk tells the key."""
    keys = open_keys(tmp_path)
    made = keys.create("laptop")
    key = made.key.get_secret_value()
    assert keys.identify(key) == made.info.id
    assert key.startswith(f"tb-{made.info.id}-")
    assert key not in repr(made)
    assert key not in redact(f"the key is {key}")
    for path in (tmp_path / "gateway").iterdir():
        assert key.encode() not in path.read_bytes()


def test_what_is_no_key_is_nobody(tmp_path: Path) -> None:
    """A right id with a wrong secret included."""
    keys = open_keys(tmp_path)
    made = keys.create()
    key = made.key.get_secret_value()
    for wrong in ("", "tb", "tb-", "tb--", f"tb-{made.info.id}-x", key[:-1], key + "x", "\udce9"):
        assert keys.identify(wrong) is None


def test_a_revoked_key_opens_nothing(tmp_path: Path) -> None:
    """At once, in another process too; revoking is safe to repeat."""
    keys, other = open_keys(tmp_path), open_keys(tmp_path)
    made, kept = keys.create("a"), keys.create("b")
    assert not other.revoke(made.info.id).active
    assert not other.revoke(made.info.id).active
    assert keys.identify(made.key.get_secret_value()) is None
    assert keys.identify(kept.key.get_secret_value()) == kept.info.id
    assert [(key.name, key.active) for key in keys.list()] == [("a", False), ("b", True)]


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
    store = GatewayStore(tmp_path / "gateway.db")
    assert not KeyStore(store).usable()
    keys = KeyStore(store, SecretStr("static-key"))
    assert keys.usable()
    assert keys.identify("static-key") == STATIC_KEY_ID
    assert keys.identify("static-kez") is None
    assert keys.list() == []


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer \u00e9"]
)
async def test_without_a_valid_key_nothing_is_served(here: Site, header: str | None) -> None:
    """Whatever the route, and before the body is looked at."""
    del here.http.headers["authorization"]
    headers = [(b"authorization", header.encode("latin-1"))] if header is not None else []
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/v1/nothing")):
        answer = await here.http.request(method, path, headers=headers, content=b"{")
        assert (answer.status_code, answer.json()) == (401, {"detail": "Unauthorized"})
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_key_made_while_the_gateway_runs_works_until_it_is_revoked(here: Site) -> None:
    """The command line and the gateway share the keys."""
    keys = await to_thread.run_sync(open_keys, here.home)
    made = await to_thread.run_sync(keys.create, "later")
    headers = {"authorization": f"bearer {made.key.get_secret_value()}"}
    assert (await here.http.get("/v1/models", headers=headers)).status_code == 200
    await to_thread.run_sync(keys.revoke, made.info.id)
    assert (await here.http.get("/v1/models", headers=headers)).status_code == 401


async def test_a_gateway_without_a_static_key_takes_stored_ones_only(tmp_path: Path) -> None:
    """An empty bearer never matches a key that is not set."""
    async with site(tmp_path, api_key=None) as here:
        assert (await here.http.get("/v1/models")).status_code == 401
        made = await to_thread.run_sync(here.served.gateway.keys.create)
        here.http.headers["authorization"] = f"Bearer {made.key.get_secret_value()}"
        assert (await here.http.get("/v1/models")).status_code == 200


async def test_health_needs_no_key(here: Site) -> None:
    """So that a supervisor can ask."""
    del here.http.headers["authorization"]
    answer = await here.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert json.loads(answer.content)["backend"] == "scripted"
