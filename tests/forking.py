"""Servers that fork processes with modules loaded, which takes seconds each time.

`forking.py SOCKET …` does what `python …` does, in a process that the server forks, with the
streams, the directory and the environment of the caller. Not for what libraries read from the
environment when they are loaded, such as the address of the Hub, nor for 4-bit models.

A `Trainer` has torch loaded, for the trainer's commands and for `-c`. What it starts outlives its
caller, except the processes of a group, each of which is killed with its caller. A `Program` has
the command line loaded, for `-m`, `-c` and scripts. What it starts gets its caller's Ctrl-C and
SIGTERM, and is killed with it. It is no child of the caller's, though, nor in its session, and has
none of its other descriptors: tests of those use a process of their own. So do tests of how the
command line ends; only `-c` ends as the interpreter does. `Preloaded` does the same with the
libraries of the tests loaded; the workers of xdist are forked from it, and need not load them.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:  # a caller loads as little as possible
    from collections.abc import Iterator
    from pathlib import Path

    from training_backends.rundir.directory import RunDir

__all__ = ["ForkServer", "Preloaded", "Program", "Trainer"]

TRAINER = ("-P", "-m", "training_backends.trainer")


def ask(address: str, arguments: Sequence[str]) -> socket.socket:
    """Have a process forked; the answer is a line with its id, later one with its exit code."""
    asked = {
        "arguments": arguments,
        "directory": os.getcwd(),  # noqa: PTH109  # pathlib takes long to load
        "environment": dict(os.environ),
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
    return connection


class ForkServer:
    """Forks a process for each call of its interpreter."""

    loads: str
    """The function that loads the modules."""

    def __init__(self, address: str) -> None:
        self.address = address

    @classmethod
    @contextmanager
    def serving(cls, *, at_once: bool = False) -> "Iterator[str]":
        """Run a server, and yield its address.

        Args:
            at_once: It does not wait for the first call to load the modules.
        """
        import shlex  # noqa: PLC0415
        import subprocess  # noqa: PLC0415
        import tempfile  # noqa: PLC0415

        with (
            tempfile.TemporaryDirectory() as directory,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            here = cls(f"{directory}/socket")
            listener.bind(here.address)
            listener.listen()
            here.python.write_text(f'#!/bin/sh\nexec {shlex.join(here._words)} "$@"\n')
            here.python.chmod(0o755)
            serve = ["--load" if at_once else "--serve", str(listener.fileno()), cls.loads]
            with subprocess.Popen(
                [sys.executable, "-P", __file__, *serve],
                stdin=subprocess.PIPE,  # ends it when closed
                pass_fds=[listener.fileno()],
            ):
                yield here.address

    @property
    def python(self) -> "Path":
        """An interpreter, as a program."""
        from pathlib import Path  # noqa: PLC0415

        return Path(self.address).with_name("python")

    @property
    def _words(self) -> tuple[str, ...]:
        return (sys.executable, "-I", "-S", __file__, self.address)


class Program(ForkServer):
    """Runs the command line, and scripts that import the package."""

    loads = "load_program"

    @property
    def command(self) -> tuple[str, ...]:
        """What `training-backends` is, without its arguments."""
        return (*self._words, "-m", "training_backends")

    @property
    def _words(self) -> tuple[str, ...]:
        return (*super()._words, "--attached")


class Preloaded(Program):
    """Runs code and scripts that need the libraries of the tests, such as torch."""

    loads = "load_libraries"


class Trainer(ForkServer):
    """Trains one run after the other, each in a process that can be killed."""

    loads = "load_trainer"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._pid: int | None = None

    @property
    def program(self) -> tuple[str, ...]:
        """The command that trains a directory in a forked process, but for the directory."""
        return (*self._words, *TRAINER, "train")

    @property
    def worker(self) -> tuple[str, ...]:
        """The command that trains a directory as one of several processes."""
        return (str(self.python), *TRAINER, "work")

    def start(self, run: "RunDir", *, forks: bool = False) -> int:
        """Return the id of the process that trains a run, the leader of a group of its own.

        Args:
            forks: The processes that train together are forked too, not started.
        """
        if self._pid is not None:  # left by a test that failed
            os.killpg(self._pid, signal.SIGKILL)
            self.end()
        arguments = [*TRAINER, "train", str(run.path)]
        if forks:
            arguments = ["-P", "-c", TRAIN_FORKING, str(run.path), *self.worker]
        self._answers = ask(self.address, arguments).makefile()
        self._pid = int(self._answers.readline())
        return self._pid

    def end(self) -> int:
        """Wait for the process started last; return its exit code, or minus its signal."""
        code = int(self._answers.readline())
        self._pid = None
        return code

    def close(self) -> None:
        """End what a test that failed has left."""
        if self._pid is not None:
            os.killpg(self._pid, signal.SIGKILL)


TRAIN_FORKING = """
import sys
from functools import partial
from pathlib import Path
from training_backends.trainer.launch import launch
from training_backends.trainer.process import train
sys.exit(train(Path(sys.argv[1]), partial(launch, program=sys.argv[2:])))
"""


def load_trainer() -> None:
    """Load torch and what each process would prepare again."""
    import tempfile  # noqa: PLC0415  # a caller loads none of these

    from training_backends.trainer.environment import importing  # noqa: PLC0415

    with importing("tiny-mistral"):
        import peft  # noqa: PLC0415, F401

        import training_backends.trainer.run  # noqa: PLC0415, F401
        from training_backends.trainer.models import make_tiny_model  # noqa: PLC0415

    # What transformers prepares for the first model that it saves.
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_model(0).save_pretrained(directory)


def load_program() -> None:
    """Load the command line, the backends and the gateway."""
    from importlib import import_module  # noqa: PLC0415

    for name in (
        "cli.main",
        "client.client",
        "backends.local.backend",
        "backends.mistral.backend",
        "backends.openai.backend",
        "backends.together.backend",
        "gateway.server",
        "testing.backend",
    ):
        import_module(f"training_backends.{name}")


def load_libraries() -> None:
    """Load the libraries that a worker would load for longest, as far as they are installed."""
    import gc  # noqa: PLC0415  # a caller loads none of these
    from importlib import import_module  # noqa: PLC0415

    gc.disable()
    for name in (
        "bitsandbytes",
        "mistral_common.protocol.instruct.request",
        "mistralai.client",
        "moto.server",
        "openai",
        "peft",
        "s3fs",
        "transformers.models.mistral.modeling_mistral",
        "training_backends.gateway.server",
        "training_backends.trainer.run",
    ):
        with suppress(ImportError):
            import_module(name)
    gc.enable()


def serve(listener: socket.socket, name: str, *, at_once: bool) -> None:
    """Fork a process for each request until standard input ends."""
    import gc  # noqa: PLC0415  # a caller loads none of these
    import select  # noqa: PLC0415
    from functools import cache  # noqa: PLC0415

    @cache
    def load() -> None:
        globals()[name]()
        gc.collect()
        gc.freeze()

    if at_once:
        load()
    while 0 not in select.select([listener.fileno(), 0], [], [])[0]:
        load()
        connection, _ = listener.accept()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            try:
                answer(connection)
            finally:
                os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Fork the process of a request, wait for it, and report it."""
    import threading  # noqa: PLC0415

    message, streams, _, _ = socket.recv_fds(connection, 2**16, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(2**16)
    asked = json.loads(message)
    if (child := os.fork()) == 0:
        connection.close()
        become(asked, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())

    ended = threading.Event()

    def follow_caller() -> None:
        with suppress(OSError):
            connection.recv(1)  # nothing, when the caller is gone
        if not ended.is_set():
            os.kill(child, signal.SIGKILL)

    if asked["arguments"][0] == "--attached" or asked["arguments"][:4] == [*TRAINER, "work"]:
        threading.Thread(target=follow_caller, daemon=True).start()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    ended.set()
    _, status = os.waitpid(child, 0)
    with suppress(OSError):  # the caller was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(asked: Mapping[str, object], streams: Sequence[int]) -> None:
    """Be the process of a request, to its end."""
    import atexit  # noqa: PLC0415
    import ctypes  # noqa: PLC0415
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
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    finally:
        if asked["arguments"][:2] == ["--attached", "-c"]:  # type: ignore[index]
            ctypes.pythonapi.Py_Exit(code)  # as the interpreter ends: threads, objects, streams
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str]) -> int:
    """Do what an interpreter does with its arguments; return the exit code."""
    if arguments[0] == "--attached":
        start_program(arguments[1:])
        return 0

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


def start_program(arguments: list[str]) -> None:
    """Run a module, code or a script with what an interpreter takes from its environment."""
    import runpy  # noqa: PLC0415
    import tempfile  # noqa: PLC0415
    import warnings  # noqa: PLC0415
    from types import ModuleType  # noqa: PLC0415

    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, name, lines in ((1, "stdout", os.isatty(1)), (2, "stderr", True)):
        stream = open(  # noqa: SIM115
            number,
            "w",
            1 if lines or unbuffered else -1,
            "utf-8",
            "backslashreplace",
            closefd=False,
        )
        setattr(sys, name, stream)
    for action in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(action)  # type: ignore[arg-type]
    tempfile.tempdir = None
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-u":
        arguments = arguments[1:]  # all streams are flushed at the end
    if arguments[0] == "-m":
        sys.path.insert(0, "")
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *arguments[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def call(address: str, arguments: Sequence[str]) -> int:
    """Have a process forked and wait for it; return its exit code, or minus its signal."""
    answers = ask(address, arguments).makefile()
    child = int(answers.readline())
    if arguments[0] == "--attached":
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, _: os.kill(child, number))
    return int(answers.readline())


if __name__ == "__main__":
    if sys.argv[1] in ("--serve", "--load"):
        listener = socket.socket(fileno=int(sys.argv[2]))
        serve(listener, sys.argv[3], at_once=sys.argv[1] == "--load")
    elif (code := call(sys.argv[1], sys.argv[2:])) < 0:
        with suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    else:
        sys.exit(code)
