"""Start a training process that outlives its parent."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from training_backends.core.config import TINY_MODEL
from training_backends.core.run import Failure
from training_backends.rundir.directory import ExitRecord, RunDir

__all__ = ["ENGINE", "child_environment", "spawn", "took_lock"]

ENGINE: Final = (sys.executable, "-P", "-m", "training_backends.engine", "train")
"""The training program; its last argument is the run directory."""

# No API key of the parent's gets into the child: it may run for days, and its environment
# can be read by everybody with the same user id.
_PASSED_ON: Final = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHON(PATH|HOME|UTF8)|LD_LIBRARY_PATH"
    r"|XDG_CACHE_HOME|HF_(HOME|ENDPOINT|HUB_OFFLINE|HUB_CACHE|HUB_DOWNLOAD_TIMEOUT)"
    r"|CUDA_\w+|NVIDIA_\w+|(OMP|MKL|OPENBLAS)_NUM_THREADS|PYTORCH_\w+"
    r"|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE",
    re.IGNORECASE,
)
# May hold a password, so it is for those only who go out.
_WAY_OUT: Final = re.compile(r"(HTTPS?|NO|ALL)_PROXY", re.IGNORECASE)


def child_environment(model: str) -> dict[str, str]:
    """Return the part of our environment that a process needs which loads a model."""
    here = model == TINY_MODEL or Path(model).is_dir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if _PASSED_ON.fullmatch(name) or (not here and _WAY_OUT.fullmatch(name))
    }
    return kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def spawn(run: RunDir, program: Sequence[str], model: str) -> int:
    """Start the training process of a run directory; return its process id.

    Starting it twice is harmless: only one gets the directory's lock.
    """
    run.spec.touch()  # tells when it was started, see `state`
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own program and directory
            [*program, str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=child_environment(model),
            start_new_session=True,
        )
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

    The spec is touched right before the start, the lock is written once it is held.
    """
    try:
        return run.lock.stat().st_mtime >= run.spec.stat().st_mtime
    except FileNotFoundError:
        return False
