"""The journal of a launch, stored in the run store."""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial

from anyio import to_thread

from training_backends.client.boundary import callers_own
from training_backends.client.run_record import with_state
from training_backends.core.backend import JSONValue
from training_backends.core.errors import (
    AmbiguousLaunch,
    BudgetExceeded,
    TrainingBackendError,
    may_have_happened,
)
from training_backends.core.estimate import Budget, Estimate
from training_backends.core.logging import get_logger
from training_backends.core.run import RunState, TrainingRun
from training_backends.store import Lease, RunStore

__all__ = ["Confirm", "LaunchWatch", "OnNotice", "OnProgress", "OnUpdate", "StoreJournal"]

OnProgress = Callable[[str, int, int], None]
"""Called with the step's name, bytes done and total bytes."""
OnUpdate = Callable[[TrainingRun], None]
"""Called with the run once it is recorded, and whenever its record changes."""
OnNotice = Callable[[str], None]
"""Called with a notice for the user, such as that the run already exists."""
Confirm = Callable[[Estimate], Awaitable[bool]]
"""Awaited before money is spent; False aborts the launch."""

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchWatch:
    """The callbacks of a launch."""

    on_progress: OnProgress | None = None
    on_update: OnUpdate | None = None
    on_notice: OnNotice | None = None
    confirm: Confirm | None = None

    def notice(self, text: str) -> None:
        """Pass a notice to the user, or log it if there is no callback."""
        (self.on_notice or log.warning)(text)

    async def decide(self, estimate: Estimate, budget: Budget) -> None:
        """Check a cost against the budget, then await `confirm` unless the run is free.

        Raises:
            BudgetExceeded: The cost exceeds the budget, `confirm` returned False, or the cost is
                unknown, the budget limits it and there is no `confirm`.
        """
        budget.check(estimate)
        if estimate.cost is not None and estimate.cost.amount == 0:
            return
        if self.confirm is None:
            if budget.max_cost is None or budget.decides(estimate):
                return
            raise BudgetExceeded(
                "The price of this run is unknown, so budget.max_cost cannot be checked; "
                "nothing was started.",
                hint="Pass `confirm` to decide on an unknown price, or remove budget.max_cost.",
                limit=str(budget.max_cost),
                found="unknown",
            )
        with callers_own():
            agreed = await self.confirm(estimate)
        if not agreed:
            raise BudgetExceeded("The launch was not confirmed; nothing was started.")

    def updated(self, run: TrainingRun) -> None:
        """Pass the current record of the run to `on_update`."""
        if self.on_update:
            with callers_own():
                self.on_update(run)


class StoreJournal:
    """Implements `core.backend.Journal` over a `RunStore`.

    Args:
        lease: Lease of this launch; steps fail once it is lost. None: no lease is needed.
    """

    def __init__(
        self, store: RunStore, run_id: str, watch: LaunchWatch, lease: Lease | None = None
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._watch = watch
        self._lease = lease

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """See `Journal.step`."""
        entry = await to_thread.run_sync(self._store.entry, self._run_id, name)
        if entry is None:
            await to_thread.run_sync(
                partial(self._store.begin, self._run_id, name, lease=self._lease)
            )
        elif entry.finished:
            return entry.result
        elif find is not None:
            found = await find()
            if found is not None:
                log.info("interrupted step found completed", run_id=self._run_id, step=name)
                return await self._finish(name, found)
        elif not repeatable:
            raise AmbiguousLaunch(
                f"An earlier launch was interrupted during {name!r}, and it is unknown whether "
                "that step succeeded.",
                hint="Check the provider's own list of jobs before launching again.",
                run_id=self._run_id,
            )
        return await self._finish(name, await self._do(name, do, find, begun_now=entry is None))

    async def record(self, state: RunState) -> None:
        """See `Journal.record`."""
        run = await to_thread.run_sync(
            self._store.launched, self._run_id, lambda run: with_state(run, state)
        )
        self._watch.updated(run)

    async def quote(self, estimate: Estimate) -> None:
        """See `Journal.quote`."""

        def change(run: TrainingRun) -> TrainingRun:
            quote = estimate.replacing(run.estimate)
            return run.model_copy(update={"estimate": quote, "cost": quote.cost})

        run = await to_thread.run_sync(self._store.update, self._run_id, change)
        self._watch.updated(run)
        await self._watch.decide(run.estimate or estimate, run.config.budget)

    async def known_upload(self, scope: str, sha256: str) -> str | None:
        """See `Journal.known_upload`."""
        return await to_thread.run_sync(self._store.known_upload, scope, sha256)

    async def uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        """See `Journal.uploaded`."""
        await to_thread.run_sync(self._store.uploaded, scope, sha256, remote_id)

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """See `Journal.claimed`."""
        return await to_thread.run_sync(self._store.claimed, self._run_id, remote_ids)

    def progress(self, name: str, done: int, total: int) -> None:
        """See `Journal.progress`."""
        if self._watch.on_progress:
            with callers_own():
                self._watch.on_progress(name, done, total)

    async def _do(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None,
        *,
        begun_now: bool,
    ) -> JSONValue:
        try:
            return await do()
        except TrainingBackendError as error:
            if not may_have_happened(error):
                # A rejection now says nothing about an earlier attempt whose response was lost.
                if begun_now:
                    await to_thread.run_sync(
                        partial(self._store.forget, self._run_id, name, lease=self._lease)
                    )
                raise
            found = await find() if find is not None else None
            if found is None:
                raise
            log.info("response lost, step found completed", run_id=self._run_id, step=name)
            return found

    async def _finish(self, name: str, result: JSONValue) -> JSONValue:
        await to_thread.run_sync(
            partial(self._store.finish, self._run_id, name, result, lease=self._lease)
        )
        return result
