"""The asynchronous client: launches runs, remembers them, follows and ends them."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio import from_thread, to_thread

from training_backends.client.journal import (
    Confirm,
    LaunchWatch,
    OnProgress,
    OnUpdate,
)
from training_backends.client.launching import RunRecords, Start
from training_backends.client.locks import launch_lock
from training_backends.client.records import (
    ended_state,
    new_run_record,
    require_options,
    require_same,
)
from training_backends.client.store import RunStore
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    TrainingBackend,
)
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    RateLimited,
    RunNotFound,
    WaitTimeout,
)
from training_backends.core.estimate import Estimate
from training_backends.core.logs import get_logger
from training_backends.core.registry import backend_class
from training_backends.core.run import (
    LogRecord,
    TrainingRun,
    ValidationReport,
    new_run_id,
)
from training_backends.core.settings import Settings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.credentials.vault import CredentialVault
from training_backends.datasets.inspect import inspect, raise_for_errors

__all__ = ["AsyncTrainingClient"]

log = get_logger()

_FIRST_POLL, _LONGEST_POLL = 0.2, 15.0
"""Seconds between two looks at a run: a tenth of the time watched, within these."""
_FOLLOW_LOOK = 5.0
"""Seconds after which a followed log brings the run's record up to date again."""
_LAUNCH_PATIENCE = 5.0
"""Seconds for which a stop waits for a launch going on elsewhere to have a job."""


class AsyncTrainingClient:
    """Runs live here: one store, any backend.

    Use it as an async context manager, or call `aclose`.

    Args:
        home: Directory for all state; default `Settings.home`.
        store_url: SQLAlchemy URL of the run store; default SQLite in `home`.
        credentials: Where secrets come from; default the credential vault.
        backends: Backends to use under these names instead of the registered ones.
    """

    def __init__(
        self,
        *,
        home: Path | None = None,
        store_url: str | None = None,
        credentials: CredentialSource | None = None,
        backends: Mapping[str, TrainingBackend] | None = None,
    ) -> None:
        settings = load_settings(Settings)
        self.home = (home or settings.home).expanduser().absolute()
        if home is None:
            store_url = store_url or settings.store_url
        self._store = RunStore(store_url or f"sqlite:///{self.home / 'runs.db'}")
        self._credentials = credentials or CredentialVault(home=self.home)
        self._backends: dict[str, TrainingBackend] = dict(backends or {})
        self._own: list[TrainingBackend] = []
        self._locks = self.home / "locks"
        self._records = RunRecords(self._store, self._locks)
        self._making = anyio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the backends that this client made, and the store."""
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                stack.push_async_callback(to_thread.run_sync, self._store.close)
                for backend in self._own:
                    stack.push_async_callback(backend.aclose)

    def backend(self, name: str) -> TrainingBackend:
        """Return the backend with this name, made on first use.

        Raises:
            ConfigError: No such backend is installed.
            BackendNotInstalled: It cannot be loaded.
        """
        if name not in self._backends:
            context = BackendContext(home=self.home, credentials=self._credentials)
            made = backend_class(name).create(context)
            self._backends[name] = made
            self._own.append(made)
        return self._backends[name]

    async def _backend(self, name: str) -> TrainingBackend:
        """Return the backend; importing it, its first use reads many files, so in a thread."""
        async with self._making:
            if name not in self._backends:
                await to_thread.run_sync(self.backend, name)
            return self._backends[name]

    async def inspect(self, config: TrainingConfig) -> Dataset:
        """Read the data files of a configuration and say what is in them."""

        def check_cancelled(*_: object) -> None:
            from_thread.check_cancelled()

        return await to_thread.run_sync(partial(inspect, config, on_progress=check_cancelled))

    async def validate(self, config: TrainingConfig, *, backend: str) -> ValidationReport:
        """Check configuration and data; nothing is uploaded or spent."""
        chosen = await self._backend(backend)
        dataset, report = await self._judged(chosen, config)
        return ValidationReport(issues=(*dataset.issues, *report.issues), dataset=dataset)

    async def estimate(self, config: TrainingConfig, *, backend: str) -> Estimate:
        """Say what the run will take, as far as that is known before it starts.

        Raises:
            ConfigError: The options are not the backend's.
            DatasetError: The data cannot be used.
        """
        chosen = await self._backend(backend)
        dataset = await self._inspected(chosen, config)
        raise_for_errors(dataset)
        return await chosen.estimate(config, dataset)

    async def launch(
        self,
        config: TrainingConfig,
        *,
        backend: str,
        run_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """Start a run and return once the provider has accepted the start.

        Repeating the call with the same `run_id` continues where it stood and never
        starts a second run.

        Args:
            run_id: The caller's own id; default a new one.
            on_progress: Told of uploads: step, bytes done, bytes in all.
            on_update: Told whenever more is known of the run.
            confirm: Asked before anything that costs money is started.

        Raises:
            ConfigError, DatasetError: The run cannot work; nothing was started.
            BudgetExceeded: It would cost or take too much; nothing was started.
            DuplicateRun: `run_id` belongs to another configuration, or the provider has a
                similar run.
            AmbiguousLaunch: It cannot be told whether an earlier try got through.
        """
        chosen = await self._backend(backend)
        run_id = new_run_id() if run_id is None else run_id
        watch = LaunchWatch(on_progress=on_progress, on_update=on_update, confirm=confirm)
        run = new_run_record(run_id, backend, config)
        async with launch_lock(self._locks, run_id):
            known = await self._records.known(run_id)
            if known is None:
                estimate = await self._prepare(chosen, config, watch)
                run = run.model_copy(update={"estimate": estimate})
                await to_thread.run_sync(self._store.insert, run)
            else:
                require_same(known, run)
            return await self._records.launch(run_id, watch, chosen.launch)

    async def get(self, run_id: str) -> TrainingRun:
        """Return a run as it was last seen, by its id or a unique beginning of it."""
        return await to_thread.run_sync(self._store.get, run_id)

    async def status(self, run_id: str) -> TrainingRun:
        """Ask the provider where a run stands, remember it and return the run."""
        run = await self.get(run_id)
        if run.status.is_terminal or not await self._records.may_be_at_provider(run):
            return run
        backend = await self._backend(run.backend)
        try:
            return await self._records.saw(run, await backend.status(run))
        except RunNotFound:
            if await self._records.was_launched(run):
                raise
            return run  # its launch was cut off before the provider had it

    async def list(
        self, *, backend: str | None = None, status: TrainingStatus | None = None
    ) -> Sequence[TrainingRun]:
        """Return the runs of this store as they were last seen, newest first."""
        return await to_thread.run_sync(lambda: self._store.list(backend=backend, status=status))

    async def logs(
        self, run_id: str, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield a run's log in order; see `TrainingBackend.logs`."""
        run = await self.get(run_id)
        records = (await self._backend(run.backend)).logs(run, after=after, follow=follow)
        looked_at = anyio.current_time()
        async with aclosing(records):
            async for record in records:
                yield record
                due = anyio.current_time() - looked_at > _FOLLOW_LOOK
                if follow and (due or record.source == "status"):
                    await self._look(run.id)
                    looked_at = anyio.current_time()
        if follow:
            await self.status(run.id)

    async def wait(self, *run_ids: str, timeout: float | None = None) -> Sequence[TrainingRun]:
        """Return the runs once all of them are over.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.

        Raises:
            WaitTimeout: The time is over first; the runs go on.
            UnsupportedOperation: The launch of a run was cut off, so it would wait for ever.
        """
        runs = [await self.get(run_id) for run_id in run_ids]
        with anyio.move_on_after(timeout):
            return [await self._wait_for(run.id) for run in runs]
        raise WaitTimeout(
            f"After {timeout:g} s not every run is over; they go on.",
            hint="Wait again with a longer --timeout, or look with `status`.",
        )

    async def stop(self, run_id: str, *, save_checkpoint: bool = True) -> TrainingRun:
        """Ask the provider to end a run; it may take a while until it is over.

        Safe to repeat. A run that was never launched is cancelled at once.

        Raises:
            UnsupportedOperation: It is being launched by somebody else, and has no job yet
                that could be ended.
        """
        run = await self.get(run_id)
        if run.status.is_terminal:
            return run
        if await self._records.may_be_at_provider(run):
            try:
                return await self._stop_at_provider(run, save_checkpoint=save_checkpoint)
            except RunNotFound:
                if await self._records.was_launched(run):
                    raise
        run = await self._cancel_unlaunched(run)
        if run.status.is_terminal:
            return run
        return await self._stop_at_provider(run, save_checkpoint=save_checkpoint)

    async def _stop_at_provider(self, run: TrainingRun, *, save_checkpoint: bool) -> TrainingRun:
        backend = await self._backend(run.backend)
        await backend.stop(run, save_checkpoint=save_checkpoint)
        return await self._records.saw(run, await backend.status(run))

    async def _cancel_unlaunched(self, run: TrainingRun) -> TrainingRun:
        """Cancel a run that its provider does not have; leave it alone if it got there meanwhile.

        Done under the launch's lock: a launch going on elsewhere would start what is
        recorded as over here, and nobody would look at it again.
        """
        with anyio.move_on_after(_LAUNCH_PATIENCE):
            async with launch_lock(self._locks, run.id):
                now = await self.get(run.id)
                if now.remote_id == run.remote_id and not await self._records.was_launched(now):
                    return await self._records.saw(now, ended_state(TrainingStatus.CANCELLED))
                return now
        now = await self.get(run.id)
        if now.remote_id == run.remote_id and not now.status.is_terminal:
            raise (await self._backend(run.backend)).unsupported(
                "stop a run that is just being launched",
                "End the program that launches it, or try again in a while.",
            )
        return now

    async def resume(
        self, run_id: str, *, checkpoint: str | None = None, new_id: str | None = None
    ) -> TrainingRun:
        """Continue a stopped or failed run as a new one; a run not yet started is started.

        Raises:
            UnsupportedOperation: The backend cannot, or the run is still going.
        """
        run = await self.status(run_id)
        backend = await self._backend(run.backend)
        if not run.status.is_terminal and not await self._records.was_launched(run):
            return await self._launch_again(run, backend, checkpoint)
        if run.status not in {TrainingStatus.FAILED, TrainingStatus.CANCELLED}:
            raise backend.unsupported(
                f"resume a run that is {run.status}", "Only a failed or cancelled run is resumed."
            )
        new_run = new_run_record(
            new_run_id() if new_id is None else new_id, run.backend, run.config
        )
        new_run = new_run.model_copy(update={"resumed_from": run.id})
        async with launch_lock(self._locks, new_run.id):
            known = await self._records.known(new_run.id)
            if known is None:
                await to_thread.run_sync(self._store.insert, new_run)
            else:
                require_same(known, new_run)
            return await self._records.launch(
                new_run.id, LaunchWatch(), self._records.resuming(backend, run, checkpoint)
            )

    async def _launch_again(
        self, run: TrainingRun, backend: TrainingBackend, checkpoint: str | None
    ) -> TrainingRun:
        """Go on with a launch that was cut off, as what it was: a start or a resumption."""
        start: Start = backend.launch
        if run.resumed_from is not None:
            start = self._records.resuming(backend, await self.get(run.resumed_from), checkpoint)
        async with launch_lock(self._locks, run.id):
            return await self._records.launch(run.id, LaunchWatch(), start)

    async def download(self, run_id: str, target: Path) -> Path:
        """Fetch the finished model of a run into `target`; it appears whole or not at all.

        Raises:
            UnsupportedOperation: The backend hands out no weights, or the run has no result.
        """
        run = await self.status(run_id)
        backend = await self._backend(run.backend)
        if not backend.capabilities.downloads:
            return await backend.download(run, target)
        if run.status is not TrainingStatus.COMPLETED:
            raise backend.unsupported(
                f"download the model of a run that is {run.status}",
                "Only a completed run has a model.",
            )
        return await backend.download(run, target)

    async def delete(self, run_id: str) -> None:
        """Forget a run that is over, and delete what the provider keeps of it where it can.

        Safe to repeat after a crash: what is gone already is no hindrance.

        Raises:
            UnsupportedOperation: The run is not over.
        """
        run = await self.status(run_id)
        backend = await self._backend(run.backend)
        if not run.status.is_terminal:
            raise backend.unsupported(f"delete a run that is {run.status}", "Stop it first.")
        if backend.capabilities.deletes:
            with suppress(RunNotFound):
                await backend.delete(run)
        await to_thread.run_sync(self._store.delete, run.id)

    async def _inspected(self, backend: TrainingBackend, config: TrainingConfig) -> Dataset:
        """Read the data as the backend's options want it judged.

        Raises:
            ConfigError: The options are not the backend's.
        """
        require_options(backend, config)
        dataset = await self.inspect(config)
        return dataset.tolerating(backend.tolerated_bad_rows(config))

    async def _judged(
        self, backend: TrainingBackend, config: TrainingConfig
    ) -> tuple[Dataset, ValidationReport]:
        """Read the data and ask the backend, which is handed only options that fit."""
        try:
            dataset = await self._inspected(backend, config)
        except ConfigError as error:
            return await self.inspect(config), ValidationReport(issues=error.issues)
        return dataset, await backend.validate(config, dataset)

    async def _prepare(
        self, backend: TrainingBackend, config: TrainingConfig, watch: LaunchWatch
    ) -> Estimate:
        """Do all that can be done before a run exists."""
        dataset, report = await self._judged(backend, config)
        raise_for_errors(dataset)
        if not report.ok:
            raise ConfigError(
                f"The backend {backend.name!r} cannot run this configuration.",
                issues=report.errors,
                backend=backend.name,
            )
        estimate = await backend.estimate(config, dataset)
        config.budget.check(estimate)
        if not backend.capabilities.quotes:
            await watch.decide(estimate)
        return estimate

    async def _wait_for(self, run_id: str) -> TrainingRun:
        watched_since = anyio.current_time()
        while True:
            run = await self._look(run_id)
            if run.status.is_terminal:
                return run
            if await self._records.is_abandoned(run):
                again = (
                    f"`training-backends resume {run.id}` goes on with it."
                    if run.resumed_from
                    else f"`training-backends launch --id {run.id}` with the same configuration "
                    "goes on with it."
                )
                raise (await self._backend(run.backend)).unsupported(
                    f"wait for the run {run.id}, whose launch was cut off", again
                )
            watched = anyio.current_time() - watched_since
            await anyio.sleep(min(max(watched / 10, _FIRST_POLL), _LONGEST_POLL))

    async def _look(self, run_id: str) -> TrainingRun:
        """Ask for a run's status; while the provider is away, take what was last seen."""
        try:
            return await self.status(run_id)
        except (BackendUnavailable, RateLimited) as error:
            log.warning("run cannot be seen now", run_id=run_id, reason=error.message)
            return await self.get(run_id)
