"""Measure what requests cost with 1,000 to 1,000,000 runs in the store, on SQLite and PostgreSQL.

    python benchmarks/scale.py [--counts 1000 10000 100000 1000000] [--store sqlite postgresql]

Each store is filled with copies of a finished job, spread over three years; 20 jobs run. What is
measured is the code below the HTTP layer, in one process: the median of REPEATS calls, in
milliseconds, and how many times longer it takes with the most runs than with the fewest. An event
is written and durable when it returns, so its time is mostly that of the disk.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from itertools import count as counter
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import SecretStr

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.gateway.filling import analyze, fill  # noqa: E402
from tests.postgres import Postgres, programs  # noqa: E402
from training_backends.core.run import LogRecord, utc_now  # noqa: E402
from training_backends.gateway.files import FileFilters  # noqa: E402
from training_backends.gateway.jobs import JobQuery  # noqa: E402
from training_backends.gateway.keys import Principal  # noqa: E402
from training_backends.gateway.openai_jobs import list_openai_jobs  # noqa: E402
from training_backends.gateway.runner import _behind  # noqa: E402
from training_backends.gateway.server import running  # noqa: E402
from training_backends.gateway.settings import GatewaySettings  # noqa: E402
from training_backends.testing.backend import ScriptedBackend  # noqa: E402

KEY: Final = "a-key-for-the-benchmark"
ROW: Final = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
REPEATS: Final = 40
JOBS: Final = "/v1/fine_tuning/jobs"
CALLER: Final = Principal("bench")


async def finished_job(base: str, backend: ScriptedBackend) -> str:
    """Take a job to its end; return its id."""
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:
        file = await http.post("/v1/files", files={"file": ("t.jsonl", json.dumps(ROW).encode())})
        job = {
            "model": "tiny-mistral",
            "training_files": [file.json()["id"]],
            "hyperparameters": {"training_steps": 10},
            "auto_start": True,
        }
        job_id = (await http.post(JOBS, json=job)).json()["id"]
        while not backend.created:  # noqa: ASYNC110  # set by a task of the gateway
            await asyncio.sleep(0.05)
        backend.measure(backend.created[0], 10, train_loss=1.0)
        backend.finish(backend.created[0])
        status = ""
        while status != "SUCCESS":
            await asyncio.sleep(0.1)
            status = (await http.get(f"{JOBS}/{job_id}")).json()["status"]
    return str(job_id)


async def measured(home: Path, store_url: str | None, count: int) -> dict[str, float]:
    """Return milliseconds by operation, with so many runs in a new store."""
    settings = GatewaySettings(api_key=SecretStr(KEY), store_url=store_url)
    backend = ScriptedBackend()
    backends = {"scripted": backend}
    async with running(
        settings, home=home, backend="scripted", port=0, backends=backends
    ) as served:
        gateway = served.gateway
        job_id = await finished_job(served.url, backend)
        began = time.perf_counter()
        await asyncio.to_thread(fill, gateway.store, job_id, count)
        await asyncio.to_thread(analyze, gateway.store)
        print(f"  filled with {count:,} in {time.perf_counter() - began:.0f} s", flush=True)
        store = gateway.client._store  # noqa: SLF001  # below the interface
        numbers = counter(1)
        cursor = store.provider_cursor(job_id)

        def append() -> None:
            nonlocal cursor
            new = f"bench-{next(numbers)}"
            record = LogRecord(at=utc_now(), message="m", source="event", cursor=new)
            found = store.observed(job_id, lambda run: run, [record], after=cursor, cursor=new)
            assert found is not None
            cursor = new

        async def models() -> None:
            pages = gateway.models.pages(CALLER)
            await anext(pages)
            await anext(pages)
            await pages.aclose()

        async def sweep() -> None:
            await asyncio.to_thread(store.backends_to_watch)
            await asyncio.to_thread(lambda: store.live(backend="scripted"))
            await gateway.store.aread(_behind)

        mine = Principal("bench", "default")
        pages = {
            "page": 0,
            "page in the middle": count // 200,
            "last page": max(count // 100 - 1, 0),
        }
        operations: dict[str, Callable[[], Awaitable[Any]]] = {
            f"list jobs, {name}": lambda page=page: gateway.jobs.list(  # type: ignore[misc]
                JobQuery(), mine, page=page, page_size=100
            )
            for name, page in pages.items()
        }
        operations |= {
            "list jobs, by status": lambda: gateway.jobs.list(
                JobQuery(status="RUNNING"), mine, page=0, page_size=100
            ),
            "list jobs, after an id": lambda: gateway.store.aread(
                lambda c: list_openai_jobs(c, mine, "o", after=job_id, limit=100, metadata=None)
            ),
            "list files": lambda: gateway.files.list(
                FileFilters(), mine, page=0, page_size=100, include_total=True
            ),
            "list models, 500": models,
            "status": lambda: gateway.jobs.get(job_id, mine),
            "sweep": sweep,
            "append an event": lambda: asyncio.to_thread(append),
        }
        return {name: await median(work) for name, work in operations.items()}


async def median(work: Callable[[], Awaitable[Any]]) -> float:
    """Return the median milliseconds of a call."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def main() -> None:
    """Fill the stores, one after the other, and print the table of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--store", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    for name in options.store:
        print(name, flush=True)
        found: dict[int, dict[str, float]] = {}
        with ExitStack() as stack:
            server = None
            if name == "postgresql":
                assert programs() is not None, "PostgreSQL is not installed"
                server = stack.enter_context(Postgres())
            for count in options.counts:
                with tempfile.TemporaryDirectory() as home:
                    url = server.new_url() if server else None
                    found[count] = asyncio.run(measured(Path(home), url, count))
        counts = [*found]
        print(f"{'':26}" + "".join(f"{count:>11,}" for count in counts) + "   ratio")
        for operation in found[counts[0]]:
            times = [found[count][operation] for count in counts]
            row = "".join(f"{each:11.2f}" for each in times)
            print(f"{operation:26}{row}{times[-1] / times[0]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
