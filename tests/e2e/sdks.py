"""Drive the gateway with official Mistral SDKs that cannot share an environment with ours.

    python tests/e2e/sdks.py

Brings mistralai 1.12.4 (Python) and @mistralai/mistralai 2.4.0 (TypeScript) into .cache/,
starts `training-backends serve --backend local` and lives `sdk_life` with each. Ends with
exit code 0 if both went through.
"""

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
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "sdks"
SAMPLES = ROOT / "training_backends" / "samples"
PYTHON_SDK = "mistralai==1.12.4"
TYPESCRIPT_SDK = "@mistralai/mistralai@2.4.0"


def bring() -> None:
    """Install both SDKs, once."""
    python, node = CACHE / "python", CACHE / "node"
    if not (python / "mistralai").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(python)]
        subprocess.run([*pip, PYTHON_SDK], check=True)
    if not (node / "node_modules").is_dir():
        node.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(node)]
        subprocess.run([*npm, TYPESCRIPT_SDK], check=True)


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


def main() -> int:
    """Live with each SDK; return the exit code."""
    bring()
    module = CACHE / "node" / "node_modules" / "@mistralai" / "mistralai" / "esm" / "index.js"
    lives = {
        PYTHON_SDK: (
            [sys.executable, str(HERE / "sdk_life.py")],
            {"PYTHONPATH": f"{CACHE}/python"},
        ),
        TYPESCRIPT_SDK: (["node", str(HERE / "sdk_life.mjs")], {"MISTRAL_SDK": module.as_uri()}),
    }
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
