"""Kill one of three gateways every few seconds while clients work through a real load balancer.

    python benchmarks/gateways.py [--minutes 20] [--seconds N] [--every 4] [--clients 6]

The gateways share one PostgreSQL server and one home, behind HAProxy or nginx. The official Python
clients of both APIs upload files, create jobs and follow them to their end. Every `--every`
seconds one gateway is killed with SIGKILL, and started again a second later. At the end, what was
accepted is compared with what there is: each file once, each job once and trained once, the events
of each job once and in order. Only requests that a kill cut off may have failed.

Exits with 0 if all of that holds.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import anyio
import httpx
from mistralai.client import Mistral
from openai import APIConnectionError, AsyncOpenAI, InternalServerError
from pydantic import SecretStr

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._chaos_backend import QuickBackend  # noqa: E402
from tests.postgres import Postgres, programs  # noqa: E402
from training_backends.gateway.server import running  # noqa: E402
from training_backends.gateway.settings import GatewaySettings  # noqa: E402
from training_backends.protocols.mistral.status import ENDED  # noqa: E402

KEY: Final = "a-key-for-the-benchmark"
COUNT: Final = 3
FEWEST_KILLS: Final = 2
"""Of a run on a slow machine, too."""
JOBS: Final = "/v1/fine_tuning/jobs"
EVENTS: Final = ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]
_T = TypeVar("_T")


def proxy_program() -> str | None:
    """Return the program of a load balancer; None: none is installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return shutil.which("haproxy", path=path) or shutil.which("nginx", path=path)


def serve(home: str, store_url: str, port: int) -> None:
    """Be one gateway, until killed."""

    async def run() -> None:
        settings = GatewaySettings(api_key=SecretStr(KEY), store_url=store_url)
        backends = {"quick": QuickBackend(Path(home, "trainings"))}
        async with running(
            settings, home=Path(home), backend="quick", port=port, backends=backends
        ):
            await anyio.sleep_forever()

    os.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
    threading.Thread(target=_end_with_the_benchmark, daemon=True).start()
    anyio.run(run)


def _end_with_the_benchmark() -> None:
    benchmark = multiprocessing.parent_process()
    assert benchmark is not None
    benchmark.join()
    os._exit(1)


class Fleet:
    """The gateways, each on a port of its own."""

    def __init__(self, home: Path, store_url: str) -> None:
        self._home, self._url = str(home), store_url
        self.ports = [free_port() for _ in range(COUNT)]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["benchmarks._chaos_backend", "training_backends.gateway.server", "psycopg"]
        )
        self._processes = [self._started(port) for port in self.ports]

    def _started(self, port: int) -> Any:
        process = self._context.Process(
            target=serve, args=(self._home, self._url, port), daemon=True
        )
        process.start()
        return process

    def kill(self, number: int) -> None:
        """Kill a gateway."""
        os.kill(self._processes[number].pid, signal.SIGKILL)
        self._processes[number].join()

    def restart(self, number: int) -> None:
        """Start a killed gateway again."""
        self._processes[number] = self._started(self.ports[number])

    def end(self) -> None:
        """Kill all."""
        for number in range(COUNT):
            self.kill(number)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_proxy(directory: Path, ports: list[int]) -> tuple[subprocess.Popen[bytes], int]:
    """Start the load balancer; return its process and port."""
    program, port = proxy_program(), free_port()
    assert program is not None, "neither HAProxy nor nginx is installed"
    config = directory / "proxy.conf"
    if program.endswith("haproxy"):
        servers = "\n".join(
            f"  server g{each} 127.0.0.1:{each} check inter 200ms fall 1 rise 1" for each in ports
        )
        config.write_text(
            "defaults\n  mode http\n  timeout connect 2s\n  timeout client 60s\n"
            # A slow machine makes a check slow, which is no reason to leave a gateway out.
            "  timeout server 60s\n  timeout check 10s\n  retries 3\n"
            "  option redispatch 1\n  retry-on conn-failure\n"
            f"frontend all\n  bind 127.0.0.1:{port}\n  default_backend gateways\n"
            "backend gateways\n  balance roundrobin\n  option httpchk GET /health\n"
            f"{servers}\n"
        )
        command = [program, "-db", "-f", str(config)]
    else:
        servers = "\n".join(
            f"server 127.0.0.1:{each} max_fails=1 fail_timeout=1s;" for each in ports
        )
        config.write_text(
            f"daemon off; pid {directory}/nginx.pid; error_log /dev/null;\n"
            "events {}\nhttp { access_log off; "
            f"client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
            f"upstream gateways {{ {servers} }}\n"
            f"server {{ listen 127.0.0.1:{port}; client_max_body_size 0;\n"
            "location / { proxy_pass http://gateways; proxy_request_buffering off; } } }\n"
        )
        command = [program, "-p", str(directory), "-c", str(config)]
    if shutil.which("setpriv"):  # ends with the benchmark, however that ends
        command = ["setpriv", "--pdeathsig=TERM", *command]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), port


@dataclass
class Ledger:
    """What clients were told.

    Attributes:
        files: Ids of accepted files by the digest of their content.
        jobs: Ids of accepted jobs by their suffix.
        finished: Ids of the jobs that were seen to succeed.
        cut: Failed requests by reason.
        unexpected: Failures for which no kill accounts.
        kills: When each kill began and was done.
    """

    files: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    cut: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    kills: list[tuple[float, float]] = field(default_factory=list)


class Client:
    """One client, which repeats what a kill has cut off."""

    def __init__(self, ledger: Ledger, url: str, number: int, until: float) -> None:
        self._ledger = ledger
        self._until = until
        self._number = number
        self._openai = AsyncOpenAI(api_key=KEY, base_url=f"{url}/openai/v1", max_retries=0)
        self._mistral = Mistral(api_key=KEY, server_url=url)

    async def run(self) -> None:
        """Work until the time is over, and finish what is begun."""
        turn = 0
        while time.monotonic() < self._until or len(self._ledger.kills) < FEWEST_KILLS:
            turn += 1
            name = f"c{self._number}-{turn}"
            await (self._by_openai(name) if self._number % 2 else self._by_mistral(name))

    async def _try(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something, again if a kill has cut it off."""
        while True:
            began = time.monotonic()
            try:
                done = await work()
            except (httpx.TransportError, APIConnectionError, InternalServerError) as error:
                self._note(began, error)
            except Exception as error:
                if getattr(error, "status_code", 0) < 500:
                    self._ledger.unexpected.append(repr(error)[:300])
                    raise
                self._note(began, error)
            else:
                self._ledger.latencies.append(time.monotonic() - began)
                return done
            await asyncio.sleep(0.1)

    def _note(self, began: float, error: Exception) -> None:
        status = getattr(error, "status_code", None)
        self._ledger.cut[f"{type(error).__name__} {status or ''}".strip()] += 1
        # The proxy finds out within its check interval, and a start takes a moment.
        if not any(began - 5 < done for _, done in self._ledger.kills):
            self._ledger.unexpected.append(f"no kill explains {error!r}"[:300])

    async def _by_openai(self, name: str) -> None:
        client, content = self._openai, rows(name)
        extra = {"idempotency-key": name}
        file = await self._try(
            lambda: client.files.create(
                file=(f"{name}.jsonl", content),
                purpose="fine-tune",
                extra_headers={"x-stainless-retry-count": "1"},
            )
        )
        self._ledger.files[name] = plain(file.id)
        job = await self._try(
            lambda: client.fine_tuning.jobs.create(
                model="tiny-mistral", training_file=file.id, suffix=name, extra_headers=extra
            )
        )
        self._ledger.jobs[name] = plain(job.id)
        now = await self._until_ended(lambda: client.fine_tuning.jobs.retrieve(job.id))
        self._finished(plain(job.id), now.status == "succeeded", str(now.error))

    async def _by_mistral(self, name: str) -> None:
        client, content = self._mistral, rows(name)
        file = await self._try(
            lambda: client.files.upload_async(
                file={"file_name": f"{name}.jsonl", "content": content}, purpose="fine-tune"
            )
        )
        self._ledger.files[name] = file.id
        jobs = client.fine_tuning.jobs

        async def create() -> str:
            # A cut create may have been accepted; the protocol has no idempotency keys.
            there = await jobs.list_async(suffix=name)
            if there.data:
                return str(there.data[0].id)
            made: Any = await jobs.create_async(
                model="tiny-mistral",
                training_files=[{"file_id": file.id, "weight": 1}],
                hyperparameters={"training_steps": 10},
                suffix=name,
                auto_start=True,
            )
            return str(made.id)

        job_id = await self._try(create)
        self._ledger.jobs[name] = job_id
        now = await self._until_ended(lambda: jobs.get_async(job_id=job_id))
        self._finished(job_id, now.status == "SUCCESS", str(now.events))

    async def _until_ended(self, look: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            job = await self._try(look)
            if job.status in ENDED or job.status in {"succeeded", "failed", "cancelled"}:
                return job
            await asyncio.sleep(0.2)

    def _finished(self, job_id: str, success: bool, why: str) -> None:  # noqa: FBT001
        if success:
            self._ledger.finished.add(job_id)
        else:
            self._ledger.unexpected.append(f"job {job_id} ended otherwise: {why}"[:500])


def plain(wire_id: str) -> str:
    """Return an id of the OpenAI API as the other one shows it."""
    return str(UUID(wire_id.rpartition("-")[2]))


def rows(name: str) -> bytes:
    """Return a training file that differs from all others."""
    turn = [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]
    return (json.dumps({"messages": turn}) + "\n").encode() * 3


async def kill_now_and_then(fleet: Fleet, ledger: Ledger, every: float, until: float) -> None:
    """Kill one gateway after the other, each answering again before the next is killed."""
    order = random.Random(0)
    while time.monotonic() < until - every or len(ledger.kills) < FEWEST_KILLS:
        await asyncio.sleep(every - 1)
        await all_answer(fleet.ports)
        number = order.randrange(COUNT)
        ledger.kills.append((time.monotonic(), math.inf))
        await asyncio.to_thread(fleet.kill, number)
        ledger.kills[-1] = ledger.kills[-1][0], time.monotonic()
        await asyncio.sleep(1)
        await asyncio.to_thread(fleet.restart, number)


async def compared(url: str, ledger: Ledger, home: Path) -> list[str]:
    """Return what differs between what was accepted and what there is."""
    wrong: list[str] = []
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60
    ) as http:

        async def listed(path: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            while True:
                page = len(found) // 500
                document = (await http.get(f"{path}?page_size=500&page={page}")).json()
                found += document["data"]
                if len(document["data"]) < 500:
                    assert document["total"] == len(found), "the total is not that of the list"
                    return found

        for name, path, accepted in (
            ("file", "/v1/files", ledger.files),
            ("job", JOBS, ledger.jobs),
        ):
            ids = Counter(each["id"] for each in await listed(path))
            wrong += [f"{name} {each} is lost" for each in accepted.values() if each not in ids]
            wrong += [f"{name} {each} is listed twice" for each in ids if ids[each] > 1]
            if extra := set(ids) - set(accepted.values()):
                wrong.append(f"{name}s that nobody was told of: {len(extra)}")
        for job_id in ledger.jobs.values():
            job = (await http.get(f"{JOBS}/{job_id}")).json()
            words = [event["data"].get("status") for event in job["events"]]
            if words != EVENTS:
                wrong.append(f"events of {job_id}: {words}")
    trained = Counter(path.name for path in (home / "trainings").iterdir())
    if set(trained) != set(ledger.jobs.values()):
        wrong.append(f"{len(trained)} trainings of {len(ledger.jobs)} jobs")
    wrong += [f"job {each} did not end" for each in {*ledger.jobs.values()} - ledger.finished]
    return wrong + ledger.unexpected


async def all_answer(ports: list[int]) -> None:
    """Wait until each gateway serves."""
    async with httpx.AsyncClient() as http:
        for port in ports:
            while True:
                with suppress(httpx.TransportError):
                    if (await http.get(f"http://127.0.0.1:{port}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.1)


async def main(options: argparse.Namespace, directory: Path, store_url: str) -> list[str]:
    """Run the gateways, the clients and the kills; return what is wrong at the end."""
    home = directory / "home"
    fleet = Fleet(home, store_url)
    proxy, port = start_proxy(directory, fleet.ports)
    url = f"http://127.0.0.1:{port}"
    ledger = Ledger()
    try:
        await all_answer([*fleet.ports, port])
        until = time.monotonic() + (options.seconds or options.minutes * 60)
        clients = [Client(ledger, url, number, until) for number in range(options.clients)]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.run())
            tasks.create_task(kill_now_and_then(fleet, ledger, options.every, until))
        await all_answer(fleet.ports)
        wrong = await compared(url, ledger, home)
    finally:
        fleet.end()
        proxy.kill()
        proxy.wait()
    times = sorted(ledger.latencies)
    p50, p99 = (times[int(len(times) * part)] * 1000 for part in (0.5, 0.99))
    print(
        f"{len(ledger.kills)} kills, {len(ledger.jobs)} jobs, {len(ledger.files)} files, "
        f"{len(times)} requests, cut off: {dict(ledger.cut)}, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--every", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=6)
    with ExitStack() as stack:
        assert programs() is not None, "PostgreSQL is not installed"
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = asyncio.run(
            main(parser.parse_args(), work, stack.enter_context(Postgres()).new_url())
        )
    print("\n".join(found[:20]) or "PASS")
    sys.exit(bool(found))
