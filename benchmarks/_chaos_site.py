"""A gateway in its own process, started from the command line, and its view of files and jobs."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
from anyio.abc import Process

__all__ = ["PROGRAM", "Site", "environment", "install_quick_backend"]

PROGRAM: Final = str(Path(sys.executable).with_name("training-backends"))
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


class Site:
    """One gateway, which is restarted on its state whenever it is killed.

    Attributes:
        key: Its API key.
    """

    def __init__(self, work: Path, name: str, *, backend: str) -> None:
        self._backend = backend
        self._process: Process | None = None
        self._listens = anyio.Event()
        self.home = work / name
        self.key = secrets.token_urlsafe(24)
        self.port = 0
        self._environment = environment(
            work,
            self.home,
            TRAINING_BACKENDS_GATEWAY__API_KEY=self.key,
            TRAINING_BACKENDS_LOG_FORMAT="json",
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the gateway while the block runs; restart it whenever it is killed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_running)
            await self.ready()
            yield
            tasks.cancel_scope.cancel()

    async def ready(self) -> None:
        """Return once the gateway is listening."""
        with anyio.fail_after(60):
            await self._listens.wait()

    def kill(self) -> None:
        """Kill the gateway, as a power failure would; it restarts automatically."""
        if self._process is not None:
            self._listens = anyio.Event()
            self._process.kill()

    async def _keep_running(self) -> None:
        self.home.mkdir(exist_ok=True)
        while True:
            with (self.home / "gateway.log").open("ab") as log:
                self._process = await anyio.open_process(
                    [PROGRAM, "serve", "--backend", self._backend, "--port", "0", "--json"],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                )
            try:
                self.port = await _port_of(self._process)
                if self.port:
                    self._listens.set()
                if await self._process.wait() != -signal.SIGKILL:
                    raise RuntimeError(f"the gateway exited; see {self.home / 'gateway.log'}")
            finally:
                with anyio.CancelScope(shield=True):
                    await _end(self._process)

    async def files(self) -> list[dict[str, Any]]:
        """List all files."""
        return await self._list("/v1/files")

    async def jobs(self) -> list[dict[str, Any]]:
        """List all jobs."""
        return await self._list("/v1/fine_tuning/jobs")

    async def _list(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"http://127.0.0.1:{self.port}"
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http:
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
