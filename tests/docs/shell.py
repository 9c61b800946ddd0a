"""Run shell lines of the documentation in bash, their commands in this process.

`PATH` has a few harmless programs. `training-backends`, and what must not have its effects here,
such as `pip`, are a small program that passes its arguments, directory, environment and standard
input to the test, which answers with output and exit code. So pipes, redirections, substitutions
and exports are bash's, and no command starts an interpreter that loads the package. Any other
program is not found.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from tests.commands import Done

__all__ = ["HARMLESS", "Call", "Handler", "run_in_bash"]

HARMLESS = ("bash", "cat", "curl", "env", "grep", "mkdir", "openssl", "tar")
_CLIENT = """\
import json, os, socket, sys
piped = not sys.stdin.isatty()
call = {
    "words": [os.path.basename(sys.argv[1]), *sys.argv[2:]],
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "stdin": sys.stdin.read() if piped else "",
}
# Not before standard input has ended: calls are answered one after the other.
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["TEST_SOCKET"])
connection.sendall(json.dumps(call).encode())
connection.shutdown(socket.SHUT_WR)
answer = json.loads(connection.makefile().read())
sys.stdout.write(answer["out"])
sys.stdout.flush()
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""


class Call:
    """A command that bash has started."""

    def __init__(self, sent: Mapping[str, object]) -> None:
        words, environment = sent["words"], sent["environment"]
        assert isinstance(words, list)
        assert isinstance(environment, dict)
        self.program: str = words[0]
        self.arguments: tuple[str, ...] = tuple(words[1:])
        self.directory = Path(str(sent["directory"]))
        self.environment: dict[str, str] = environment
        self.stdin = str(sent["stdin"])


Handler = Callable[[Call], Done]


def run_in_bash(
    script: str, directory: Path, handlers: Mapping[str, Handler]
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run a script, which stops at the first error; return its result and what it exported."""
    place = directory / ".bash"
    place.mkdir(exist_ok=True)
    client = place / "client.py"
    client.write_text(_CLIENT)
    for name in handlers:
        program = place / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {client} "$0" "$@"\n')
        program.chmod(0o755)
    for name in HARMLESS:
        if (found := shutil.which(name)) and not (place / name).exists():
            (place / name).symlink_to(found)
    exported = place / "exported"
    address = place / "socket"
    address.unlink(missing_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        # An address has at most 107 bytes.
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listener.bind(f"/proc/self/fd/{descriptor}/socket")
        finally:
            os.close(descriptor)
        listener.listen()
        listener.settimeout(0.02)
        process = subprocess.Popen(
            [
                shutil.which("bash") or "bash",
                "-e",
                "-u",
                "-o",
                "pipefail",
                "-c",
                f"{script}\nwait\nenv -0 > {exported}",
            ],
            cwd=directory,
            env={
                **os.environ,
                "PATH": str(place),
                "TEST_SOCKET": str(address),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while process.poll() is None:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                _answer(connection, handlers)
            out, _ = process.communicate(timeout=10)
        finally:
            process.kill()
            process.wait()
    done = subprocess.CompletedProcess(script, process.returncode, out, "")
    variables = exported.read_text().split("\0") if done.returncode == 0 else []
    pairs = [each.partition("=") for each in variables if each]
    own = {"PATH", "TEST_SOCKET", "PWD", "OLDPWD", "SHLVL", "_"}
    return done, {
        name: text for name, _, text in pairs if name not in own and os.environ.get(name) != text
    }


def _answer(connection: socket.socket, handlers: Mapping[str, Handler]) -> None:
    with connection:
        connection.settimeout(30)
        call = Call(json.loads(connection.makefile().read()))
        done = handlers[call.program](call)
        connection.sendall(
            json.dumps({"out": done.out, "err": done.err, "code": done.code}).encode()
        )
