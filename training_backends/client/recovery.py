"""Rebuild a damaged run store from its readable parts and the providers' job lists."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread

from training_backends.client.observe import BackendOf
from training_backends.client.run_record import LAUNCHED
from training_backends.core.backend import RemoteFilters, RemoteRun
from training_backends.core.errors import TrainingBackendError
from training_backends.core.run import RUN_ID_PATTERN, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.store import RunStore
from training_backends.store.journal import SavedStep
from training_backends.store.salvage import Salvage, salvage, set_aside

__all__ = ["Recovery", "recover"]

_TAG = "recovered"
"""Tag of runs found only at their provider; they may belong to others on the same account."""
_BEFORE_START = frozenset({TrainingStatus.PENDING, TrainingStatus.VALIDATING, TrainingStatus.READY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The result of a recovery.

    Attributes:
        damaged: Path of the backup of the old store; None if there was none.
        saved: Ids of the runs read from it.
        found: Ids of further runs found at providers.
        left_out: Number of provider jobs with too little data to restore a run.
        unasked: Backends whose jobs could not be listed, with the reason.
    """

    damaged: Path | None = None
    saved: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    left_out: int = 0
    unasked: Mapping[str, str] = field(default_factory=dict)


async def recover(
    url: str, store: RunStore, names: Iterable[str], backend_of: BackendOf
) -> Recovery:
    """Back up a run store and rebuild it.

    Args:
        store: The store at `url`; its connections are closed first.
        names: Backends whose jobs are listed.

    Raises:
        StoreError: Another process uses the store, or its files cannot be moved.
    """
    await to_thread.run_sync(store.close)
    damaged = await to_thread.run_sync(set_aside, url, utc_now())
    old = await to_thread.run_sync(salvage, damaged) if damaged else Salvage()
    for run in old.runs:
        await to_thread.run_sync(store.restore, run, old.steps.get(run.id, []))
    if old.gateway:
        await to_thread.run_sync(store.restore_gateway, old.gateway)
    # A store without a file, such as PostgreSQL, is not backed up and keeps its runs.
    there = await to_thread.run_sync(store.list)
    known = {(run.backend, run.remote_id) for run in there}
    taken = {run.id for run in there}
    found: list[str] = []
    left_out = 0
    unasked: dict[str, str] = {}
    for name in names:
        try:
            backend = await backend_of(name)
            if not backend.capabilities.lists_remote:
                continue
            listed = await backend.list_remote(RemoteFilters())
        except TrainingBackendError as error:
            unasked[name] = error.message
            continue
        for remote in listed:
            if (name, remote.remote_id) in known:
                continue
            made = _run_of(name, remote, taken)
            if made is None:
                left_out += 1
                continue
            taken.add(made.id)
            found.append(made.id)
            await to_thread.run_sync(store.restore, made, _steps_of(remote))
    return Recovery(
        damaged=damaged,
        saved=[run.id for run in old.runs],
        found=found,
        left_out=left_out,
        unasked=unasked,
    )


def _run_of(backend: str, remote: RemoteRun, taken: set[str]) -> TrainingRun | None:
    """Return a record for a job found at its provider, or None if its data is incomplete."""
    if remote.config is None:
        return None
    run_id = remote.run_id or f"{backend}-{remote.remote_id}"
    if run_id in taken or not re.fullmatch(RUN_ID_PATTERN, run_id):
        return None
    tags = remote.config.tags if remote.run_id else {**remote.config.tags, _TAG: "true"}
    run = TrainingRun(
        id=run_id,
        backend=backend,
        config=remote.config.model_copy(update={"tags": tags}),
        remote_id=remote.remote_id,
        created_at=remote.created_at or utc_now(),
    )
    return run.updated(remote.state)


def _steps_of(remote: RemoteRun) -> list[SavedStep]:
    """Return the journal of a restored run; a started job is marked as launched."""
    if remote.state.status in _BEFORE_START:
        return []
    return [SavedStep(LAUNCHED, utc_now().isoformat(timespec="microseconds"), "true")]
