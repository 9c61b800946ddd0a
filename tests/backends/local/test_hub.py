"""The environment and token that a training process receives to download a model."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.interpreter import Interpreter
from training_backends.backends.local.process import ChildEnvironment, Hub, ask_model, communicate
from training_backends.backends.local.settings import LocalSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    CredentialNotFound,
    VaultLocked,
)
from training_backends.core.run import TrainingRun
from training_backends.credentials.vault import CredentialVault
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]

TOKEN = "hf_QpZr7sXkVtYwNbMc"
DUMP = """
import json, os, sys
from pathlib import Path
told = {"arguments": Path("/proc/self/cmdline").read_text(), "environment": dict(os.environ)}
told["stdin"] = sys.stdin.read()
Path(sys.argv[1], "told").write_text(json.dumps(told))
"""


def vault(tmp_path: Path, **environ: str) -> CredentialVault:
    """Return a vault that knows what is in an environment."""
    return CredentialVault(home=tmp_path / "vault", environ=environ)


async def handed_to_a_process(home: Path, run: TrainingRun, hub: Hub) -> dict[str, Any]:
    """Launch a run whose process tells what it was given."""
    backend = LocalBackend(home, program=(sys.executable, "-c", DUMP), hub=hub)
    await backend.launch(run, MemoryJournal(run))
    told = home / "runs" / run.id / "told"
    await until(lambda: told.exists() and told.read_text())
    found: dict[str, Any] = json.loads(told.read_text())
    return found


async def test_the_token_comes_on_standard_input_only(home: Path, make_run: MakeRun) -> None:
    """Neither arguments nor environment of the process show it, nor does its directory."""
    hub = Hub(LocalSettings(), vault(home, HF_TOKEN=TOKEN))
    told = await handed_to_a_process(home, make_run(model="org/model"), hub)
    assert told["stdin"] == f"{TOKEN}\n"
    assert TOKEN not in told["arguments"]
    assert TOKEN not in json.dumps(told["environment"])
    for path in (home / "runs" / "r").rglob("*"):
        assert path.name == "told" or not path.is_file() or TOKEN not in path.read_text()


async def test_a_model_of_this_machine_needs_no_token(home: Path, make_run: MakeRun) -> None:
    """The built-in model, or one in a directory, is trained without any key."""
    hub = Hub(LocalSettings(), vault(home, HF_TOKEN=TOKEN))
    told = await handed_to_a_process(home, make_run(), hub)
    assert told["stdin"] == ""
    assert TOKEN not in json.dumps(told)
    assert (await hub.child_environment(str(home))).token is None


async def test_settings_choose_hub_key_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror, one of several keys, or no hub at all and then no key either."""
    keys = vault(tmp_path, HF_TOKEN=TOKEN, HUGGINGFACE_WORK_API_KEY="hf_OtherOtherOther")
    mirror = LocalSettings(hub_url="https://mirror.example.org/hf/", profile="work")
    child_env = await Hub(mirror, keys).child_environment("org/model")
    assert child_env.variables["HF_ENDPOINT"] == "https://mirror.example.org/hf"
    assert child_env.stdin == b"hf_OtherOtherOther\n"
    with pytest.raises(CredentialNotFound):
        await Hub(LocalSettings(profile="none"), keys).child_environment("org/model")
    child_env = await Hub(LocalSettings(offline=True), keys).child_environment("org/model")
    assert (child_env.variables["HF_HUB_OFFLINE"], child_env.stdin) == ("1", b"")
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert (await Hub(LocalSettings(), keys).child_environment("org/model")).token is None


async def test_variables_of_the_libraries_are_passed_on_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL_P2P_DISABLE is the usual remedy on many machines; nothing else can set it."""
    prefixes = [
        "NCCL",
        "GLOO",
        "TORCH",
        "TORCHINDUCTOR",
        "TRITON",
        "HSA",
        "HIP",
        "ROCR",
        "CUBLAS",
        "BNB",
        "UCX",
        "FI",
        "HF_XET",
    ]
    for prefix in prefixes:
        monkeypatch.setenv(f"{prefix}_SOME_SETTING", "1")
        for secret in ("API_KEY", "TOKEN", "AUTH_SECRET", "PASSWORD"):
            monkeypatch.setenv(f"{prefix}_{secret}", "s3cret")
    monkeypatch.setenv("OTHER_SETTING", "1")
    passed = (
        await Hub(LocalSettings(), vault(tmp_path)).child_environment("tiny-mistral")
    ).variables
    assert {f"{prefix}_SOME_SETTING" for prefix in prefixes} <= passed.keys()
    assert "OTHER_SETTING" not in passed
    assert "s3cret" not in passed.values()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "http://corp:hunter2hunter/x@proxy.example:8080"),
        ("HF_ENDPOINT", "http://corp:hunter2hunter/x@hub.example"),
        ("HF_ENDPOINT", "http://[::1"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
    ],
)
async def test_a_network_variable_that_cannot_be_used_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """Before a process is started, whose libraries would quote it; only if it needs the hub."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable) as caught:
        await Hub().child_environment("org/model")
    assert "hunter" not in f"{caught.value} {caught.value.hint}"
    await Hub().child_environment(str(home))
    await Hub(LocalSettings(offline=True)).child_environment("org/model")


async def test_a_process_gets_the_proxies_in_a_form_that_it_can_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What curl accepts, the hub's library need not accept."""
    monkeypatch.setenv("HTTPS_PROXY", "u:p@ss@proxy.example:1")
    monkeypatch.setenv("NO_PROXY", "[::1],fd00::/8")
    environment = (await Hub().child_environment("org/model")).variables
    assert environment["https_proxy"] == "http://u:p%40ss@proxy.example:1"
    assert environment["no_proxy"] == "::1"
    assert not {"HTTPS_PROXY", "NO_PROXY"} & environment.keys()


async def test_without_a_key_the_run_goes_on(tmp_path: Path) -> None:
    """Most models need none: neither its absence nor a locked keyring holds anything up."""

    class Locked(CredentialSource):
        async def get(self, *_: object) -> Any:
            raise VaultLocked("The keyring is locked.")

    assert (
        await Hub(LocalSettings(), vault(tmp_path)).child_environment("org/model")
    ).token is None
    assert (await Hub(LocalSettings(), Locked()).child_environment("org/model")).token is None


async def test_no_token_goes_over_plain_http(tmp_path: Path) -> None:
    """Only https and this machine get it."""
    keys = vault(tmp_path, HF_TOKEN=TOKEN)
    plain = LocalSettings(hub_url="http://mirror.example.org")
    assert (await Hub(plain, keys).child_environment("org/model")).token is None
    here = LocalSettings(hub_url="http://127.0.0.1:8080")
    assert (await Hub(here, keys).child_environment("org/model")).token is not None


class Gated(BaseHTTPRequestHandler):
    """A hub that gives its models to nobody."""

    seen: ClassVar[list[str]]

    def answer(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_request(self, *_: object) -> None:
        pass


@pytest.fixture
def gated() -> Iterator[str]:
    """Where that hub is."""
    Gated.seen = []
    server = HTTPServer(("127.0.0.1", 0), Gated)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.engine
async def test_the_hub_is_asked_with_the_token(
    gated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the vault has reaches the hub; what the hub refuses is all that the process says."""
    said: list[bytes] = []

    async def recorded(*arguments: Any) -> Any:
        done = await communicate(*arguments)
        said.append(done[2])
        return done

    monkeypatch.setattr("training_backends.backends.local.process.communicate", recorded)
    hub = Hub(LocalSettings(hub_url=gated), vault(tmp_path, HF_TOKEN=TOKEN))
    child_env = await hub.child_environment("org/gated")
    with pytest.raises(BackendUnavailable, match="credentials set huggingface"):
        await ask_model("org/gated", "hello", child_env=child_env)
    assert set(Gated.seen) == {f"Bearer {TOKEN}"}
    assert len(said[0].splitlines()) == 1, "libraries are loaded in silence"


async def test_a_program_that_ends_at_once_is_reported(tmp_path: Path) -> None:
    """With its last words, though it has not read the prompt, which fills the pipe."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec <&-\necho a library is broken >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(BackendUnavailable, match="Cannot generate with m: a library is broken"):
        await ask_model(
            "m",
            "x" * 2**20,
            child_env=ChildEnvironment(dict(os.environ)),
            interpreter=Interpreter(python),
        )
