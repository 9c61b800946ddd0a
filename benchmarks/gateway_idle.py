"""Compare a gateway whose jobs are idle with a plain `client.watch` over as many runs.

    python benchmarks/gateway_idle.py [JOBS] [SECONDS]

The runs of a scripted backend, with the polling interval of the local one, are running and silent.
Each side is a process of its own, measured for SECONDS after every run has been running for
SETTLED seconds: CPU seconds of the process, all threads included, and database transactions.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import httpx
import sqlalchemy as sa
from pydantic import SecretStr

from training_backends.client.client import AsyncTrainingClient
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings
from training_backends.testing.backend import ScriptedBackend

SETTLED = 20.0
KEY = "a-key-for-the-benchmark"
ROW = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}


class Silent(ScriptedBackend):
    """Its runs never change."""

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """That of the local backend."""
        return timedelta(seconds=0.1), timedelta(seconds=2)


@asynccontextmanager
async def gateway(home: Path, jobs: int) -> AsyncIterator[None]:
    """Serve so many running jobs."""
    settings = GatewaySettings(api_key=SecretStr(KEY), max_open_jobs=jobs)
    backends = {"scripted": Silent()}
    async with running(
        settings, home=home, backend="scripted", port=0, backends=backends
    ) as served:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60) as http:
            files = {"file": ("train.jsonl", json.dumps(ROW).encode())}
            file_id = (await http.post("/v1/files", files=files)).json()["id"]
            for n in range(jobs):
                job = {
                    "model": "tiny-mistral",
                    "training_files": [file_id],
                    "hyperparameters": {"training_steps": 10},
                    "suffix": f"n{n}",
                    "auto_start": True,
                }
                (await http.post("/v1/fine_tuning/jobs", json=job)).raise_for_status()
            path = "/v1/fine_tuning/jobs?status=RUNNING"
            while (await http.get(path)).json()["total"] < jobs:  # noqa: ASYNC110  # polled by HTTP
                await anyio.sleep(0.5)
        yield


@asynccontextmanager
async def watch(home: Path, runs: int) -> AsyncIterator[None]:
    """Watch so many running runs."""
    data = home / "train.jsonl"
    await anyio.Path(data).write_text(json.dumps(ROW))
    async with (
        AsyncTrainingClient(home=home, backends={"scripted": Silent()}) as client,
        anyio.create_task_group() as tasks,
    ):
        for n in range(runs):
            config = {"model": "tiny-mistral", "data": {"train": data}}
            await client.launch(config, backend="scripted", run_id=f"r{n}")
        tasks.start_soon(client.watch, _ignore)
        yield
        tasks.cancel_scope.cancel()


async def _ignore(*_: object) -> None:
    """Take an event."""


async def measure(side: str, count: int, seconds: float) -> None:
    """Print what one side costs, as JSON."""
    transactions = 0

    def begun(_: sa.Connection) -> None:
        nonlocal transactions
        transactions += 1

    sa.event.listen(sa.Engine, "begin", begun)
    with tempfile.TemporaryDirectory() as home:
        async with {"gateway": gateway, "watch": watch}[side](Path(home), count):
            await anyio.sleep(SETTLED)
            cpu, before = time.process_time(), transactions
            await anyio.sleep(seconds)
            used, done = time.process_time() - cpu, transactions - before
    print(json.dumps({"cpu": used / seconds, "transactions": done / seconds}))


def main() -> None:
    """Measure both sides and print their ratio."""
    if sys.argv[1:2] and sys.argv[1] in {"gateway", "watch"}:
        anyio.run(measure, sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
        return
    count, seconds = [*sys.argv[1:], "100", "30"][:2] if sys.argv[1:] else ("100", "30")
    found = {}
    for side in ("gateway", "watch"):
        command = [sys.executable, __file__, side, count, seconds]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[side] = json.loads(done.stdout)
    print(f"{count} idle runs, {seconds} s")
    for side, cost in found.items():
        print(f"  {side:<8} {cost['cpu']:>6.1%} of a core {cost['transactions']:>7.1f} tx/s")
    ratio = found["gateway"]["cpu"] / found["watch"]["cpu"]
    print(f"  ratio    {ratio:.2f}")


if __name__ == "__main__":
    main()
