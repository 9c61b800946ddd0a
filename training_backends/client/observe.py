"""Observing runs: asks a provider for status and log, and stores the answer."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import ClassVar, Final

from anyio import to_thread
from pydantic import Field

from training_backends.client.boundary import is_about_server, time_limit
from training_backends.client.run_record import LAUNCHED, about, identity, with_state
from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import (
    BackendUnavailable,
    RunNotFound,
    StoreError,
    TrainingBackendError,
)
from training_backends.core.estimate import Duration, format_duration
from training_backends.core.logging import get_logger
from training_backends.core.run import (
    Failure,
    LogRecord,
    Observation,
    RunState,
    Staleness,
    TrainingRun,
    utc_now,
)
from training_backends.core.settings import SectionSettings
from training_backends.core.status import TrainingStatus
from training_backends.core.tracing import poll_span
from training_backends.store import RunStore

__all__ = [
    "BackendOf",
    "Observer",
    "WatchSettings",
    "expected_end",
    "last_change",
    "last_seen",
    "report_change",
]


class WatchSettings(SectionSettings):
    """Section `watch`: `TRAINING_BACKENDS_WATCH__LOST_AFTER` and so on, as `90` (seconds) or `2h`.

    Attributes:
        stalled_after: A run without progress for this long is reported as stalled.
        lost_after: A run that its provider has not found for this long is marked as failed.
        give_up_after: How long `wait` and `logs --follow` tolerate an unreachable provider.
    """

    section: ClassVar[str | None] = "watch"

    stalled_after: Duration = Field(default=timedelta(hours=6))
    lost_after: Duration = Field(default=timedelta(minutes=10))
    give_up_after: Duration = Field(default=timedelta(days=1))


def last_change(run: TrainingRun) -> datetime:
    """Return the time of the last known change of a run."""
    moments = [run.created_at, run.started_at, run.finished_at, run.changed_at]
    moments += [point.at for point in run.checkpoints]
    return max(moment for moment in moments if moment is not None)


def expected_end(run: TrainingRun) -> datetime | None:
    """Return when a run will finish at its current pace, or None if unknown."""
    if run.started_at is None:
        return None
    if run.step and run.total_steps and run.step < run.total_steps:
        reached = last_change(run)
        return run.started_at + (reached - run.started_at) * (run.total_steps / run.step)
    if run.estimate is not None and run.estimate.duration is not None:
        return run.started_at + run.estimate.duration
    return None


log = get_logger()

BackendOf = Callable[[str], Awaitable[TrainingBackend]]
"""Returns the backend with a name."""

_PAGES: Final = 100
"""Parts of a log that are read at once; the next observation continues."""
_WATCH: Final = "watch"
"""Source of log records that the client adds while observing."""


class Observer:
    """Observes runs at their providers and stores the results, each log record once.

    Several processes may observe the same run: records are stored only if the cursor is still the
    one they were requested with, so the second process adds nothing.
    """

    def __init__(self, store: RunStore, backend_of: BackendOf, settings: WatchSettings) -> None:
        self._store = store
        self.backend_of = backend_of
        self.settings = settings

    async def observe(self, run: TrainingRun, *, patience: float | None = None) -> TrainingRun:
        """Observe a run, store its status and new log records, and return it.

        Args:
            patience: Seconds to wait for the answer, if less than the method's own limit.

        Raises:
            RunNotFound: The provider does not have the run, which is now recorded; or it was
                deleted here in the meantime, and nothing was stored.
            UnsupportedOperation: It can only be observed from another machine or home.
            TrainingBackendError: The provider cannot be reached, which is now recorded.
        """
        await self.require_here(run, "observe")
        backend = await self.backend_of(run.backend)
        pages = 0
        while True:
            after = await to_thread.run_sync(self._store.provider_cursor, run.id)
            try:
                with about("observe", run), time_limit(patience, _slow(run, patience)):
                    seen = await backend.observe(run, after=after)
            except RunNotFound:
                await self._not_found(run)
                raise
            except TrainingBackendError as error:
                await self.unreachable([run], error)
                raise
            pages += 1
            more = seen.more and seen.cursor != after
            # The state follows the log, and the end of a run all of its log.
            partial = more and (pages < _PAGES or seen.state.status.is_terminal)
            stored = await self._stored(run, seen, after, partial=partial)
            if stored is not None and not (more and pages < _PAGES):
                return stored

    async def sees(self, run: TrainingRun) -> bool:
        """Return whether a run can be observed from here."""
        if run.place is None or run.status.is_terminal:
            return True
        return (await self.backend_of(run.backend)).sees(run)

    async def require_here(self, run: TrainingRun, verb: str) -> None:
        """Require that a run, finished or not, is accessible from here.

        Raises:
            UnsupportedOperation: It belongs to another machine or home.
        """
        backend = await self.backend_of(run.backend)
        if run.place is not None and not backend.sees(run):
            raise backend.unsupported(
                f"{verb} run {run.id} from here: it belongs to {run.place}",
                f"Run the command on {run.place.host} with TRAINING_BACKENDS_HOME="
                f"{run.place.path}.",
            )

    async def watch(self, run: TrainingRun, *, patience: float | None = None) -> None:
        """Observe a run, and stop it if it exceeds the duration limit of its budget.

        The limit also applies to a run that cannot be observed, based on its recorded start. A
        run that was deleted or is not found at its provider is no error.

        Args:
            patience: See `observe`.

        Raises:
            TrainingBackendError: The provider cannot be reached.
        """
        try:
            with poll_span("training_backends.observe", **identity(run)) as poll:
                seen = await self.observe(run, patience=patience)
                poll.has_changed = seen.status is not run.status
            run = seen
        except RunNotFound:
            return
        except StoreError:
            raise
        except TrainingBackendError as error:
            if not is_about_server(error):
                await self._stop_unseen(run)
            raise
        with suppress(RunNotFound):
            await self.within_budget(run)

    async def mark_unchanged(self, runs: Sequence[TrainingRun]) -> None:
        """Record that runs were observed and have not changed."""
        now = utc_now()
        await to_thread.run_sync(self._store.seen, [run.id for run in runs], now)
        doubted = [run for run in runs if run.stale and run.stale.kind != "stalled"]
        await self._change_all(doubted, partial(_stale, found=None))
        for run in runs:
            with suppress(RunNotFound):  # deleted in the meantime
                if run.stale is None and (found := self._stalled(run, now)):
                    await self._note(run, partial(_stale, found=found), found.message)

    async def unreachable(self, runs: Sequence[TrainingRun], error: TrainingBackendError) -> None:
        """Record that the provider of some runs cannot be reached."""
        found = Staleness(kind="unreachable", since=utc_now(), message=error.message)

        def doubt(now: TrainingRun) -> TrainingRun:
            if now.status.is_terminal or _is_doubted(now, found):
                return now
            again = now.stale is not None and now.stale.kind == found.kind
            since = now.stale.since if now.stale and again else found.since
            return _stale(now, found.model_copy(update={"since": since}))

        trusted = [run for run in runs if not _is_doubted(run, found)]
        await self._change_all([run for run in trusted if await self._is_ours(run)], doubt)

    async def _is_ours(self, run: TrainingRun) -> bool:
        """Return whether this client is able to observe a run at all."""
        with suppress(TrainingBackendError):
            return await self.sees(run)
        return False

    async def _change_all(
        self, runs: Sequence[TrainingRun], change: Callable[[TrainingRun], TrainingRun]
    ) -> None:
        """Change the records of runs, skipping those deleted in the meantime."""
        created = {run.id: run.created_at for run in runs}

        def change_same(now: TrainingRun) -> TrainingRun:
            return change(now) if now.created_at == created[now.id] else now

        await to_thread.run_sync(self._store.update_all, created, change_same)

    # -- results -----------------------------------------------------------------------

    async def _stored(
        self, run: TrainingRun, seen: Observation, after: str | None, *, partial: bool
    ) -> TrainingRun | None:
        """Store an observation; None if another was stored first and ours must be repeated.

        Args:
            partial: Store only the records: more of them follow, and then the state.
        """

        def change(now: TrainingRun) -> TrainingRun:
            if partial:
                return _same(now, run)
            changed = with_state(_same(now, run), seen.state)
            return _stale(changed, self._stalled(changed, utc_now()))

        stored = await to_thread.run_sync(
            lambda: self._store.observed(
                run.id,
                change,
                _with_times(seen),
                after=after,
                cursor=seen.cursor,
                add_status_record=not partial,
                more=partial,
            )
        )
        if stored is None or partial:
            return stored
        report_change(run, stored, seen.state)
        if stored.stale is not None and run.stale is None:
            stored = await self._note(stored, lambda now: now, stored.stale.message)
        return stored

    def _stalled(self, run: TrainingRun, now: datetime) -> Staleness | None:
        since = last_change(run)
        rests = run.status.is_terminal or run.status is TrainingStatus.PAUSED
        if rests or now - since < self.settings.stalled_after:
            return None
        return Staleness(
            kind="stalled",
            since=since,
            message=f"no progress for {format_duration(now - since)}",
        )

    async def _not_found(self, run: TrainingRun) -> None:
        """Record that the provider does not have a run; after `lost_after`, that it is lost."""
        now = utc_now()
        launched = await to_thread.run_sync(self._store.entry, run.id, LAUNCHED)
        if run.status.is_terminal or launched is None:
            return  # an interrupted launch may not have reached the provider
        if run.stale is None or run.stale.kind != "not_found":
            message = "the provider no longer has this run"
            found = Staleness(kind="not_found", since=now, message=message)
            doubt = {"stale": found, "last_seen_at": now}
            await self._note(run, lambda it: it.model_copy(update=doubt), message)
        elif now - run.stale.since > self.settings.lost_after:
            gone = format_duration(now - run.stale.since)
            failure = Failure(
                kind="lost",
                message=f"the provider has not found this run for {gone}",
            )
            state = RunState(status=TrainingStatus.FAILED, failure=failure, finished_at=now)
            await self._note(run, lambda it: it.updated(state), failure.message, status="failed")
        else:
            await to_thread.run_sync(self._store.seen, [run.id], now)

    async def _stop_unseen(self, run: TrainingRun) -> None:
        """Enforce the budget of a run that cannot be observed."""
        try:
            await self.within_budget(run)
        except StoreError:
            raise
        except TrainingBackendError as error:
            log.warning(
                "run that exceeds its budget was not stopped", run_id=run.id, reason=error.message
            )

    async def within_budget(self, run: TrainingRun) -> TrainingRun:
        """Stop a run that has exceeded the duration limit of its budget.

        Raises:
            TrainingBackendError: It cannot be stopped.
        """
        limit = run.config.budget.max_duration
        began = run.started_at
        if limit is None or began is None or run.status.is_terminal:
            return run
        now = utc_now()
        if now - began <= limit or run.status is TrainingStatus.STOPPING:
            return run
        backend = await self.backend_of(run.backend)
        if backend.capabilities.stops:
            with about("stop", run):
                await backend.stop(run)
        if run.failure is not None and run.failure.kind == "timeout":
            return run  # already reported
        took, allowed = format_duration(now - began), format_duration(limit)
        message = f"trained for {took}, which exceeds budget.max_duration ({allowed})"
        verdict = "stopped" if backend.capabilities.stops else "cannot be stopped by this backend"
        failure = Failure(kind="timeout", message=f"{verdict}: {message}")
        return await self._note(
            run, lambda it: it.model_copy(update={"failure": failure}), failure.message
        )

    async def _note(
        self,
        run: TrainingRun,
        change: Callable[[TrainingRun], TrainingRun],
        message: str,
        **fields: str,
    ) -> TrainingRun:
        """Change a record and add the reason to its log."""
        log.warning(message, run_id=run.id, backend=run.backend)
        record = LogRecord(
            at=utc_now(),
            level="warning",
            message=message,
            source="status" if fields else _WATCH,
            fields=fields,
            cursor="",
        )
        return await to_thread.run_sync(
            self._store.note, run.id, lambda now: change(_same(now, run)), [record]
        )


def report_change(before: TrainingRun, after: TrainingRun, reported: RunState) -> None:
    """Log a status change, or a status that contradicts the recorded terminal one."""
    if after.status is not before.status:
        log.info(
            "run changed",
            run_id=after.id,
            backend=after.backend,
            remote_id=after.remote_id,
            before=before.status,
            status=after.status,
        )
    if after.status is not reported.status:
        log.warning(
            "provider contradicts the terminal status",
            run_id=after.id,
            status=after.status,
            told=reported.raw_status or reported.status,
        )


def _with_times(seen: Observation) -> Sequence[LogRecord]:
    """Return the records of an observation; those without a time happened before the end."""
    at = utc_now()
    if seen.state.status.is_terminal and seen.state.finished_at is not None:
        at = min(at, seen.state.finished_at)
    return [
        record if record.at is not None else record.model_copy(update={"at": at})
        for record in seen.records
    ]


def _same(now: TrainingRun, observed: TrainingRun) -> TrainingRun:
    """Return `now` if it is the record of the run that was observed.

    Raises:
        RunNotFound: The run was deleted, and its id belongs to a new run.
    """
    if now.created_at != observed.created_at:
        raise RunNotFound(
            f"Run {now.id} was deleted while its backend was being asked.", run_id=now.id
        )
    return now


def last_seen(run: TrainingRun) -> TrainingRun:
    """Return a run that cannot be observed from here, with the reason in `stale`."""
    message = f"this run can only be observed from {run.place}"
    since = run.last_seen_at or run.created_at
    return _stale(run, Staleness(kind="elsewhere", since=since, message=message))


def _slow(run: TrainingRun, patience: float | None) -> BackendUnavailable:
    return BackendUnavailable(
        f"The backend {run.backend!r} did not finish 'observe' within {patience or 0.0:g} s.",
        backend=run.backend,
        run_id=run.id,
    )


def _is_doubted(run: TrainingRun, found: Staleness) -> bool:
    """Return whether a record already has this reason for being stale."""
    if run.stale is None or run.stale.kind == "stalled":
        return False
    return run.stale.kind != found.kind or run.stale.message == found.message


def _stale(run: TrainingRun, found: Staleness | None) -> TrainingRun:
    return run.model_copy(update={"stale": found})
