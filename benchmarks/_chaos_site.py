"""Servers in processes of their own, and the files and jobs that they have."""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

import anyio
import httpx
from anyio.abc import Process

__all__ = [
    "SITES",
    "BookedFile",
    "BookedJob",
    "Books",
    "HostedSite",
    "Server",
    "Site",
    "environment",
    "install_quick_backend",
]

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH")


def environment(work: Path, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a child process, without the user's own settings."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    paths = [str(work / "plugins"), *filter(None, [kept.pop("PYTHONPATH", "")]), str(_REPOSITORY)]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": str(work / "pycache"),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "TRAINING_BACKENDS_HOME": str(home),
        **more,
    }


def install_quick_backend(work: Path) -> None:
    """Register the benchmark's backend as a plugin, with an entry point."""
    metadata = work / "plugins" / "quick_backend-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quick-backend\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[training_backends.backends]\nquick = benchmarks._chaos_backend:QuickBackend\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedFile:
    """A file of a server.

    Attributes:
        sha256: Digest of its content, or the beginning of it.
    """

    id: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedJob:
    """A job of a server.

    Attributes:
        status: The server's word.
        trained: Whether it ended with a model.
        cancelled: Whether it was cancelled.
        files: Ids of its files.
    """

    id: str
    status: str
    trained: bool
    cancelled: bool
    files: Sequence[str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What a server has.

    Attributes:
        unfinished: Number of uploads that were begun and never completed; they hold no file, and
            the server discards them by itself.
        leftovers: Anything else that belongs to no run.
    """

    files: Sequence[BookedFile]
    jobs: Sequence[BookedJob]
    unfinished: int = 0
    leftovers: Sequence[str] = ()


class Server(ABC):
    """One server, which is restarted whenever it is killed.

    Attributes:
        backend: Name of the client's backend for it.
        key: Its API key.
        python: The interpreter that starts it and its clients.
        config: The configuration of a run, without backend and data, as YAML.
        create: Name of the requests that create a job.
        restarts: Whether it keeps its state when it is killed.
    """

    backend: ClassVar[str]
    config: ClassVar[str]
    create: ClassVar[str] = "POST fine_tuning/jobs"
    restarts: ClassVar[bool] = False

    def __init__(self, work: Path, name: str, *, python: str = sys.executable) -> None:
        self.python = python
        self._process: Process | None = None
        self._listens = anyio.Event()
        self.home = work / name
        self.key = secrets.token_urlsafe(24)
        self.port = 0
        self._environment = environment(work, self.home, TRAINING_BACKENDS_LOG_FORMAT="json")

    @property
    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What starts it; prints its URL as a line of JSON."""

    @abstractmethod
    async def books(self) -> Books:
        """Return what it has."""

    def settings(self, url: str) -> dict[str, str]:
        """Return environment variables of clients that reach it at a URL."""
        name = self.backend.upper()
        return {f"{name}_API_KEY": self.key, f"TRAINING_BACKENDS_{name}__BASE_URL": url}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the server while the block runs; restart it whenever it is killed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_running)
            await self.ready()
            yield
            tasks.cancel_scope.cancel()

    async def ready(self) -> None:
        """Return once the server is listening."""
        with anyio.fail_after(60):
            await self._listens.wait()

    def kill(self) -> None:
        """Kill the server, as a power failure would; it restarts automatically."""
        if self._process is not None:
            self._listens = anyio.Event()
            self._process.kill()

    async def _keep_running(self) -> None:
        self.home.mkdir(exist_ok=True)
        while True:
            with (self.home / "server.log").open("ab") as log:
                self._process = await anyio.open_process(
                    self._command, stdout=subprocess.PIPE, stderr=log, env=self._environment
                )
            try:
                self.port = await _port_of(self._process)
                if self.port:
                    self._listens.set()
                if await self._process.wait() != -signal.SIGKILL:
                    raise RuntimeError(f"the server exited; see {self.home / 'server.log'}")
            finally:
                with anyio.CancelScope(shield=True):
                    await _end(self._process)

    def _http(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"http://127.0.0.1:{self.port}"
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=30)


class Site(Server):
    """A gateway, started from the command line."""

    backend = "mistral"
    config = "model: tiny-mistral\nhyperparameters:\n  training_steps: 2\n"
    restarts = True

    def __init__(
        self, work: Path, name: str, *, python: str = sys.executable, backend: str = "quick"
    ) -> None:
        super().__init__(work, name, python=python)
        self._backend = backend
        self._environment["TRAINING_BACKENDS_GATEWAY__API_KEY"] = self.key

    @property
    def _command(self) -> Sequence[str]:
        program = (self.python, "-m", "training_backends")
        return [*program, "serve", "--backend", self._backend, "--port", "0", "--json"]

    async def books(self) -> Books:
        """Return what it has; trainings and contents of no job or file are left over."""
        trainings, files = self.trainings(), await self.files()
        jobs = [
            BookedJob(
                id=job["id"],
                status=job["status"],
                trained=job["status"] == "SUCCESS" and job["id"] in trainings,
                cancelled=False,  # also a cancelled one counts
                files=job["training_files"],
            )
            for job in await self.jobs()
        ]
        known = {file["signature"] for file in files} | await self._results()
        leftovers = [f"content {each}" for each in self.contents() if each[:16] not in known]
        leftovers += [f"training {each}" for each in {*trainings} - {job.id for job in jobs}]
        if not await self.settled():
            leftovers.append("a partial file")
        return Books(
            files=[BookedFile(id=file["id"], sha256=file["signature"]) for file in files],
            jobs=jobs,
            leftovers=leftovers,
        )

    async def files(self) -> list[dict[str, Any]]:
        """List all files."""
        return await self._list("/v1/files")

    async def _results(self) -> set[str]:
        """Return the signatures of the result files of jobs, which only the OpenAI API lists."""
        query = {"purpose": "fine-tune-results"}
        async with self._http() as http:
            listed = (await http.get("/openai/v1/files", params=query)).raise_for_status().json()
            contents = [
                (await http.get(f"/openai/v1/files/{file['id']}/content"))
                .raise_for_status()
                .content
                for file in listed["data"]
            ]
        return {hashlib.sha256(content).hexdigest()[:16] for content in contents}

    async def jobs(self) -> list[dict[str, Any]]:
        """List all jobs."""
        return await self._list("/v1/fine_tuning/jobs")

    async def _list(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with self._http() as http:
            for page in range(10_000):
                query = {"page": page, "page_size": 100}
                answer = (await http.get(path, params=query)).raise_for_status().json()
                found += answer["data"]
                if len(answer["data"]) < 100:
                    break
        return found

    async def settled(self) -> bool:
        """Tell whether no partial uploads are left.

        Waits up to 15 s, because the gateway takes a moment to notice an aborted upload.
        """
        incoming = self.home / "gateway" / "incoming"
        for _ in range(150):
            if not any(incoming.iterdir()):
                return True
            await anyio.sleep(0.1)
        return False

    def contents(self) -> list[str]:
        """Return the digests of all stored contents."""
        return sorted(path.name for path in (self.home / "gateway" / "files").iterdir())

    def trainings(self) -> list[str]:
        """Return the ids of all trainings ever started."""
        kept = "runs" if self._backend == "local" else "trainings"
        directory = self.home / "gateway" / kept
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


class HostedSite(Server):
    """A scripted provider, see `_chaos_provider`; it loses its state when it is killed."""

    wire: ClassVar[str]

    @property
    def _command(self) -> Sequence[str]:
        return [self.python, "-m", "benchmarks._chaos_provider", self.wire]

    async def books(self) -> Books:
        """Return what it has."""
        async with self._http() as http:
            found = (await http.get("/books")).raise_for_status().json()
        return Books(
            files=[BookedFile(**file) for file in found["files"]],
            jobs=[BookedJob(**job) for job in found["jobs"]],
            unfinished=found["unfinished"],
        )


class OpenAISite(HostedSite):
    """OpenAI's wire; training files are uploaded in parts, validation files in one request."""

    wire = backend = "openai"
    config = "model: gpt-4o-mini-2024-07-18\nhyperparameters:\n  epochs: 1\n  batch_size: 128\n"

    def settings(self, url: str) -> dict[str, str]:
        """Lower the limits of uploads."""
        limits = {"MAX_REQUEST_BYTES": "40000", "PART_BYTES": "60000"}
        section = {f"TRAINING_BACKENDS_OPENAI__{name}": value for name, value in limits.items()}
        return {**super().settings(url), **section}


class AzureSite(HostedSite):
    """A dated version of Azure's wire, without metadata; files are uploaded in one request."""

    wire = "azure"
    backend = OpenAISite.backend
    config = OpenAISite.config

    def settings(self, url: str) -> dict[str, str]:
        """Add what its real host's name would tell, and the version."""
        return {
            **super().settings(f"{url}/openai"),
            "TRAINING_BACKENDS_OPENAI__VARIANT": "azure",
            "TRAINING_BACKENDS_OPENAI__QUERY": '{"api-version": "2024-10-21"}',
        }


class TogetherSite(HostedSite):
    """Together's wire."""

    wire = backend = "together"
    config = "model: meta-llama/Tiny-8B\nhyperparameters:\n  epochs: 1\n  batch_size: 8\n"
    create = "POST fine-tunes"


SITES: Final[Mapping[str, Callable[..., Server]]] = MappingProxyType(
    {"mistral": Site, "openai": OpenAISite, "azure": AzureSite, "together": TogetherSite}
)
"""By the name of the wire."""


async def _port_of(gateway: Process) -> int:
    """Read the port from the line that the gateway prints; 0 if it exited before that."""
    assert gateway.stdout is not None
    line = b""
    with anyio.fail_after(60):
        async for text in gateway.stdout:
            line += text
            if b"\n" in line:
                return httpx.URL(json.loads(line)["url"]).port or 0
    return 0


async def _end(gateway: Process) -> None:
    """Interrupt the gateway; kill it if it does not exit."""
    if gateway.returncode is None:
        gateway.send_signal(signal.SIGINT)
        with anyio.move_on_after(20):
            await gateway.wait()
    if gateway.returncode is None:
        gateway.kill()
    await gateway.aclose()
