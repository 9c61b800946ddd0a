"""Drive the gateway with official SDKs of Mistral and OpenAI, and with LiteLLM and DSPy.

    python tests/e2e/sdks.py [NAME...]

Brings those that cannot share an environment with ours into .cache/, starts
`training-backends serve --backend local`, lives a whole life with each SDK and runs the scripts of
docs/other-clients.md. Takes the clients whose name begins with one of NAME, by default all. Ends
with exit code 0 if all went through.
"""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "sdks"
SAMPLES = ROOT / "training_backends" / "samples"
PYTHON_SDK = "mistralai==1.12.4"
TYPESCRIPT_SDK = "@mistralai/mistralai@2.4.0"
OPENAI_PYTHON = f"openai=={version('openai')}"
OPENAI_NODE = "openai@7.59.0"
LITELLM = "litellm==1.110.2"
DSPY = "dspy==3.4.1"
SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def place_of(package: str) -> Path:
    """Return the directory that a client is installed into."""
    return CACHE / package.replace("/", "-")


def bring(package: str) -> None:
    """Install a client into a directory of its own, once, completely or not at all."""
    place = place_of(package)
    if place.is_dir() or package == OPENAI_PYTHON:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as parent:
        target = f"{parent}/it"
        if package in {TYPESCRIPT_SDK, OPENAI_NODE}:
            command = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", target]
            Path(target).mkdir()
        else:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", target]
        subprocess.run([*command, package], check=True)
        Path(target).rename(place)


def module_of(package: str, path: str) -> str:
    """Return the URL of a module of an installed Node package."""
    name = package.rpartition("@")[0]
    return (place_of(package) / "node_modules" / name / path).as_uri()


@contextmanager
def receiving(path: Path) -> Iterator[str]:
    """Write what a webhook receives to a file, a delivery per line; yields its URL."""

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            with path.open("a") as file:
                file.write(json.dumps({"body": body, "headers": dict(self.headers)}) + "\n")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    path.touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def serving(home: Path, webhook: str | None = None) -> Iterator[tuple[str, str]]:
    """Serve in front of the local backend; yields the URL and a key."""
    key = secrets.token_urlsafe(24)
    environment = {
        **os.environ,
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": key,
    }
    if webhook is not None:
        environment["TRAINING_BACKENDS_GATEWAY__WEBHOOK_URL"] = webhook
        environment["TRAINING_BACKENDS_GATEWAY__WEBHOOK_SECRET"] = SECRET
    command = [sys.executable, "-m", "training_backends", "serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"], key
        finally:
            server.send_signal(signal.SIGINT)


def live(command: list[str], environment: Mapping[str, str]) -> bool:
    """Run one life against a gateway of its own; tell whether it went through."""
    with (
        tempfile.TemporaryDirectory() as home,
        receiving(Path(home) / "deliveries") as webhook,
        serving(Path(home), webhook) as (url, key),
    ):
        files = [str(SAMPLES / name) for name in ("train.jsonl", "validation.jsonl")]
        own = {"DELIVERIES": f"{home}/deliveries", "OPENAI_WEBHOOK_SECRET": SECRET}
        done = subprocess.run(
            [*command, url, key, *files], env={**os.environ, **own, **environment}, check=False
        )
    return done.returncode == 0


def follow(package: str, title: str) -> bool:
    """Run a script of docs/other-clients.md with its client; tell whether it went through."""
    page = (ROOT / "docs" / "other-clients.md").read_text()
    script = page.partition(f'title="{title}"\n')[2].partition("\n```")[0]
    with (
        tempfile.TemporaryDirectory() as home,
        receiving(Path(home) / "deliveries") as webhook,
        serving(Path(home), webhook) as (url, key),
    ):
        Path(home, "chats.jsonl").write_bytes((SAMPLES / "train.jsonl").read_bytes())
        given = {"GATEWAY": f"{url}/openai/v1", "GATEWAY_KEY": key, "MODEL": "tiny-mistral"}
        environment = {**os.environ, **given, "PYTHONPATH": str(place_of(package))}
        # -S: only the client and what it needs.
        command = [sys.executable, "-S", "-c", script]
        return subprocess.run(command, cwd=home, env=environment, check=False).returncode == 0


def main() -> int:
    """Live with each client; return the exit code."""
    mistral = module_of(TYPESCRIPT_SDK, "esm/index.js")
    lives: dict[str, Callable[[], bool]] = {
        PYTHON_SDK: partial(
            live,
            [sys.executable, str(HERE / "sdk_life.py")],
            {"PYTHONPATH": str(place_of(PYTHON_SDK))},
        ),
        TYPESCRIPT_SDK: partial(
            live, ["node", str(HERE / "sdk_life.mjs")], {"MISTRAL_SDK": mistral}
        ),
        OPENAI_PYTHON: partial(live, [sys.executable, str(HERE / "sdk_openai.py")], {}),
        OPENAI_NODE: partial(
            live,
            ["node", str(HERE / "sdk_openai.mjs")],
            {"OPENAI_SDK": module_of(OPENAI_NODE, "index.mjs")},
        ),
        LITELLM: partial(follow, LITELLM, "with_litellm.py"),
        DSPY: partial(follow, DSPY, "with_dspy.py"),
    }
    if chosen := tuple(sys.argv[1:]):
        lives = {name: life for name, life in lives.items() if name.startswith(chosen)}
    failed = []
    for name, work in lives.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        bring(name)
        if not work():
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(lives) - len(failed)} of {len(lives)} clients went through")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
