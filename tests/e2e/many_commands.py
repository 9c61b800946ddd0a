"""Run many commands in one process, for each would take a second to start by itself.

    python many_commands.py DIRECTORY < commands.json

A command is `{"arguments": […], "environment": {…}, "stdin": "…"}`. What the n-th writes goes to
`DIRECTORY/n.out` and `DIRECTORY/n.err`; standard output gets the list of exit codes.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.kdf import argon2

from tests.passwords import remembering
from training_backends.cli.main import main


def run(command: dict[str, Any], out: Path, err: Path) -> int:
    """Run one command; return its exit code."""
    saved = os.dup(1), os.dup(2)
    environment = dict(os.environ)
    sys.argv = ["training-backends", *command["arguments"]]
    sys.stdin = io.StringIO(command["stdin"])
    os.environ.update(command["environment"])
    try:
        for number, path in ((1, out), (2, err)):
            with path.open("wb") as file:
                os.dup2(file.fileno(), number)
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
    return 0


if __name__ == "__main__":
    argon2.Argon2id = remembering(argon2.Argon2id)  # type: ignore[assignment]
    directory = Path(sys.argv[1])
    commands = json.load(sys.stdin)
    codes = [
        run(command, directory / f"{number}.out", directory / f"{number}.err")
        for number, command in enumerate(commands)
    ]
    sys.stdout.write(json.dumps(codes))
