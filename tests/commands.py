"""The command line, run in this process or in one of its own."""

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from tests.forking import Program
from training_backends.core.redaction import forget_secrets

__all__ = ["Done", "Run", "run_here", "run_process"]


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


Run = Callable[..., Done]


def run_process(
    program: Program,
    arguments: tuple[str, ...],
    directory: Path,
    stdin: str,
    environment: Mapping[str, str],
) -> Done:
    """Run `training-backends` in a process of its own."""
    done = subprocess.run(
        [*program.command, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, **environment},
        timeout=250,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(
    arguments: tuple[str, ...], directory: Path, stdin: str, environment: Mapping[str, str]
) -> Done:
    """Run `training-backends` in this process and restore what a new process would not share."""
    from training_backends.cli.main import main  # noqa: PLC0415  # typer is not in every install

    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", write_through=True)
    code: Any = 0
    with _process_state(directory, environment):
        sys.argv = ["training-backends", *arguments]
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as exit_:
                code = exit_.code
    for stream in (out, err):
        stream.seek(0)
    return Done(int(code or 0), out.read(), err.read())


@contextmanager
def _process_state(directory: Path, environment: Mapping[str, str]) -> Iterator[None]:
    argv, stdin, before, variables = sys.argv, sys.stdin, Path.cwd(), dict(os.environ)
    root = logging.getLogger()
    handlers, level, structured = list(root.handlers), root.level, structlog.get_config()
    os.environ.update(environment)
    os.chdir(directory)
    forget_secrets()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        forget_secrets()
        logging.captureWarnings(capture=False)
        structlog.configure(**structured)
        root.handlers[:] = handlers
        root.setLevel(level)
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv, sys.stdin = argv, stdin
