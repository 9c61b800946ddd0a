"""A gateway that runs short of something keeps its jobs: real processes, a real training."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import wait_until

KEY = "a-static-key-for-shortage"
DESCRIPTORS = 256
SERVE = (sys.executable, "-m", "training_backends", "serve", "--port", "0", "--json")


@contextmanager
def gateway(home: Path, stderr: Any, **settings: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `serve` with few file descriptors until the block ends."""
    variables = {"LOG_LEVEL": "info", "HOME": str(home), "GATEWAY__API_KEY": KEY, **settings}
    with subprocess.Popen(
        ["sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh", *SERVE],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {f"TRAINING_BACKENDS_{name}": text for name, text in variables.items()},
    ) as server:
        try:
            yield server
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0


def client(server: "subprocess.Popen[str]") -> httpx.Client:
    """Wait until a gateway answers and return a client for it."""
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    return httpx.Client(
        base_url=url,
        headers={"authorization": f"Bearer {KEY}", "connection": "close"},
        timeout=30,
    )


def create(http: httpx.Client, file: Path) -> str:
    """Upload a file, start a job on it and return the job's id."""
    uploaded = http.post("/v1/files", files={"file": ("train.jsonl", file.read_bytes())})
    created = http.post(
        "/v1/fine_tuning/jobs",
        json={
            "model": "tiny-mistral",
            "training_files": [uploaded.json()["id"]],
            "hyperparameters": {"training_steps": 8, "learning_rate": 1e-4},
            "auto_start": True,
        },
    )
    return str(created.json()["id"])


def status(http: httpx.Client, job_id: str) -> str:
    """Return a job's status."""
    return str(http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"])


def is_healthy(http: httpx.Client) -> bool:
    """Tell whether the gateway answers now."""
    try:
        return http.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked")
def test_a_job_outlives_a_shortage_of_file_descriptors(
    tmp_path: Path, samples: tuple[Path, Path]
) -> None:
    """Neither too few descriptors nor a flood of idle connections ends it."""
    said = tmp_path / "log.txt"
    with (
        said.open("wb") as log,
        gateway(tmp_path / "home", log, GATEWAY__HEADER_TIMEOUT="5") as server,
        client(server) as http,
        ExitStack() as stack,
    ):
        job_id = create(http, samples[0])
        wait_until(lambda: status(http, job_id), lambda word: word in {"RUNNING", "SUCCESS"})

        used = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used - 8, DESCRIPTORS))
        wait_until(lambda: "Too many open files" in said.read_text())
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        wait_until(lambda: is_healthy(http))

        address = (http.base_url.host, http.base_url.port or 80)
        for _ in range(DESCRIPTORS + 50):
            stack.enter_context(socket.create_connection(address, timeout=30))
        wait_until(lambda: "too many open" in said.read_text())
        wait_until(lambda: is_healthy(http))
        ended = wait_until(lambda: status(http, job_id), lambda word: word in {"SUCCESS", "FAILED"})
    assert ended == "SUCCESS"


@pytest.mark.e2e
@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_a_gateway_outlives_its_log(tmp_path: Path, samples: tuple[Path, Path], full: bool) -> None:
    """Requests are answered and jobs accepted whether or not a line can be written."""
    with ExitStack() as stack:
        if full:
            stderr: Any = stack.enter_context(Path("/dev/full").open("wb"))
        else:
            reader, stderr = os.pipe()
            os.close(reader)
            stack.callback(os.close, stderr)
        server = stack.enter_context(gateway(tmp_path / "home", stderr))
        http = stack.enter_context(client(server))
        answers = [http.get("/v1/models").status_code for _ in range(5)]
        refused = http.post("/v1/fine_tuning/jobs", content=b"{").status_code
        uploaded = http.post("/v1/files", files={"file": ("t.jsonl", samples[0].read_bytes())})
    assert (answers, refused, uploaded.status_code) == ([200] * 5, 422, 200)
