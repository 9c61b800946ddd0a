"""Runs whose storage is an object store: this machine has a copy of what observing them needs."""

import socket
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from anyio import to_thread

from training_backends.backends.local.backend import require_same
from training_backends.backends.local.checkpoint_copy import unknown_checkpoint
from training_backends.core.concurrency import run_all
from training_backends.core.config import DataSource
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    Issue,
    TrainingBackendError,
)
from training_backends.core.files import hold_lock
from training_backends.core.run import Place, RunState, TrainingRun
from training_backends.objects.store import ObjectStore
from training_backends.rundir.checkpoints import best_step
from training_backends.rundir.directory import ExitRecord, RunDir, RunSpec
from training_backends.rundir.stored import StoredRun

__all__ = ["ObjectStorage"]

_AT_ONCE: Final = 8
"""Runs that are updated concurrently."""
_LOCK_PATIENCE: Final = 3600.0
"""Seconds to wait for another process that downloads the same run's checkpoint."""


class ObjectStorage:
    """The runs below a URL.

    Args:
        home: Directory of this machine for the copies.
        options: Of the store's file system.
    """

    def __init__(self, url: str, home: Path, options: Mapping[str, Any] | None) -> None:
        self.url = url
        self._options = options
        self._digest = sha256(url.encode()).hexdigest()
        self.home = home / self._digest[:16]

    @property
    def place(self) -> Place:
        """The place of its runs: the same for all clients of the storage."""
        return Place(id=self._digest[:32], host=socket.gethostname(), path=self.home)

    def url_of(self, run_id: str) -> str:
        """Return the URL of a run."""
        return f"{self.url}/runs/{run_id}"

    def stored(self, run_id: str) -> StoredRun:
        """Open a run. Blocking.

        Raises:
            BackendNotInstalled: The package of the store is not installed.
        """
        return StoredRun(ObjectStore(self.url_of(run_id), self._options))

    def check(self) -> None:
        """Write, read, list and remove an object. Blocking.

        Raises:
            TrainingBackendError: The storage cannot be used.
        """
        store = ObjectStore(self.url, self._options)
        name = f"runs/.check/{uuid4()}"
        store.write(name, b"check")
        try:
            store.read(name, 0, store.info(name).size)
            store.files("runs/.check")
        finally:
            store.remove(name)

    def issue(self) -> Issue | None:
        """Return what is wrong with the storage. Blocking."""
        try:
            self.check()
        except TrainingBackendError as error:
            is_outage = isinstance(error, BackendUnavailable)
            return Issue(
                code="storage",
                message=error.message.rstrip("."),
                fix=error.hint,
                severity="warning" if is_outage else "error",
            )
        return None

    # -- the copies --------------------------------------------------------------------

    async def update(self, directories: Sequence[RunDir]) -> None:
        """Bring the copies of runs up to date."""

        async def one(directory: RunDir) -> None:
            stored = await to_thread.run_sync(self.stored, directory.path.name)
            await to_thread.run_sync(stored.update, directory)

        await run_all((partial(one, each) for each in directories), at_once=_AT_ONCE)

    async def update_all(self, runs: Path) -> None:
        """Copy all runs of the storage to a directory."""
        store = await to_thread.run_sync(ObjectStore, self.url, self._options)
        names = await to_thread.run_sync(store.directories, "runs")
        await self.update([RunDir(runs / name.rpartition("/")[2]) for name in names])

    def create(self, run: TrainingRun, directory: RunDir, spec: RunSpec) -> None:
        """Upload the inputs of a run, unless they are there. Blocking.

        Raises:
            DuplicateRun: There is another run with this id.
            ConfigError: The data does not exist.
        """
        stored = self.stored(run.id)
        data: dict[str, Path] = {}
        changes = {
            role: tuple(
                _renamed(source, f"data/{role}-{number}", data)
                for number, source in enumerate(getattr(spec, role))
            )
            for role in ("train", "validation")
        }
        spec = spec.model_copy(update=changes)
        stored.update(directory, is_new=True)
        if directory.spec.is_file():
            require_same(directory, spec, run)
            return
        for path in data.values():
            if not path.is_file():
                raise ConfigError(f"{path}: the data is not on this machine.", run_id=run.id)
        stored.create(spec, data)
        stored.update(directory, is_new=True)

    def shown(self, state: RunState) -> RunState:
        """Return a state that names the result in the store, not in the copy."""
        if state.result_model is None or state.remote_id is None:
            return state
        path = Path(state.result_model).relative_to(self.home / "runs" / state.remote_id)
        result = f"{self.url_of(state.remote_id)}/{path.as_posix()}"
        return state.model_copy(update={"result_model": result})

    def request_stop(self, run: TrainingRun, save_checkpoint: bool) -> None:  # noqa: FBT001  # for a thread
        """Ask the driver to stop. Blocking."""
        self.stored(run.id).request_stop(save_checkpoint=save_checkpoint)

    def write_end(self, directory: RunDir, record: ExitRecord) -> None:
        """Record the end of a run whose driver could not. Blocking."""
        stored = self.stored(directory.path.name)
        step = max(stored.checkpoints(), default=0)
        stored.finish(record.model_copy(update={"step": step}), replace=False)
        stored.update(directory)

    # -- what is downloaded or copied on request ---------------------------------------

    def fetch_result(self, directory: RunDir) -> None:
        """Download the trained model of a run into its copy. Blocking."""
        self.stored(directory.path.name).fetch_result(directory)

    def fetch_checkpoint(self, run: TrainingRun, directory: RunDir, requested: str) -> None:
        """Download a checkpoint of a run into its copy. Blocking.

        Raises:
            ConfigError: There is no such checkpoint, or it is damaged.
        """
        stored = self.stored(run.id)
        found = stored.checkpoints()
        step = requested.removeprefix("step-")
        if not step.isdecimal() or int(step) not in found:
            raise unknown_checkpoint(run, requested, found)
        with hold_lock(directory.path / ".checkpoints.lock", _LOCK_PATIENCE):
            reason = stored.fetch_checkpoint(int(step), found[int(step)], directory)
        if reason:
            raise unknown_checkpoint(run, requested, found, damage=reason)

    def copy_checkpoint(self, run: TrainingRun, new_id: str, requested: str | None) -> int:
        """Copy a checkpoint of a finished run to a new one; return the step, 0 if none. Blocking.

        Raises:
            ConfigError: The checkpoint does not exist.
        """
        source, target = self.stored(run.id), self.stored(new_id)
        found = source.checkpoints()
        if requested is None:
            step = max(found, default=0)
        else:
            number = requested.removeprefix("step-")
            step = int(number) if number.isdecimal() else -1
            if step not in found:
                raise unknown_checkpoint(run, requested, found)
        target.copy_tokens(source)
        steps = {step} if step else set()
        best = best_step(found.values()) if run.config.result.checkpoint == "best" else None
        if best is not None and best < step:
            steps.add(best)
        for each in sorted(steps):
            target.copy_checkpoint(source, each, found[each])
        return step

    def remove(self, directory: RunDir) -> None:
        """Remove a run from the store, and its copy. Blocking."""
        stored = self.stored(directory.path.name)
        stored.remove()
        stored.update(directory, is_new=True)


def _renamed(source: DataSource, name: str, data: dict[str, Path]) -> DataSource:
    """Return where a file will be in the run directory; add it to the files to upload."""
    if source.path is None:
        return source
    # The name's end tells whether the file is compressed.
    name += "".join(source.path.suffixes)
    data[name] = source.path
    return source.model_copy(update={"path": Path(name)})
