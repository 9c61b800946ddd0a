"""The runs of this machine, found in their directories alone."""

import re
from datetime import UTC, datetime
from pathlib import Path

from training_backends.backends.local.planning import config_of, settled_model
from training_backends.backends.local.state import read_state
from training_backends.core.backend import RemoteFilters, RemoteRun
from training_backends.core.logs import get_logger
from training_backends.core.run import RUN_ID_PATTERN
from training_backends.rundir.directory import RunDir

__all__ = ["find_runs"]

log = get_logger()


def find_runs(runs: Path, filters: RemoteFilters) -> list[RemoteRun]:
    """Read every run directory in `runs`; one that cannot be read is logged and left out."""
    if filters.suffix is not None:
        return []  # nothing here has one
    model = filters.model and settled_model(filters.model)
    return [
        run
        for path in sorted(runs.glob("*/spec.json"), reverse=True)
        if (run := _read(RunDir(path.parent)))
        and model in {None, run.model}
        and filters.status in {None, run.state.status}
    ]


def _read(directory: RunDir) -> RemoteRun | None:
    run_id = directory.path.name
    if not re.fullmatch(RUN_ID_PATTERN, run_id):
        return None  # nobody could ask for it
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
    except (ValueError, FileNotFoundError) as error:  # of another version, or just deleted
        log.warning("run directory left out", path=str(directory.path), reason=str(error))
        return None


def _created_at(directory: RunDir) -> datetime:
    # The spec is touched at every start, so an earlier process may have spoken before.
    started = datetime.fromtimestamp(directory.spec.stat().st_mtime, UTC)
    return min([started, *(event.at for event, _ in directory.read_events()[:1])])
