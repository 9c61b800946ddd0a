"""A server that forks training processes with torch loaded, which takes seconds each time.

`forking.py SOCKET …` does what `python …` does for the trainer's commands and for `-c`, in a
process that the server forks, with the streams, the directory and the environment of the caller.
Not for what libraries read from the environment when they are loaded, such as the address of the
Hub, nor for 4-bit models.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_backends.rundir.directory import RunDir

__all__ = ["Trainer"]

TRAINER = ("-P", "-m", "training_backends.trainer")


def ask(address: str, arguments: Sequence[str]) -> socket.socket:
    """Have a process forked; the answer is a line with its id, later one with its exit code."""
    asked = {"arguments": arguments, "directory": str(Path.cwd()), "environment": dict(os.environ)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
    connection.shutdown(socket.SHUT_WR)
    return connection


class Trainer:
    """Trains one run after the other, each in a process that can be killed."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.address: str = f"{self._directory.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__, "--serve", str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
            )
        self._pid: int | None = None

    @property
    def python(self) -> Path:
        """An interpreter for the setting `local.python`."""
        program = Path(self._directory.name, "bin", "python")
        if not program.exists():
            program.parent.mkdir()
            words = shlex.join([sys.executable, "-I", "-S", __file__, self.address])
            program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            program.chmod(0o755)
        return program

    @property
    def program(self) -> tuple[str, ...]:
        """The command that trains a directory in a forked process, but for the directory."""
        return (sys.executable, "-I", "-S", __file__, self.address, *TRAINER, "train")

    @property
    def worker(self) -> tuple[str, ...]:
        """The command that trains a directory as one of several processes."""
        return (str(self.python), *TRAINER, "work")

    def start(self, run: "RunDir") -> int:
        """Return the id of the process that trains a run, the leader of a group of its own."""
        if self._pid is not None:  # left by a test that failed
            os.killpg(self._pid, signal.SIGKILL)
            self.end()
        self._answers = ask(self.address, [*TRAINER, "train", str(run.path)]).makefile()
        self._pid = int(self._answers.readline())
        return self._pid

    def end(self) -> int:
        """Wait for the process started last; return its exit code, or minus its signal."""
        code = int(self._answers.readline())
        self._pid = None
        return code

    def close(self) -> None:
        """End the server, and what a test that failed has left."""
        if self._pid is not None:
            os.killpg(self._pid, signal.SIGKILL)
        self._server.communicate()
        self._directory.cleanup()


def serve(listener: socket.socket) -> None:
    """Fork a process for each request until standard input ends."""
    import gc  # noqa: PLC0415  # a caller loads none of these
    import select  # noqa: PLC0415

    from training_backends.trainer.environment import importing  # noqa: PLC0415

    with importing("tiny-mistral"):
        import training_backends.trainer.run  # noqa: PLC0415, F401
        from training_backends.trainer.models import make_tiny_model  # noqa: PLC0415

    # What each process would do again: what transformers prepares for the first model that it
    # saves, and the search of all modules for garbage.
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_model(0).save_pretrained(directory)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while 0 not in select.select([listener.fileno(), 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                answer(connection)
            finally:
                os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Fork the process of a request, wait for it, and report it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 2**16, 3)
    while more := connection.recv(2**16):
        message += more
    if (child := os.fork()) == 0:
        connection.close()
        become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with suppress(OSError):  # the caller was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(asked: dict[str, object], streams: Sequence[int]) -> None:
    """Be the process of a request, to its end."""
    import traceback  # noqa: PLC0415

    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(str(asked["directory"]))
        os.environ.clear()
        os.environ.update(asked["environment"])  # type: ignore[call-overload]
        code = run(asked["arguments"])  # type: ignore[arg-type]
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str]) -> int:
    """Do what an interpreter does with its arguments; return the exit code."""
    from training_backends.trainer.__main__ import main  # noqa: PLC0415

    if arguments[:3] == [*TRAINER]:
        if arguments[3] == "work":
            arguments[5:] = [str(os.getppid())]  # in the place of the parent that asked
        return main(arguments[3:])
    unsafe, command, code, *rest = arguments
    assert (unsafe, command) == ("-P", "-c"), arguments
    sys.argv = ["-c", *rest]
    exec(code, {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        pid, code = ask(sys.argv[1], sys.argv[2:]).makefile().read().split()
        sys.exit(int(code))
