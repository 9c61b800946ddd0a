"""Compare the reads of a gateway with a bare JSON route of the same server.

    python benchmarks/reads.py [--seconds 5] [--postgresql]

Each server is a process of its own, asked over eight connections with kept-alive requests. What
counts is the CPU time that the process spends on a request, all of its threads included: it does
not depend on what else the machine does. With `--postgresql`, the time of the database server is
not included.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from pydantic import SecretStr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.postgres import Postgres, programs  # noqa: E402
from training_backends.gateway.server import running  # noqa: E402
from training_backends.gateway.settings import GatewaySettings  # noqa: E402
from training_backends.testing.backend import ScriptedBackend  # noqa: E402

KEY = "a-key-for-the-benchmark"
ROW = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
CONNECTIONS = 8
JOBS = "/v1/fine_tuning/jobs"


def bare(pipe: Connection, body: bytes) -> None:
    """Serve one JSON route without a framework."""
    document = json.loads(body)

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        content = json.dumps(document).encode()
        length = str(len(content)).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": content})

    async def serve() -> None:
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off")
        )
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  # uvicorn sets no event
            await asyncio.sleep(0.01)
        pipe.send(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
        await task

    asyncio.run(serve())


def gateway(pipe: Connection, home: str, store_url: str | None) -> None:
    """Serve a gateway whose backend runs nothing."""

    async def serve() -> None:
        # A key of its own, as clients have: the static one needs no database.
        settings = GatewaySettings(api_key=SecretStr(KEY), store_url=store_url)
        async with running(
            settings,
            home=Path(home),
            backend="scripted",
            port=0,
            backends={"scripted": ScriptedBackend()},
        ) as served:
            made = await asyncio.to_thread(served.gateway.keys.create, "bench", scope="write")
            pipe.send((served.url, made.key.get_secret_value()))
            await asyncio.Event().wait()

    asyncio.run(serve())


def started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """Start a server; return its process and what it says first."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(there, *arguments), daemon=True
    )
    process.start()
    return process, here.recv()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, all threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(url: str, path: str, key: str, seconds: float) -> tuple[int, list[float]]:
    """Ask for a path until the time is over; return the number of answers and their latencies."""
    host, port = url.removeprefix("http://").split(":")
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n".encode()
    until = time.perf_counter() + seconds
    latencies: list[float] = []

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while (began := time.perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return len(latencies), sorted(latencies)


def measured(process: Any, url: str, path: str, key: str, seconds: float) -> float:
    """Return the CPU seconds of a request."""
    asyncio.run(load(url, path, key, min(1.0, seconds)))
    before = cpu_seconds(process.pid)
    count, latencies = asyncio.run(load(url, path, key, seconds))
    spent = (cpu_seconds(process.pid) - before) / count
    p50, p99 = (latencies[int(len(latencies) * part)] * 1000 for part in (0.5, 0.99))
    print(
        f"{path[:44]:46}{spent * 1e6:7.0f} us CPU {1 / spent:7.0f}/s of a core"
        f"   p50 {p50:5.1f} ms  p99 {p99:5.1f} ms",
        flush=True,
    )
    return spent


def main() -> None:
    """Start the servers, and ask each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--postgresql", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        url = None
        if options.postgresql:
            assert programs() is not None, "PostgreSQL is not installed"
            url = stack.enter_context(Postgres()).new_url()
        process, (base, key) = started(gateway, home, url)
        stack.callback(process.kill)
        http = stack.enter_context(
            httpx.Client(base_url=base, headers={"authorization": f"Bearer {key}"})
        )
        files = {"file": ("train.jsonl", json.dumps(ROW).encode())}
        file_id = http.post("/v1/files", files=files).json()["id"]
        job = {
            "model": "tiny-mistral",
            "training_files": [file_id],
            "hyperparameters": {"training_steps": 10},
            "auto_start": False,
        }
        job_id = http.post(JOBS, json=job).json()["id"]
        while http.get(f"{JOBS}/{job_id}").json()["status"] != "VALIDATED":
            time.sleep(0.1)
        body = http.get(f"{JOBS}/{job_id}").content
        plain, plain_url = started(bare, body)
        stack.callback(plain.kill)
        base_cost = measured(plain, plain_url, "/", "", options.seconds)
        for path in (
            f"{JOBS}/{job_id}",
            f"/openai{JOBS}/{job_id}",
            JOBS,
            "/v1/models",
            f"/v1/files/{file_id}",
        ):
            cost = measured(process, base, path, key, options.seconds)
            print(f"{'':46}{base_cost / cost:7.2f} of the bare route", flush=True)


if __name__ == "__main__":
    main()
