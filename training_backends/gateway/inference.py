"""Run `transformers serve` on loopback, one process for each model in use."""

import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import anyio
from anyio import to_thread
from anyio.abc import Process, TaskGroup

from training_backends.backends.local.interpreter import THIS_INTERPRETER, Interpreter
from training_backends.core.errors import BackendUnavailable
from training_backends.core.files import make_private_directory
from training_backends.core.logging import get_logger
from training_backends.http.client import HttpClient
from training_backends.http.policy import HttpPolicy
from training_backends.rundir.handover import safe_environment

__all__ = ["InferenceServers", "can_serve", "inference_policy"]

log = get_logger()

_NEEDED: Final = ("torch", "transformers", "fastapi", "uvicorn", "openai")
_LOOK_AGAIN: Final = 0.05
"""Seconds between two attempts to connect to a server that starts."""


def can_serve(interpreter: Interpreter) -> bool:
    """Return whether an environment has the packages of the extra `serving`. Blocking."""
    return all(map(interpreter.has, _NEEDED))


def inference_policy(timeout: float, connections: int) -> HttpPolicy:
    """Return the policy for chats: one attempt, because only the client knows what it wants."""
    return HttpPolicy(
        read_timeout=timeout,
        pool_timeout=timeout,
        call_timeout=timeout,
        attempts=1,
        max_connections=connections,
    )


@dataclass(slots=True, eq=False)
class _ModelServer:
    """One process and the chats that use it."""

    directory: Path
    client: HttpClient
    process: Process | None = None
    users: int = 0
    used_at: float = field(default_factory=anyio.current_time)
    is_ready: bool = False
    settled: anyio.Event = field(default_factory=anyio.Event)
    """Set once it is ready or has ended."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    @property
    def has_ended(self) -> bool:
        return self.scope.cancel_called or (
            self.process is not None and self.process.returncode is not None
        )


class InferenceServers:
    """Servers by model directory: started on demand, kept warm, stopped when idle.

    Args:
        tasks: The servers end with it.
        logs: Directory for the output of the servers.
        limit: Maximum number of servers.
        idle: Seconds without a chat after which a server is stopped.
        interpreter: Python environment of the servers.
        program: Starts a server instead; a port and options are appended.
        options: Appended to the command.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        *,
        logs: Path,
        limit: int,
        idle: float,
        policy: HttpPolicy,
        interpreter: Interpreter = THIS_INTERPRETER,
        program: Sequence[str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._tasks = tasks
        self._logs = logs
        self._limit = limit
        self._idle = idle
        self._policy = policy
        self._interpreter = interpreter
        self._program = interpreter.command("serve") if program is None else program
        self._options = ["--", *options] if options else []
        self._servers: dict[Path, _ModelServer] = {}
        self._changed = anyio.Condition()

    @asynccontextmanager
    async def using(self, directory: Path) -> AsyncIterator[HttpClient]:
        """Yield a client of the server of a model, which is started if necessary.

        Raises:
            BackendUnavailable: The server does not start.
        """
        server = await self._claim(directory)
        try:
            await server.settled.wait()
            if not server.is_ready:
                raise BackendUnavailable("The inference server of the model did not start.")
            yield server.client
        finally:
            server.users -= 1
            server.used_at = anyio.current_time()
            with anyio.CancelScope(shield=True):
                async with self._changed:
                    self._changed.notify_all()

    async def stop(self, directory: Path) -> None:
        """Stop the server of a model, if there is one, and wait until it has ended."""
        if server := self._servers.get(directory):
            server.scope.cancel()
            async with self._changed:
                while self._servers.get(directory) is server:
                    await self._changed.wait()

    async def _claim(self, directory: Path) -> _ModelServer:
        """Return the server of a model, counted as used; wait while all others are in use."""
        async with self._changed:
            while True:
                server = self._servers.get(directory)
                if server is not None and not server.has_ended:
                    server.users += 1
                    return server
                if server is None and len(self._servers) < self._limit:
                    return self._start(directory)
                unused = [each for each in self._servers.values() if not each.users]
                if server is None and not any(each.has_ended for each in unused) and unused:
                    min(unused, key=lambda each: each.used_at).scope.cancel()
                await self._changed.wait()

    def _start(self, directory: Path) -> _ModelServer:
        port = _free_port()
        client = HttpClient(f"http://127.0.0.1:{port}/v1", policy=self._policy)
        server = self._servers[directory] = _ModelServer(directory, client, users=1)
        self._tasks.start_soon(self._run, server, port)
        return server

    async def _run(self, server: _ModelServer, port: int) -> None:
        try:
            with server.scope:
                await self._serve(server, port)
        except OSError as error:
            log.error("inference server not started", reason=str(error))  # noqa: TRY400
        finally:
            server.scope.cancel()
            with anyio.CancelScope(shield=True):
                await server.client.aclose()
                async with self._changed:
                    del self._servers[server.directory]
                    server.settled.set()
                    self._changed.notify_all()

    async def _serve(self, server: _ModelServer, port: int) -> None:
        """Run the process of a server until it exits or has been idle."""
        output = await to_thread.run_sync(self._open_log, server.directory)
        with output:
            process = server.process = await anyio.open_process(
                [*self._program, str(port), *self._options],
                cwd=server.directory,
                env=self._interpreter.variables(safe_environment())
                | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
                # It ends when this pipe closes, even if the gateway is killed.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            if not await _listens(process, port):
                log.error("inference server ended", code=process.returncode, log=output.name)
                return
            server.is_ready = True
            server.settled.set()
            while process.returncode is None:
                with anyio.move_on_after(self._idle):
                    await process.wait()
                if not server.users and anyio.current_time() - server.used_at >= self._idle:
                    return
            log.warning("inference server ended", code=process.returncode, log=output.name)
        finally:
            server.scope.cancel()  # so that it is not claimed while it ends
            with suppress(ProcessLookupError):
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    def _open_log(self, directory: Path) -> IO[bytes]:
        make_private_directory(self._logs)
        return (self._logs / f"{directory.parent.name}-{directory.name}.log").open("wb")


async def _listens(process: Process, port: int) -> bool:
    """Wait until a server accepts connections; return whether it did before it ended.

    `transformers serve` opens its port once the model is loaded.
    """
    while process.returncode is None:
        try:
            connection = await anyio.connect_tcp("127.0.0.1", port)
        except OSError:
            await anyio.sleep(_LOOK_AGAIN)
        else:
            await connection.aclose()
            return process.returncode is None
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
