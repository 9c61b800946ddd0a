"""Find the runs of this machine from their directories alone."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from training_backends.backends.local.process import ChildEnvironment, spawn
from training_backends.backends.local.spec import config_of, resolved_model
from training_backends.backends.local.state import is_orphaned, read_state
from training_backends.core.backend import RemoteFilters, RemoteRun
from training_backends.core.files import hold_lock
from training_backends.core.logging import get_logger
from training_backends.core.run import RUN_ID_PATTERN
from training_backends.rundir.directory import RunDir, RunSpec

__all__ = ["find_runs", "revive"]


def revive(
    run: RunDir,
    spec: RunSpec,
    slots_dir: Path | None,
    program: Sequence[str],
    child_env: ChildEnvironment,
) -> None:
    """Start a new process of a queued or suspended run; concurrent callers start only one."""
    with suppress(BlockingIOError), hold_lock(run.path / ".reviving", patience=0):
        if not is_orphaned(run) or not run.end_suspension():
            return  # another process was faster, or it was stopped
        if spec.slots_dir != slots_dir:  # the home was moved
            run.write_spec(spec.model_copy(update={"slots_dir": slots_dir}))
        spawn(run, program, child_env)


log = get_logger()


def find_runs(
    runs: Path, filters: RemoteFilters, opened: Callable[[Path], RunDir] = RunDir
) -> list[RemoteRun]:
    """Read every run directory in `runs`; unreadable ones are logged and skipped."""
    if filters.suffix is not None:
        return []  # local runs have no suffix
    model = filters.model and resolved_model(filters.model)
    return [
        run
        for path in sorted(runs.glob("*/spec.json"), reverse=True)
        if (run := _read(opened(path.parent)))
        and model in {None, run.model}
        and filters.status in {None, run.state.status}
    ]


def _read(directory: RunDir) -> RemoteRun | None:
    run_id = directory.path.name
    if not re.fullmatch(RUN_ID_PATTERN, run_id):
        return None  # not a valid run id
    try:
        spec = directory.read_spec()
        return RemoteRun(
            remote_id=run_id,
            run_id=run_id,
            model=spec.model,
            state=read_state(directory),
            created_at=_created_at(directory),
            config=config_of(spec),
        )
    except (ValueError, FileNotFoundError) as error:  # written by another version, or just deleted
        log.warning("skipped unreadable run directory", path=str(directory.path), reason=str(error))
        return None


def _created_at(directory: RunDir) -> datetime:
    # Every start touches the spec, so the first event may be older.
    started = datetime.fromtimestamp(directory.spec.stat().st_mtime, UTC)
    return min([started, *(event.at for event, _ in directory.read_events()[:1])])
