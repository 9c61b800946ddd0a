"""The journal of a launch, stored in the run store."""

import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

import anyio
from anyio import to_thread

from training_backends.client.boundary import callers_own, is_callers_own
from training_backends.client.leases import Leases
from training_backends.client.run_record import with_state
from training_backends.core.backend import JSONValue
from training_backends.core.errors import (
    AmbiguousLaunch,
    BudgetExceeded,
    ProtocolError,
    may_have_happened,
)
from training_backends.core.estimate import Budget, Estimate
from training_backends.core.logging import get_logger
from training_backends.core.run import RunState, TrainingRun
from training_backends.store import Lease, RunStore
from training_backends.store.journal import JournalEntry

__all__ = [
    "Confirm",
    "FindingJournal",
    "JournalSteps",
    "LaunchWatch",
    "OnNotice",
    "OnProgress",
    "OnUpdate",
    "ReplayEnded",
    "StoreJournal",
    "may_create_job",
]

OnProgress = Callable[[str, int, int], None]
"""Called with the step's name, bytes done and total bytes."""
OnUpdate = Callable[[TrainingRun], None]
"""Called with the run once it is recorded, and whenever its record changes."""
OnNotice = Callable[[str], None]
"""Called with a notice for the user, such as that the run already exists."""
Confirm = Callable[[Estimate], Awaitable[bool]]
"""Awaited before money is spent; False aborts the launch."""

log = get_logger()

_UPLOAD: Final = "upload:"
_WITHOUT_JOB: Final = ("token:", _UPLOAD)
"""Prefixes of the names of steps that create no job."""
_LOSSES: Final = 10
"""Maximum uploads of a file in one launch, in case the provider loses it."""


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


class JournalSteps(ABC):
    """The rule of `Journal.step`, and what is built on it, over any storage of the steps."""

    @abstractmethod
    async def _entry(self, name: str) -> JournalEntry | None:
        """Return a step, or None if it was never begun."""

    @abstractmethod
    async def _begin(self, name: str) -> None:
        """Store that a step is about to begin."""

    @abstractmethod
    async def _finish(self, name: str, result: JSONValue) -> None:
        """Store a step's result."""

    @abstractmethod
    async def _forget(self, name: str) -> None:
        """Remove a step that was refused."""

    @abstractmethod
    async def _known_upload(self, scope: str, sha256: str) -> str | None:
        """Return the provider's id of uploaded content."""

    @abstractmethod
    async def _uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        """Store the provider's id of uploaded content for all runs."""

    @abstractmethod
    def _alone(self, name: str) -> AbstractAsyncContextManager[object]:
        """Exclude other launches that share the storage from the block."""

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """See `Journal.step`."""
        entry = await self._entry(name)
        if entry is not None and entry.finished:
            return entry.result
        result: JSONValue = None
        if entry is None:
            await self._begin(name)
        elif find is not None:
            result = await find()
        elif not repeatable:
            raise AmbiguousLaunch(
                f"An earlier launch was interrupted during {name!r}, and it is unknown whether "
                "that step succeeded.",
                hint="Check the provider's own list of jobs before launching again.",
            )
        if result is not None:
            log.info("interrupted step found completed", step=name)
        else:
            result = await self._do(name, do, find, begun_now=entry is None)
        with anyio.CancelScope(shield=True):  # what is known to have happened is stored
            await self._finish(name, result)
        return result

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
        except Exception as error:
            if not may_have_happened(error):
                # A rejection now says nothing about an earlier attempt whose response was lost.
                if begun_now:
                    with anyio.CancelScope(shield=True):
                        await self._forget(name)
                raise
            found = None
            if find is not None and not is_callers_own(error):
                found = await find()
            if found is None:
                raise
            log.info("response lost, step found completed", step=name)
            return found

    async def token(self, name: str) -> str:
        """See `Journal.token`."""

        async def draw() -> str:
            return secrets.token_hex(16)

        return str(await self.step(f"token:{name}", draw, repeatable=True))

    async def upload(
        self,
        scope: str,
        sha256: str,
        do: Callable[[], Awaitable[str]],
        find: Callable[[], Awaitable[str | None]],
        has: Callable[[str], Awaitable[bool]],
    ) -> str:
        """See `Journal.upload`."""
        content = hashlib.sha256(f"{scope} {sha256}".encode()).hexdigest()
        async with self._alone(f"upload:{content}"):
            known = await self._known_upload(scope, sha256)
            if known is not None and await has(known):
                return known
            remote_id = await self._upload(sha256, do, find, has)
            await self._uploaded(scope, sha256, remote_id)
            return remote_id

    async def _upload(
        self,
        sha256: str,
        do: Callable[[], Awaitable[str]],
        find: Callable[[], Awaitable[str | None]],
        has: Callable[[str], Awaitable[bool]],
    ) -> str:
        fresh = False

        async def send() -> str:
            nonlocal fresh
            fresh = True
            return await find() or await do()

        for attempt in range(1, _LOSSES + 1):
            name = f"{_UPLOAD}{sha256}" + (f"#{attempt}" if attempt > 1 else "")
            remote_id = str(await self.step(name, send, find))
            if fresh or await has(remote_id):
                return remote_id
        raise ProtocolError(f"The provider repeatedly lost an uploaded file (SHA-256 {sha256}).")


class StoreJournal(JournalSteps):
    """Implements `core.backend.Journal` over a `RunStore`.

    Args:
        lease: Lease of this launch; steps fail once it is lost. None: no lease is needed.
        leases: Leases by which launches share an upload; None: they do not share.
    """

    def __init__(
        self,
        store: RunStore,
        run_id: str,
        watch: LaunchWatch,
        lease: Lease | None = None,
        *,
        leases: Leases | None = None,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._watch = watch
        self._lease = lease
        self._leases = leases

    async def _entry(self, name: str) -> JournalEntry | None:
        return await to_thread.run_sync(self._store.entry, self._run_id, name)

    async def _begin(self, name: str) -> None:
        await to_thread.run_sync(partial(self._store.begin, self._run_id, name, lease=self._lease))

    async def _finish(self, name: str, result: JSONValue) -> None:
        await to_thread.run_sync(
            partial(self._store.finish, self._run_id, name, result, lease=self._lease)
        )

    async def _forget(self, name: str) -> None:
        await to_thread.run_sync(partial(self._store.forget, self._run_id, name, lease=self._lease))

    async def _known_upload(self, scope: str, sha256: str) -> str | None:
        return await to_thread.run_sync(self._store.known_upload, scope, sha256)

    async def _uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        await to_thread.run_sync(self._store.uploaded, scope, sha256, remote_id)

    def _alone(self, name: str) -> AbstractAsyncContextManager[object]:
        return nullcontext() if self._leases is None else self._leases.hold(name)

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

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """See `Journal.claimed`."""
        return await to_thread.run_sync(self._store.claimed, self._run_id, remote_ids)

    def progress(self, name: str, done: int, total: int) -> None:
        """See `Journal.progress`."""
        if self._watch.on_progress:
            with callers_own():
                self._watch.on_progress(name, done, total)


def may_create_job(names: Iterable[str]) -> bool:
    """Return whether any of these steps of a backend may have created a job."""
    return not all(name.startswith(_WITHOUT_JOB) for name in names)


class ReplayEnded(Exception):
    """Ends a launch that is only replayed."""


class FindingJournal(StoreJournal):
    """Replays an interrupted launch up to the job that it created, if any, and begins no other.

    Ends the launch with `ReplayEnded`: once the job is recorded, or at the first step that was
    never begun or had no effect.

    Attributes:
        has_job: None until the launch has ended.
        replayed: Names of the steps that were reached.
    """

    has_job: bool | None = None

    def __init__(self, store: RunStore, run_id: str, lease: Lease, leases: Leases) -> None:
        super().__init__(store, run_id, LaunchWatch(), lease, leases=leases)
        self.replayed: set[str] = set()
        self._may_follow = False

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """See `Journal.step`; what was not begun is not done."""
        entry = await self._entry(name)
        if entry is None and not (repeatable and self._may_follow):
            self._end(has_job=False)
        self.replayed.add(name)
        if entry is None or entry.finished or find is None:
            result = await super().step(name, do, find, repeatable=repeatable)
        elif (result := await find()) is None:
            await self._forget(name)
            self._end(has_job=False)
        else:
            await self._finish(name, result)
        # What only records how a job was created is done: the job's id comes after it.
        self._may_follow |= not repeatable and not name.startswith(_WITHOUT_JOB)
        return result

    async def upload(
        self,
        scope: str,
        sha256: str,
        do: Callable[[], Awaitable[str]],
        find: Callable[[], Awaitable[str | None]],
        has: Callable[[str], Awaitable[bool]],
    ) -> str:
        """See `Journal.upload`; a file that the provider has lost meanwhile is not missed."""
        del has

        async def had(_: str) -> bool:
            return True

        return await super().upload(scope, sha256, do, find, had)

    async def record(self, state: RunState) -> None:
        """See `Journal.record`."""
        await super().record(state)
        if state.remote_id is not None:
            self._end(has_job=True)

    async def quote(self, estimate: Estimate) -> None:
        """See `Journal.quote`; nothing is started, so no consent is needed."""
        del estimate
        self._end(has_job=False)

    def _end(self, *, has_job: bool) -> NoReturn:
        self.has_job = has_job
        raise ReplayEnded
