"""Pushing a model, to a server that speaks the Hub's commit API."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from huggingface_hub import constants
from pydantic import SecretStr

from training_backends import (
    AsyncTrainingClient,
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    PermissionDenied,
    TrainingRun,
)
from training_backends.core.backend import CredentialSource
from training_backends.testing.backend import ScriptedBackend
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

TOKEN = "hf_" + "Zy8" * 11
WEIGHTS = b"\x00weights" * 5000


class Hub(LoopbackServer):
    """Repositories that are created, and files that are committed to them."""

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []

    def _respond(self, request: Received) -> StubReply:
        if request.headers.get("authorization") != f"Bearer {TOKEN}" and "/lfs/" not in (
            request.path
        ):
            return reply({"error": f"bad token {request.headers['authorization']}"}, 401)
        if request.path.startswith("/lfs/"):
            self.stored[request.path.removeprefix("/lfs/")] = request.body
            return StubReply()
        if request.path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if request.path.endswith("/preupload/main"):
            return reply({"files": [upload_mode(each) for each in posted(request)["files"]]})
        if request.path.endswith(".git/info/lfs/objects/batch"):
            return reply({"transfer": "basic", "objects": [*map(self._object, batch(request))]})
        if request.path.endswith("/commit/main"):
            return self._commit(request.body)
        name = request.path.removeprefix("/api/models/").removesuffix("/revision/main")
        return reply({"id": name, "private": self.private[name], "tags": [], "siblings": []})

    def _create(self, asked: dict[str, Any]) -> StubReply:
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.private
        private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
        self.private.setdefault(name, private)
        return reply({"url": f"{self.base_url}/{name}"}, 409 if exists else 200)

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.base_url}/lfs/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href}}}

    def _commit(self, body: bytes) -> StubReply:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.files[value["path"]] = self.stored[value["oid"]]
        return reply(
            {
                "success": True,
                "commitOid": "c" * 40,
                "commitUrl": f"{self.base_url}/org/name/commit/c",
            }
        )


def reply(document: Any, status: int = 200) -> StubReply:
    """Answer with JSON."""
    return StubReply(status=status, content=json.dumps(document).encode())


def posted(request: Received) -> Any:
    """Return the document of a request."""
    return json.loads(request.body)


def batch(request: Received) -> Any:
    """Return the objects that are asked about."""
    return posted(request)["objects"]


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    """Say how a file is to be sent: large and binary ones apart from the commit."""
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


class Vault(CredentialSource):
    """One token."""

    def __init__(self, token: str = TOKEN) -> None:
        self._token = token

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return it, for the Hub only."""
        assert (provider, profile) == ("huggingface", None)
        return SecretStr(self._token)


class Weighty(ScriptedBackend):
    """Has weights to download."""

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Write them, and a directory."""
        await super().download(run, target)
        await anyio.Path(target / "adapter").mkdir()
        await anyio.Path(target / "adapter" / "model.safetensors").write_bytes(WEIGHTS)
        return target


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without xet, whose protocol is no HTTP alone."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.base_url)
        yield server


async def push(home: Path, data: Path, *, token: str = TOKEN, **options: Any) -> str:
    """Push the model of a completed run."""
    backend = Weighty()
    async with AsyncTrainingClient(
        home=home, backends={"scripted": backend}, credentials=Vault(token)
    ) as client:
        config: Any = {"model": "m", "data": {"train": [str(data)]}}
        run = await client.launch(config, backend="scripted", run_id="mine")
        backend.finish(str(run.remote_id))
        return await client.push("mine", "hf://org/name", **options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A training file."""
    path = tmp_path / "train.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text((json.dumps(row) + "\n") * 12)
    return path


async def test_a_model_is_pushed_as_one_commit_to_a_private_repository(
    hub: Hub, tmp_path: Path, data: Path
) -> None:
    """Every file arrives as it is, and nothing stays behind here."""
    home = tmp_path / "home"
    assert await push(home, data) == f"{hub.base_url}/org/name"
    assert hub.private == {"org/name": True}
    files = {"model.txt": b"mine", "adapter/model.safetensors": WEIGHTS}
    assert hub.files.items() >= files.items()
    assert hub.messages == ["Upload the model of mine"]
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.stored
    assert [*home.glob("push-*")] == []


async def test_a_public_repository_is_named_as_such(hub: Hub, tmp_path: Path, data: Path) -> None:
    """Nothing is published unless that is asked for."""
    hub.private["org/name"] = False
    with pytest.raises(ConfigError, match="exists and is public"):
        await push(tmp_path / "home", data)
    assert hub.files == {}
    await push(tmp_path / "other", data, private=False)
    assert "model.txt" in hub.files


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AuthenticationFailed), (403, PermissionDenied), (400, ConfigError)],
)
async def test_what_the_hub_rejects_is_said_without_the_token(
    hub: Hub, tmp_path: Path, data: Path, status: int, error: type[Exception]
) -> None:
    """Though its answer may repeat it."""
    hub.fail(OtherAnswer(status=status, body={"error": f"no, {TOKEN}"}), path="/repos/create")
    with pytest.raises(error) as caught:
        await push(tmp_path / "home", data)
    assert TOKEN not in repr(caught.value)
    assert "org/name" in str(caught.value)
    assert [*(tmp_path / "home").glob("push-*")] == []


async def test_a_hub_that_is_away_is_unavailable(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bug."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BackendUnavailable, match=re.escape("Pushing to org/name failed")):
        await push(tmp_path / "home", data)


async def test_the_token_is_not_sent_unencrypted(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another machine."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org")
    with pytest.raises(ConfigError, match="plain HTTP"):
        await push(tmp_path / "home", data)


@pytest.mark.parametrize("target", ["org/name", "hf://name", "hf://a/b/c", "s3://org/name"])
async def test_other_targets_are_rejected(tmp_path: Path, target: str) -> None:
    """Before anything is looked up."""
    async with AsyncTrainingClient(home=tmp_path) as client:
        with pytest.raises(ConfigError, match="Invalid target"):
            await client.push("mine", target)
