"""A real Ray cluster on this machine."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    """A head that tests start, kill and start again; it answers only with its token.

    Args:
        variables: Further variables of the nodes' environment.
        cpus: Of each node.
    """

    def __init__(
        self, directory: Path, variables: Mapping[str, str] | None = None, *, cpus: int = 2
    ) -> None:
        self.cpus: Final = cpus
        self._variables = dict(variables or {})
        self._others: dict[str, psutil.Popen] = {}
        self.token: Final = secrets.token_hex(24)
        self.directory: Final = directory
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.url: Final = f"http://127.0.0.1:{self._ports['--dashboard-port']}"
        self._head: psutil.Popen | None = None

    def start(self) -> None:
        """Start the head and wait until its node is there."""
        arguments = ["--head", f"--temp-dir={self.directory}", "--dashboard-host=127.0.0.1"]
        arguments += [f"{name}={port}" for name, port in self._ports.items()]
        self._head = self._start_node("head", arguments)
        wait_until(lambda: self.nodes() == 1, patience=180)

    def join(self, name: str) -> None:
        """Start another node, with a directory of its own for temporary files.

        That of the head is hidden from it, where this user may do so.
        """
        before = self.nodes()
        address = f"--address=127.0.0.1:{self._ports['--port']}"
        agent = f"--dashboard-agent-listen-port={_free_ports(1)[0]}"
        arguments = [address, agent, "--min-worker-port=0", "--max-worker-port=0"]
        hidden = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", hidden, str(self._scratch("head"))]
        self._others[name] = self._start_node(name, arguments, prefix if _can_hide() else [])
        wait_until(lambda: self.nodes() == before + 1, patience=180)

    def lose(self, name: str) -> None:
        """End a node at once, with all that it has."""
        before = self.nodes()
        _kill(self._others.pop(name))
        shutil.rmtree(self._scratch(name))
        wait_until(lambda: self.nodes() == before - 1, patience=180)

    def _start_node(
        self, name: str, arguments: Sequence[str], prefix: Sequence[str] = ()
    ) -> psutil.Popen:
        scratch = self._scratch(name)
        scratch.mkdir(exist_ok=True)
        variables = self._variables | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(scratch),
        }
        command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--num-cpus={self.cpus}", *arguments]
        with (self.directory / f"{name}.log").open("ab") as log:
            return psutil.Popen(
                command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
            )

    def _scratch(self, name: str) -> Path:
        return self.directory / f"tmp-{name}"

    def nodes(self) -> int:
        """Return how many nodes are alive."""
        try:
            answer = self.get("/api/v0/nodes")
        except httpx.TransportError:
            return 0
        return answer.text.count('"ALIVE"') if answer.status_code == 200 else 0

    def get(self, path: str) -> httpx.Response:
        """Ask the dashboard, as any user of the cluster can."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of this cluster whose command contains a text."""
        found = []
        nodes = [*([self._head] if self._head else ()), *self._others.values()]
        for process in (each for node in nodes for each in _children_of(node)):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End the nodes and everything that they have started, at once."""
        for node in (*self._others.values(), *([self._head] if self._head else ())):
            _kill(node)
        self._others.clear()


def _can_hide() -> bool:
    command = ["unshare", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


def _children_of(node: psutil.Popen) -> list[psutil.Process]:
    """Return the processes that a node has started."""
    try:
        return list(node.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _kill(node: psutil.Popen) -> None:
    """End a node and everything that it has started, at once."""
    for process in (*_children_of(node), node):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait(60)


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
