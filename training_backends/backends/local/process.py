"""Start a training process that outlives its parent."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from training_backends.backends.local.hub import Handed
from training_backends.core.run import Failure
from training_backends.rundir.directory import ExitRecord, RunDir

__all__ = ["ENGINE", "spawn", "took_lock"]

ENGINE: Final = (sys.executable, "-P", "-m", "training_backends.trainer", "train")
"""The training program; its last argument is the run directory."""


def spawn(run: RunDir, program: Sequence[str], handed: Handed) -> int:
    """Start the training process of a run directory; return its process id.

    Starting it twice is harmless: only one gets the directory's lock.
    """
    run.spec.touch()  # tells when it was started, see `state`
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own program and directory
            [*program, str(run.path)],
            stdin=subprocess.PIPE if handed.stdin else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=handed.environment,
            start_new_session=True,
        )
    if process.stdin is not None:
        # Far less than a pipe holds, so this waits for nobody.
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(handed.stdin)
    # Somebody must take its exit status, or it stays a zombie for as long as we live.
    threading.Thread(
        target=_reap, args=(process, run), name=f"reap-{process.pid}", daemon=True
    ).start()
    return process.pid


def _reap(process: "subprocess.Popen[bytes]", run: RunDir) -> None:
    """Wait for the end of a process, and tell of one that could not even begin."""
    code = process.wait()
    if took_lock(run) or run.is_active() or run.exit.is_file() or run.stop.exists():
        return
    if not run.path.is_dir():
        return  # deleted
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = f"The training process could not start: {lines[-1] if lines else f'exit {code}'}"
    failure = Failure(kind="internal", message=message)
    run.write_exit(ExitRecord(status="failed", code=code, failure=failure))


def took_lock(run: RunDir) -> bool:
    """Tell whether the process started last has held the directory's lock.

    The spec is touched right before the start, the lock is written once it is held. Until then
    the lock's file may be there already, empty and new.
    """
    try:
        lock = run.lock.stat()
        return lock.st_size > 0 and lock.st_mtime >= run.spec.stat().st_mtime
    except FileNotFoundError:
        return False
