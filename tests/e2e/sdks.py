"""Drive the gateway with clients that cannot share an environment with ours.

    python tests/e2e/sdks.py [NAME …]

Brings mistralai 1.12.4 (Python) and @mistralai/mistralai 2.4.0 (TypeScript) into .cache/,
starts `training-backends serve --backend local` and lives `sdk_life` with each; brings LiteLLM and
DSPy, and runs the scripts of docs/other-clients.md. Ends with exit code 0 if all went through. A
NAME is that of a directory in .cache/sdks.
"""

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
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "sdks"
SAMPLES = ROOT / "training_backends" / "samples"
PYTHON_SDK = "mistralai==1.12.4"
TYPESCRIPT_SDK = "@mistralai/mistralai@2.4.0"


def bring(name: str) -> None:
    """Install a client, once."""
    here = CACHE / name
    if name != "node" and not here.is_dir():
        with tempfile.TemporaryDirectory(dir=make(CACHE)) as parent:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{parent}/it"]
            subprocess.run([*pip, {"python": PYTHON_SDK}.get(name, name)], check=True)
            Path(parent, "it").rename(here)
    node = CACHE / "node"
    if name == "node" and not (node / "node_modules").is_dir():
        node.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(node)]
        subprocess.run([*npm, TYPESCRIPT_SDK], check=True)


def make(directory: Path) -> Path:
    """Make a directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def serving(home: Path) -> Iterator[tuple[str, str]]:
    """Serve in front of the local backend; yields the URL and a key."""
    key = secrets.token_urlsafe(24)
    environment = {
        **os.environ,
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": key,
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
    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as (url, key):
        files = [str(SAMPLES / name) for name in ("train.jsonl", "validation.jsonl")]
        done = subprocess.run(
            [*command, url, key, *files], env={**os.environ, **environment}, check=False
        )
    return done.returncode == 0


def follow(name: str, title: str) -> bool:
    """Run a script of docs/other-clients.md with its client; tell whether it went through."""
    page = (ROOT / "docs" / "other-clients.md").read_text()
    script = page.partition(f'title="{title}"\n')[2].partition("\n```")[0]
    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as (url, key):
        rows = (SAMPLES / "train.jsonl").read_bytes()
        Path(home, "chats.jsonl").write_bytes(rows)
        given = {"GATEWAY": f"{url}/openai/v1", "GATEWAY_KEY": key, "MODEL": "tiny-mistral"}
        environment = {**os.environ, **given, "PYTHONPATH": str(CACHE / name)}
        # -S: only the client and what it needs.
        command = [sys.executable, "-S", "-c", script]
        return subprocess.run(command, cwd=home, env=environment, check=False).returncode == 0


def main() -> int:
    """Live with each client; return the exit code."""
    module = CACHE / "node" / "node_modules" / "@mistralai" / "mistralai" / "esm" / "index.js"
    lives: dict[str, Callable[[], bool]] = {
        "python": partial(
            live,
            [sys.executable, str(HERE / "sdk_life.py")],
            {"PYTHONPATH": f"{CACHE}/python"},
        ),
        "node": partial(
            live, ["node", str(HERE / "sdk_life.mjs")], {"MISTRAL_SDK": module.as_uri()}
        ),
        "litellm": partial(follow, "litellm", "with_litellm.py"),
        "dspy": partial(follow, "dspy", "with_dspy.py"),
    }
    chosen = {name: lives[name] for name in sys.argv[1:] or lives}
    failed = []
    for name, work in chosen.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        bring(name)
        if not work():
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} clients went through")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
