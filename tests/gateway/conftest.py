"""A gateway on loopback in front of a backend whose runs move when a test says so."""

import json
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import httpx
import pytest
from anyio.abc import ByteSendStream
from blockbuster import blockbuster_ctx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import SecretStr
from structlog.testing import capture_logs

from tests.conftest import isolate
from tests.waiting import until
from training_backends.core.errors import RunNotFound
from training_backends.gateway.server import RunningGateway, running
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.uploads import BlobStore
from training_backends.testing.backend import ScriptedBackend

KEY = "a-static-key-for-tests"
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""To load those of the machine takes each client 20 to 40 ms."""
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} plus {n}?"},
            {"role": "assistant", "content": f"It is {n + n}."},
        ]
    }
    for n in range(8)
]


def jsonl(rows: Sequence[object] = ROWS) -> bytes:
    """Write rows as a training file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def scripted(**capabilities: Any) -> ScriptedBackend:
    """Make the backend, with these capabilities beside those that it has."""
    declared = ScriptedBackend().capabilities
    return ScriptedBackend(capabilities=declared.model_copy(update=capabilities))


@dataclass
class Site:
    """A gateway, its backend and somebody who asks it over HTTP."""

    home: Path
    backend: ScriptedBackend
    http: httpx.AsyncClient
    served: RunningGateway

    async def upload(
        self, content: bytes = jsonl(), name: str = "train.jsonl", **fields: str
    ) -> str:
        """Upload a file and return its id."""
        answer = await self.http.post("/v1/files", files={"file": (name, content)}, data=fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def create(self, *, files: Sequence[str] | None = None, **fields: Any) -> dict[str, Any]:
        """Create a job and return it."""
        answer = await self.try_create(files=files, **fields)
        assert answer.status_code == 200, answer.text
        created: dict[str, Any] = answer.json()
        return created

    async def try_create(
        self, *, files: Sequence[str] | None = None, **fields: Any
    ) -> httpx.Response:
        """Ask for a job."""
        ids = files if files is not None else [await self.upload()]
        body = {
            "model": "tiny-mistral",
            "training_files": [{"file_id": one, "weight": 1} for one in ids],
            "hyperparameters": {"training_steps": 10, "learning_rate": 1e-4},
            **fields,
        }
        return await self.http.post("/v1/fine_tuning/jobs", json=body)

    async def get(self, job_id: str) -> dict[str, Any]:
        """Return a job."""
        answer = await self.http.get(f"/v1/fine_tuning/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def until(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until a job has one of these statuses, and its events show it.

        The events are those of the run's log, which may be a moment behind the status.
        """

        def reached(job: dict[str, Any]) -> bool:
            shown = {event["data"].get("status") for event in job["events"]}
            status = job["status"]
            return status in statuses and (status != "RUNNING" or status in shown)

        return await until(lambda: self.get(job_id), reached)

    async def remote_id(self, job_id: str) -> str:
        """Return the id that the backend gave a job, once it has one."""

        async def look() -> str | None:
            with suppress(RunNotFound):
                return (await self.served.gateway.client.get(job_id)).remote_id
            return None

        return str(await until(look))

    async def started(self, **fields: Any) -> tuple[str, str]:
        """Create and start a job; return its id and the id that the backend gave it."""
        job_id = (await self.create(auto_start=True, **fields))["id"]
        return job_id, await self.remote_id(job_id)

    async def finished(self, **fields: Any) -> dict[str, Any]:
        """Take a job to its successful end."""
        job_id, remote_id = await self.started(**fields)
        self.backend.measure(remote_id, 10, train_loss=1.0)
        self.backend.finish(remote_id)
        return await self.until(job_id, "SUCCESS")


def own_id(wire_id: str) -> str:
    """Return the id that an object of the OpenAI API has in the Mistral API."""
    return str(UUID(re.sub("^(file-|ftjob-|upload_)", "", wire_id)))


async def trickle(stream: ByteSendStream) -> None:
    """Send a byte now and then, until the other side has enough of it."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        while True:
            await stream.send(b"a")
            await anyio.sleep(0.02)


@asynccontextmanager
async def site(
    home: Path,
    backend: ScriptedBackend | None = None,
    *,
    vault: Any = None,
    blob_store: BlobStore | None = None,
    at: int = 0,
    **settings: Any,
) -> AsyncIterator[Site]:
    """Open a gateway at a port, by default a free one."""
    backend = backend or scripted()
    values: dict[str, Any] = {"api_key": SecretStr(KEY), **settings}
    async with (
        running(
            GatewaySettings(**values),
            home=home,
            backend="scripted",
            port=at,
            backends={"scripted": backend},
            vault=vault,
            blobs=blob_store,
        ) as served,
        httpx.AsyncClient(
            base_url=served.url,
            headers={"authorization": f"Bearer {KEY}"},
            timeout=30,
            verify=NO_CERTIFICATES,
        ) as http,
    ):
        yield Site(home, backend, http, served)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that its backend has lost is given up soon."""
    _hurry(monkeypatch)


def _hurry(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TRAINING_BACKENDS_WATCH__LOST_AFTER", "0.2")


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """Keep what is logged, and fail any blocking call of the gateway in the event loop."""
    with capture_logs() as entries, blockbuster_ctx("training_backends.gateway") as watch:
        for name in ("Connection.execute", "Cursor.fetchone"):
            # Some microseconds, which no writer and no disk prolongs.
            watch.functions[f"sqlite3.{name}"].can_block_in("store/version.py", "_of_file")
        yield entries


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway with a static key."""
    async with site(tmp_path / "home") as opened:
        yield opened


@asynccontextmanager
async def shared_site(factory: pytest.TempPathFactory, **settings: Any) -> AsyncIterator[Site]:
    """Open a gateway for a whole module, before the environment of its first test is set up."""
    root = factory.mktemp("shared")
    async with AsyncExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            isolate(root, patch)
            _hurry(patch)
            opened = await stack.enter_async_context(site(root / "home", **settings))
        yield opened


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A gateway of the module, for tests that change nothing that another test looks at."""
    async with shared_site(tmp_path_factory) as opened:
        yield opened


@asynccontextmanager
async def openai_client(here: Site) -> AsyncIterator[AsyncOpenAI]:
    """The official client of the OpenAI API, which retries nothing."""
    async with AsyncOpenAI(
        api_key=KEY,
        base_url=f"{here.served.url}/openai/v1",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
    ) as client:
        yield client


@pytest.fixture
async def sdk(here: Site) -> AsyncIterator[AsyncOpenAI]:
    """The official client of the OpenAI API in front of `here`."""
    async with openai_client(here) as client:
        yield client


@pytest.fixture(scope="module")
async def shared_sdk(shared: Site) -> AsyncIterator[AsyncOpenAI]:
    """The official client of the OpenAI API in front of `shared`."""
    async with openai_client(shared) as client:
        yield client
