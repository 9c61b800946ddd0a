"""Processes that serve models: started on demand, kept warm, limited, stopped, replaced."""

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import SecretStr

from tests.waiting import until
from training_backends import BackendUnavailable
from training_backends.gateway.inference import InferenceServers, inference_policy
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings
from training_backends.http.client import HttpClient

pytestmark = pytest.mark.anyio

# Answers with its process id and the model in its directory, until its input is closed.
SERVER = """
import http.server, json, os, pathlib, sys, threading
if pathlib.Path("broken").exists():
    sys.exit("cannot load")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"pid": os.getpid(), "model": pathlib.Path.cwd().name}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
while os.read(0, 1): pass
"""

Servers = Callable[..., AbstractAsyncContextManager[InferenceServers]]


@asynccontextmanager
async def serving(
    logs: Path, *, limit: int = 2, idle: float = 60
) -> AsyncIterator[InferenceServers]:
    """Keep servers for as long as the block runs."""
    async with anyio.create_task_group() as tasks:
        yield InferenceServers(
            tasks,
            logs=logs,
            limit=limit,
            idle=idle,
            policy=inference_policy(30, 10),
            program=(sys.executable, "-I", "-S", "-c", SERVER),
        )
        tasks.cancel_scope.cancel()


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    """Return what opens servers."""
    return partial(serving, tmp_path / "logs")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Make directories, in place of models; their names would mean something to the server."""
    made = [tmp_path / "us:er@host" / name for name in ("a", "b", "c")]
    for each in made:
        each.mkdir(parents=True)
    return made


async def ask(servers: InferenceServers, model: Path) -> dict[str, Any]:
    """Return what a model's server says."""
    async with servers.using(model) as client:
        said = await client.json("GET", "/")
    assert said["model"] == model.name
    return said


def runs(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_server_is_started_once_and_kept(servers: Servers, models: list[Path]) -> None:
    """For requests at the same time too; it ends with its owner."""
    async with servers() as pool:
        said: list[dict[str, Any]] = []

        async def note() -> None:
            said.append(await ask(pool, models[0]))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(note)
        said.append(await ask(pool, models[0]))
        (pid,) = {each["pid"] for each in said}
        assert (await ask(pool, models[1]))["pid"] != pid
        assert runs(pid)
    assert not runs(pid)


async def test_the_least_recently_used_model_makes_room(
    servers: Servers, models: list[Path]
) -> None:
    """Only `limit` processes run at a time."""
    async with servers() as pool:
        first, second = [(await ask(pool, model))["pid"] for model in models[:2]]
        assert (await ask(pool, models[0]))["pid"] == first
        await ask(pool, models[2])
        assert (runs(first), runs(second)) == (True, False)


async def test_a_model_in_use_is_not_stopped(servers: Servers, models: list[Path]) -> None:
    """The next model waits for it."""
    async with servers(limit=1) as pool:
        async with anyio.create_task_group() as tasks, pool.using(models[0]) as client:
            pid = (await client.json("GET", "/"))["pid"]
            tasks.start_soon(ask, pool, models[1])
            await anyio.wait_all_tasks_blocked()
            assert (await client.json("GET", "/"))["pid"] == pid
        assert not runs(pid)


async def test_an_idle_model_is_unloaded(servers: Servers, models: list[Path]) -> None:
    """And loaded again for the next chat."""
    async with servers(idle=0.05) as pool:
        pid = (await ask(pool, models[0]))["pid"]
        await until(lambda: not runs(pid))
        assert (await ask(pool, models[0]))["pid"] != pid


async def test_a_killed_server_is_replaced(servers: Servers, models: list[Path]) -> None:
    """Its requests fail as ones to retry, and the next one is answered by another process."""
    async with servers() as pool:
        async with pool.using(models[0]) as client:
            pid = int((await client.json("GET", "/"))["pid"])
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not runs(pid))
            with pytest.raises(BackendUnavailable) as lost:
                await client.json("GET", "/")
            assert lost.value.retryable

        async def answering() -> int:
            try:
                return int((await ask(pool, models[0]))["pid"])
            except BackendUnavailable:  # its end was not noticed yet
                return pid

        await until(answering, lambda found: found != pid)


async def test_a_server_that_does_not_start_is_reported(
    servers: Servers, models: list[Path], tmp_path: Path
) -> None:
    """Its output is kept, and the next request tries again."""
    (models[0] / "broken").touch()
    async with servers() as pool:
        with pytest.raises(BackendUnavailable, match="did not start"):
            await ask(pool, models[0])
        (log,) = (tmp_path / "logs").iterdir()
        assert "cannot load" in log.read_text()
        (models[0] / "broken").unlink()
        await ask(pool, models[0])


async def test_stopping_waits_for_the_end(servers: Servers, models: list[Path]) -> None:
    """Afterwards the directory can be removed."""
    async with servers() as pool:
        pid = (await ask(pool, models[0]))["pid"]
        await pool.stop(models[0])
        assert not runs(pid)
        await pool.stop(models[1])


# Says what it has, merges into a directory, and answers every chat with its own arguments.
PYTHON = """#!{python} -IS
import http.server, json, os, pathlib, sys, threading
if "-c" in sys.argv:
    names = ["training-backends", "fastapi", "uvicorn", "openai", *sys.argv[4:]]
    versions = dict.fromkeys(names, "{version}")
    print(json.dumps({{"versions": versions, "broken": {{}}, "transformers": None}}))
elif "merge" in sys.argv:
    pathlib.Path(sys.argv[-1]).mkdir()
else:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            said = " ".join([os.getcwd(), *sys.argv[1:]])
            message = {{"role": "assistant", "content": said}}
            body = json.dumps({{"choices": [{{"index": 0, "message": message}}]}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.read(0, 1): pass
"""


async def test_models_are_merged_and_served_by_the_python_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local.python`, whose packages are those that count."""
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, version=version("training-backends")))
    python.chmod(0o755)
    monkeypatch.setenv("TRAINING_BACKENDS_LOCAL__PYTHON", str(python))
    settings = GatewaySettings(api_key=SecretStr("a-static-key-for-tests"))
    async with running(settings, home=tmp_path / "home", backend="local", port=0) as served:
        bearer = HttpClient(served.url, key=the_key)
        body = {"model": "tiny-mistral", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await bearer.json("POST", "/v1/chat/completions", body=body)
        await bearer.aclose()
    said = answer["choices"][0]["message"]["content"]
    merged = tmp_path / "home" / "gateway" / "inference" / "models" / "tiny-mistral"
    assert said.startswith(f"{merged} -P -m training_backends.trainer serve ")


async def the_key() -> SecretStr:
    """Return the gateway's static key."""
    return SecretStr("a-static-key-for-tests")
