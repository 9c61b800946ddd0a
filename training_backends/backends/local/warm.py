"""Ask models in a process that stays loaded for the next prompt."""

import json
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import anyio
from anyio import to_thread

from training_backends.backends.local.interpreter import Interpreter
from training_backends.backends.local.process import ChildEnvironment, sendable
from training_backends.core.errors import BackendUnavailable
from training_backends.core.files import make_private_directory
from training_backends.core.run import Prompt, Reply

__all__ = ["WarmModel"]

_LOOK_AGAIN: Final = 0.05
_LONGEST: Final = 2**26


class WarmModel:
    """The process of a home that answers prompts: one model, the last that was asked.

    Args:
        directory: Where its state and its output are kept.
        idle: Seconds without a prompt after which it ends.
    """

    def __init__(self, directory: Path, interpreter: Interpreter, idle: float) -> None:
        self._directory = directory
        self._state = directory / "state.json"
        self._log = directory / "log.txt"
        self._interpreter = interpreter
        self._idle = idle

    async def ask(
        self, model: str, prompt: Prompt, *, max_tokens: int, child_env: ChildEnvironment
    ) -> Reply:
        """Return the answer of a model, which is loaded if it is not the one that is.

        Raises:
            BackendUnavailable: It cannot be loaded, or fails; includes its message.
        """
        asked = {"prompt": sendable(prompt), "max_tokens": max_tokens}
        reply = await self._exchange(model, asked)
        if reply is None:
            reply = await self._started(model, asked, child_env)
        if "error" in reply:
            message = f"Cannot generate with {model}: {reply['error']}"
            raise BackendUnavailable(message, backend="local")
        return Reply.model_validate(reply)

    def stop(self) -> None:
        """Have the process end, if there is one, after the answer that it is working on."""
        self._state.unlink(missing_ok=True)

    async def _exchange(self, model: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Return the reply of the process; None if there is none with this model."""
        try:
            state = json.loads(await to_thread.run_sync(self._state.read_bytes))
            if state["model"] != model:
                return None
            request = json.dumps({"key": state["key"], **asked}).encode() + b"\n"
            async with await anyio.connect_tcp("127.0.0.1", state["port"]) as connection:
                await connection.send(request)
                received = b""
                with suppress(anyio.EndOfStream):
                    while len(received) < _LONGEST:
                        received += await connection.receive()
            reply = json.loads(received)
        except (OSError, ValueError, KeyError, TypeError, anyio.BrokenResourceError):
            return None  # none, or it has just ended
        return reply if isinstance(reply, dict) else None

    async def _started(
        self, model: str, asked: dict[str, Any], child_env: ChildEnvironment
    ) -> dict[str, Any]:
        """Start a process with the model and return its reply."""
        command = self._interpreter.command(
            "answer", str(self._state), model, "--idle", str(self._idle)
        )
        process = await to_thread.run_sync(self._start, command, child_env)
        while process.poll() is None:
            reply = await self._exchange(model, asked)
            if reply is not None:
                return reply
            await anyio.sleep(_LOOK_AGAIN)
        if process.returncode == 0:  # another model was asked meanwhile, and took its place
            return await self._started(model, asked, child_env)
        said = await to_thread.run_sync(lambda: self._log.read_text(errors="replace"))
        reason = said.strip().rpartition("\n")[2] or f"exit {process.returncode}"
        raise BackendUnavailable(f"Cannot generate with {model}: {reason}", backend="local")

    def _start(
        self, command: Sequence[str], child_env: ChildEnvironment
    ) -> "subprocess.Popen[bytes]":
        make_private_directory(self._directory)
        self.stop()
        with self._log.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  # our own program
                command,
                stdin=subprocess.PIPE if child_env.stdin else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_env.variables,
                start_new_session=True,
            )
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(child_env.stdin)
        # Without a wait, the exited process would stay a zombie while this one lives.
        threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
        return process
