"""Drive the gateway with official SDKs of Mistral and OpenAI.

    python tests/e2e/sdks.py [NAME...]

Brings those that cannot share an environment with ours into .cache/, starts
`training-backends serve --backend local` and lives a whole life with each whose name begins with
one of NAME, by default all. Ends with exit code 0 if all went through.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
NODE_SDKS = (TYPESCRIPT_SDK, OPENAI_NODE)
SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def bring() -> None:
    """Install the SDKs, once."""
    python = CACHE / "python"
    if not (python / "mistralai").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(python)]
        subprocess.run([*pip, PYTHON_SDK], check=True)
    for package in NODE_SDKS:
        node = CACHE / package.replace("/", "-")
        if not (node / "node_modules").is_dir():
            node.mkdir(parents=True, exist_ok=True)
            npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(node)]
            subprocess.run([*npm, package], check=True)


def module_of(package: str, path: str) -> str:
    """Return the URL of a module of an installed Node package."""
    name = package.rpartition("@")[0]
    return (CACHE / package.replace("/", "-") / "node_modules" / name / path).as_uri()


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
def serving(home: Path, webhook: str) -> Iterator[tuple[str, str]]:
    """Serve in front of the local backend; yields the URL and a key."""
    key = secrets.token_urlsafe(24)
    environment = {
        **os.environ,
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": key,
        "TRAINING_BACKENDS_GATEWAY__WEBHOOK_URL": webhook,
        "TRAINING_BACKENDS_GATEWAY__WEBHOOK_SECRET": SECRET,
    }
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


def main() -> int:
    """Live with each SDK; return the exit code."""
    bring()
    mistral = module_of(TYPESCRIPT_SDK, "esm/index.js")
    lives = {
        PYTHON_SDK: (
            [sys.executable, str(HERE / "sdk_life.py")],
            {"PYTHONPATH": f"{CACHE}/python"},
        ),
        TYPESCRIPT_SDK: (["node", str(HERE / "sdk_life.mjs")], {"MISTRAL_SDK": mistral}),
        OPENAI_PYTHON: ([sys.executable, str(HERE / "sdk_openai.py")], {}),
        OPENAI_NODE: (
            ["node", str(HERE / "sdk_openai.mjs")],
            {"OPENAI_SDK": module_of(OPENAI_NODE, "index.mjs")},
        ),
    }
    if chosen := tuple(sys.argv[1:]):
        lives = {name: life for name, life in lives.items() if name.startswith(chosen)}
    failed = []
    for name, (command, environment) in lives.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        if not live(command, environment):
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(lives) - len(failed)} of {len(lives)} SDKs lived a whole life")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
