"""A real Ray cluster of one node."""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import httpx
import psutil
import pytest

from tests.waiting import wait_until

_PORTS: Final = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
)
_RAYS_OWN: Final = 20_000
"""Ray takes the ports of its workers from 10002 to 19999."""


class Cluster:
    """A head that tests start, kill and start again; it answers only with its token."""

    def __init__(self, directory: Path) -> None:
        self.token: Final = secrets.token_hex(24)
        self.directory: Final = directory
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.url: Final = f"http://127.0.0.1:{self._ports['--dashboard-port']}"
        self._head: psutil.Popen | None = None

    def start(self) -> None:
        """Start the head and wait until its node is there."""
        variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--num-cpus=2", f"--temp-dir={self.directory}", "--dashboard-host=127.0.0.1"]
        command += [f"{name}={port}" for name, port in self._ports.items()]
        with (self.directory / "head.log").open("ab") as log:
            self._head = psutil.Popen(
                command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(self._answers, patience=180)

    def _answers(self) -> bool:
        try:
            answer = self.get("/api/v0/nodes")
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and '"ALIVE"' in answer.text

    def get(self, path: str) -> httpx.Response:
        """Ask the dashboard, as any user of the cluster can."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of this cluster whose command contains a text."""
        found = []
        for process in self._head.children(recursive=True) if self._head else ():
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End the head and everything that it has started, at once."""
        if self._head is None:
            return
        for process in (*self._head.children(recursive=True), self._head):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait(60)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        ports = []
        for port in range(_RAYS_OWN + os.getpid() % 10_000, 2 * _RAYS_OWN):
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that all tests share."""
    # Not below pytest's directory: the path of a socket is limited to 107 bytes, and Ray adds 70.
    with TemporaryDirectory(prefix="ray-") as directory:
        cluster = Cluster(Path(directory))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill()
