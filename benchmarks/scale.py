"""Measure what requests cost with 1,000 to 1,000,000 runs in the store, on SQLite and PostgreSQL.

    python benchmarks/scale.py [--counts 1000 10000 100000 1000000] [--store sqlite postgresql]
                               [--keep DIRECTORY]

Each store is filled with copies of a finished job, spread over three years; 20 jobs run. What is
measured is the code below the HTTP layer, in one process. The stores take turns, call by call, so
whatever else the machine does slows all of them. For each store the table has the median of the
calls in milliseconds. The ratio is the median of the ratios of calls that follow one another, of
the largest store to the smallest. The last column is what the smallest and the largest cost the
database, whatever the machine does: instructions of SQLite, pages of PostgreSQL by indexes.

With `--keep`, the filled stores stay in the directory, and the next call uses them again. They take
13 GB.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import SecretStr

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.gateway.costs import cost  # noqa: E402
from tests.gateway.filled import FilledGateway, filled_gateway  # noqa: E402
from tests.gateway.filling import analyze, fill  # noqa: E402
from tests.postgres import Postgres, programs  # noqa: E402
from training_backends.gateway.server import running  # noqa: E402
from training_backends.gateway.settings import GatewaySettings  # noqa: E402
from training_backends.testing.backend import ScriptedBackend  # noqa: E402

KEY: Final = "a-key-for-the-benchmark"
ROW: Final = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
REPEATS: Final = 60
WARM: Final = 5
"""Calls before those that count."""
FILLED: Final = "filled"
"""Name of the file that says so."""
JOBS: Final = "/v1/fine_tuning/jobs"
NAMES: Final = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


async def filled(home: Path, store_url: str | None, count: int) -> None:
    """Fill a new store, unless that was done before."""
    done = home / FILLED
    if done.exists():
        return
    settings = GatewaySettings(api_key=SecretStr(KEY), store_url=store_url)
    backend = ScriptedBackend()
    backends = {"scripted": backend}
    began = time.perf_counter()
    async with running(
        settings, home=home, backend="scripted", port=0, backends=backends
    ) as served:
        job_id = await finished_job(served.url, backend)
        store = served.gateway.store
    fill(store, job_id, count)
    analyze(store)
    done.touch()
    print(f"  filled with {count:,} in {time.perf_counter() - began:.0f} s", file=sys.stderr)


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


async def measured(places: Mapping[int, tuple[Path, str | None]]) -> list[str]:
    """Return the rows of the table of one database, for its stores by their number of jobs."""
    for count, (home, store_url) in places.items():
        await filled(home, store_url, count)
    async with AsyncExitStack() as stack:
        sites: list[FilledGateway] = []
        for count, (home, store_url) in places.items():
            began = time.perf_counter()
            site = filled_gateway(home, store_url, count)
            sites.append(await stack.enter_async_context(site))
            print(f"  opened {count:,} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        rows = []
        for name in sites[0].operations:
            times = await timed([site.operations[name] for site in sites])
            ratios = [most / least for least, most in zip(times[0], times[-1], strict=True)]
            few, many = [
                await cost(site.stores, site.operations[name]) for site in (sites[0], sites[-1])
            ]
            medians = [statistics.median(found) * 1000 for found in times]
            cells = [
                name,
                *(f"{each:.0f}" if each >= 10 else f"{each:.1f}" for each in medians),
                f"{statistics.median(ratios):.2f}",
                f"{few:,} → {many:,}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        return rows


async def timed(works: Sequence[Callable[[], Awaitable[Any]]]) -> list[list[float]]:
    """Return the seconds of each call, of works that take turns."""
    times: list[list[float]] = [[] for _ in works]
    turns = list(zip(works, times, strict=True))
    for repeat in range(WARM + REPEATS):
        random.shuffle(turns)
        for work, found in turns:
            began = time.perf_counter()
            await work()
            if repeat >= WARM:
                found.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Fill the stores, one after the other, and print the table of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--store", nargs="+", default=[*NAMES], choices=[*NAMES])
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    counts = sorted(options.counts)
    for name in options.store:
        with ExitStack() as stack:
            if options.keep is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                directory = options.keep.absolute()
                directory.mkdir(parents=True, exist_ok=True)
            server = None
            if name == "postgresql":
                assert programs() is not None, "PostgreSQL is not installed"
                kept = directory / name if options.keep else None
                server = stack.enter_context(Postgres(kept))
            places = {}
            for count in counts:
                home, schema = directory / f"{name}-{count}", f"runs_{count}"
                if not (home / FILLED).exists():  # or not to the end
                    shutil.rmtree(home, ignore_errors=True)
                    home.mkdir()
                    if server is not None:
                        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
                places[count] = home, server.place(schema) if server else None
            rows = asyncio.run(measured(places))
        unit = "instructions" if name == "sqlite" else "pages"
        columns = [NAMES[name], *(f"{count:,}" for count in counts), "ratio", unit]
        print(f"| {' | '.join(columns)} |")
        print(f"|{' --- |' * len(columns)}")
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
