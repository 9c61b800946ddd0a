"""The asynchronous client: launches, records, observes and controls runs."""

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import anyio
from anyio import to_thread

from training_backends.client.attempts import Attempts, OnRecord
from training_backends.client.boundary import guarded, make_backend
from training_backends.client.config_file import ConfigLike
from training_backends.client.follow import Following, is_reached
from training_backends.client.journal import (
    Confirm,
    LaunchWatch,
    OnNotice,
    OnProgress,
    OnUpdate,
)
from training_backends.client.launch import RunRecords, Steering
from training_backends.client.leases import Leases
from training_backends.client.notebook import notebook_progress
from training_backends.client.observe import Observer, WatchSettings, last_seen
from training_backends.client.poller import Poller
from training_backends.client.preparation import Preparation
from training_backends.client.recovery import Recovery, recover
from training_backends.client.remote_data import RemoteData
from training_backends.client.results import Results
from training_backends.client.run_record import (
    launch_lease,
    new_run_record,
    require_same,
    with_known_data,
)
from training_backends.client.watch import OnEvent, Watcher
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    TrainingBackend,
)
from training_backends.core.concurrency import run_all
from training_backends.core.dataset import CountProgress, Dataset
from training_backends.core.errors import (
    BackendUnavailable,
    RunNotFound,
    StoreError,
    TrainingBackendError,
    UnsupportedOperation,
    WaitTimeout,
)
from training_backends.core.estimate import Estimate
from training_backends.core.logging import get_logger
from training_backends.core.plugins import installed_backends
from training_backends.core.run import (
    LogRecord,
    Prompt,
    Reply,
    TrainingRun,
    ValidationReport,
    new_run_id,
    utc_now,
)
from training_backends.core.settings import Settings, load_settings
from training_backends.core.status import TrainingStatus, statuses_of
from training_backends.core.tracing import span
from training_backends.credentials.vault import CredentialVault
from training_backends.objects.cache import ObjectCache, objects_directory
from training_backends.objects.settings import ObjectSettings
from training_backends.store import Metrics, RunStore
from training_backends.store.changes import Changes
from training_backends.store.salvage import check

if TYPE_CHECKING:
    from training_backends.client.evaluation import EvaluatedRow, Evaluation, Scorer

__all__ = ["AsyncTrainingClient"]

log = get_logger()


class AsyncTrainingClient:
    """Launches and manages runs in one run store, on any backend.

    Use it as an async context manager, or call `aclose`.

    Args:
        home: Directory for all state; default: `Settings.home`.
        store_url: SQLAlchemy URL of the run store; default: SQLite in `home`.
        credentials: Source of secrets; default: the credential vault.
        backends: Backends by name, used instead of the registered ones.
        objects: How remote data is read; default: from the settings.
    """

    def __init__(
        self,
        *,
        home: Path | str | None = None,
        store_url: str | None = None,
        credentials: CredentialSource | None = None,
        backends: Mapping[str, TrainingBackend] | None = None,
        objects: ObjectSettings | None = None,
    ) -> None:
        settings = load_settings(Settings)
        self.home: Path = Path(home or settings.home).expanduser().absolute()
        if home is None:
            store_url = store_url or settings.store_url
        self._store_url = store_url or f"sqlite:///{self.home / 'runs.db'}"
        self._store = RunStore(self._store_url)
        objects = objects or load_settings(ObjectSettings)
        self._credentials = credentials or CredentialVault(home=self.home)
        self._backends = {name: guarded(given, name) for name, given in (backends or {}).items()}
        self._own: list[TrainingBackend] = []
        watching = load_settings(WatchSettings)
        self._leases = Leases(self._store, self.home / "leases")
        remote = RemoteData(ObjectCache(objects_directory(self.home)), objects)
        inspections = self.home / "cache" / "data"
        self._preparation = Preparation(self._store, self._backend, remote, inspections)
        self._records = RunRecords(self._store, self._leases, self._preparation.localized)
        self._observer = Observer(self._store, self._backend, watching)
        self._steering = Steering(self._store, self._leases, self._records, self._observer)
        self._following = Following(
            self._store,
            self._leases,
            self._records,
            self._observer,
            self._poller,
            changes=Changes(self._store, self._store_url),
        )
        self._attempts = Attempts(
            self._store, self._records, self._following, stop=self.stop, resume=self.resume
        )
        self._results = Results(
            self._observer,
            home=self.home,
            status=self.status,
            credentials=self._credentials,
            object_options=objects.options,
            store=self._store,
            leases=self._leases,
        )
        self._making = anyio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the store and the backends created by this client.

        The client cannot be used afterwards. Safe to repeat.
        """
        self._closed = True
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                stack.push_async_callback(to_thread.run_sync, self._store.close)
                stack.push_async_callback(to_thread.run_sync, self._leases.close)
                for backend in self._own:
                    stack.push_async_callback(_close, backend)

    def backend(self, name: str) -> TrainingBackend:
        """Return the backend with this name, creating it on first use.

        Its methods have time limits and raise `BackendBroken` for exceptions from outside this
        package.

        Raises:
            TrainingBackendError: The client is closed; every method raises this.
            ConfigError: No such backend is installed.
            BackendNotInstalled: The backend cannot be imported.
            BackendBroken: The backend cannot be created.
            BackendUnavailable: Creating the backend took longer than a minute.
        """
        self._require_open()
        _require_text("backend", name)
        if name not in self._backends:
            context = BackendContext(home=self.home, credentials=self._credentials)
            made = make_backend(name, context)
            self._backends[name] = made
            self._own.append(made)
        return self._backends[name]

    async def _backend(self, name: str) -> TrainingBackend:
        """Return the backend; created in a thread, because importing it reads many files."""
        self._require_open()
        _require_text("backend", name)
        async with self._making:
            if name not in self._backends:
                await to_thread.run_sync(self.backend, name)
            return self._backends[name]

    async def inspect(self, config: ConfigLike, *, backend: str | None = None) -> Dataset:
        """Read and check the data files of a configuration.

        Args:
            config: A configuration, a mapping or the path of a YAML file, as in every method.
                Relative data paths are resolved against the file, or else the working directory.
            backend: Check the rows for this backend; None: for the Mistral protocol.
        """
        chosen = None if backend is None else await self._backend(backend)
        recorded = await self._preparation.recorded(config, chosen)
        return await self._preparation.inspect(recorded, chosen)

    async def validate(self, config: ConfigLike, *, backend: str) -> ValidationReport:
        """Check configuration and data without uploading or spending anything."""
        chosen = await self._backend(backend)
        recorded = await self._preparation.recorded(config, chosen)
        return await self._preparation.validate(recorded, chosen)

    async def estimate(
        self,
        config: ConfigLike,
        *,
        backend: str,
        sample: int | None = None,
        exact: bool = False,
        on_counting: CountProgress | None = None,
    ) -> Estimate:
        """Estimate the tokens, steps, cost and duration of a run, as far as they are known.

        Args:
            sample: Count the tokens of this many rows and return an interval; None: of all rows,
                or of a sample if the data is large.
            exact: Count all rows, even if the data is large.
            on_counting: Called with the file, the bytes counted and its size.

        Raises:
            ConfigError: The configuration has fields or options that the backend does not support.
            DatasetError: The data has errors.
        """
        chosen = await self._backend(backend)
        recorded = await self._preparation.recorded(config, chosen)
        return await self._preparation.estimate(
            recorded, chosen, sample=sample, exact=exact, on_counting=on_counting
        )

    async def launch(
        self,
        config: ConfigLike,
        *,
        backend: str,
        run_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        on_notice: OnNotice | None = None,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """Launch a run and return once the provider has accepted it.

        Idempotent by `run_id`: repeating the call continues an interrupted launch and never
        starts a second run.

        Args:
            run_id: Your own id; default: a generated one.
            on_progress: Called during uploads with the step, bytes done and total bytes.
            on_update: Called with the run once it is recorded, and whenever its record changes.
            on_notice: Called with notices for the user, such as that the run already exists or
                that its data has changed; default: notices are logged.
            confirm: Awaited before a run that costs money is started. Without it, a run is
                started at any price within the budget, and at an unknown price only if
                `budget.max_cost` is not set.

        Raises:
            ConfigError, DatasetError: The configuration or data is invalid; nothing was started.
            BudgetExceeded: Cost or duration exceeds the budget, or the price is unknown and
                cannot be compared with it; nothing was started.
            DuplicateRun: `run_id` belongs to another configuration, or the provider has a
                similar run.
            AmbiguousLaunch: It is unknown whether an earlier attempt succeeded.
        """
        chosen = await self._backend(backend)
        config = await self._preparation.recorded(config, chosen)
        await to_thread.run_sync(self._results.check_destination, config)
        run_id = new_run_id() if run_id is None else _require_text("run_id", run_id)
        watch = LaunchWatch(
            on_progress=on_progress, on_update=on_update, on_notice=on_notice, confirm=confirm
        )
        run = new_run_record(run_id, backend, config)
        async with self._leases.hold(launch_lease(run_id)) as lease:
            known = await self._records.known(run_id)
            if known is None:
                dataset, estimate = await self._preparation.prepare(config, chosen, watch)
                run = run.model_copy(update={"estimate": estimate})
                await to_thread.run_sync(self._store.insert, run)
                named = {source.path for source in (*config.data.train, *config.data.validation)}
                mine = [file for file in dataset.files if file.path in named]
                await self._records.remember_data(run_id, mine)
                watch.updated(run)
            else:
                run, changed = with_known_data(known, run)
                require_same(known, run)
                await self._records.notice_known(known, watch, changed)
                if not await self._records.was_launched(known):
                    await self._observer.require_here(known, "launch")
            return await self._records.launch(run_id, watch, chosen.launch, lease=lease)

    async def run(
        self,
        config: ConfigLike,
        *,
        backend: str,
        run_id: str | None = None,
        attempts: int = 3,
        follow: bool = True,
        on_record: OnRecord | None = None,
        progress: bool = True,
        stop_on_cancel: bool = True,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """Launch a run, follow it to its end and return it; the one call that a task needs.

        A run whose failure is temporary is resumed as `ID-r1`, then `ID-r2`. Repeating the call
        with the same `run_id`, in any process, continues with the newest of these runs, so that a
        task that is retried or moved to another worker starts nothing twice.

        Args:
            run_id: Your own id, see `run_id_from`; default: a generated one.
            attempts: Most runs in all, including those of earlier calls.
            follow: False returns the newest run as soon as the provider has accepted it. Repeat
                the call once that run has finished, which resumes it, returns it or raises.
            on_record: Called with every log record of the run that is followed, from its first.
                An exception that it raises ends the call; the run keeps running.
            progress: In a notebook, show the run's progress while it is followed.
            stop_on_cancel: Stop the run, with a checkpoint if the backend can, when this call is
                cancelled. A repeated call then resumes it.
            confirm: See `launch`.

        Raises:
            RunFailed: The run has failed and is not resumed, or somebody else stopped it.
            TrainingBackendError: As by `launch`, or the provider cannot be reached for longer than
                the setting `watch.give_up_after`; the run keeps running.
        """
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more, not {attempts}")
        run_id = new_run_id() if run_id is None else _require_text("run_id", run_id)
        return await self._attempts.run(
            run_id,
            partial(self.launch, config, backend=backend, run_id=run_id, confirm=confirm),
            attempts=attempts,
            follow=follow,
            on_record=on_record,
            progress=notebook_progress() if progress and follow else None,
            stop_on_cancel=stop_on_cancel,
        )

    async def get(self, run_id: str) -> TrainingRun:
        """Return a run as stored, without asking its provider.

        Raises:
            RunNotFound: No run has exactly this id; `candidates` lists ids that start with it.
        """
        self._require_open()
        _require_text("run_id", run_id)
        return await to_thread.run_sync(self._store.get, run_id)

    async def status(self, run_id: str) -> TrainingRun:
        """Fetch the status of a run from its provider, store it and return the run.

        A run that can only be observed from another machine or home is returned as stored, with
        the reason in `stale`.

        Raises:
            RunNotFound: There is no such run, or its provider no longer has it.
            TrainingBackendError: The provider cannot be reached. `get` returns the stored run,
                with the reason in `stale`.
        """
        run = await self.get(run_id)
        if run.status.is_terminal or not await self._records.may_be_at_provider(run):
            return run
        if not await self._observer.sees(run):
            return last_seen(run)
        try:
            return await self._observer.observe(run)
        except RunNotFound:
            if await self._records.was_launched(run):
                raise
            return run  # its launch was interrupted before the provider had the job

    async def list(
        self,
        *,
        backend: str | None = None,
        status: TrainingStatus | str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Sequence[TrainingRun]:
        """Return the runs as stored, newest first.

        Args:
            backend: Only runs of this backend.
            status: Only runs with this status; may be a string such as `completed`.
            tags: Only runs with all of these tags.

        Raises:
            ValueError: There is no such status.
        """
        self._require_open()
        status = None if status is None else _as_status(status)
        found = await to_thread.run_sync(lambda: self._store.list(backend=backend, status=status))
        if not tags:
            return found
        return [run for run in found if tags.items() <= run.config.tags.items()]

    async def refresh(
        self, *run_ids: str, backend: str | None = None, timeout: float | None = None
    ) -> Mapping[str, str]:
        """Update the given runs, or all live runs; asks the backends concurrently.

        Args:
            backend: Only runs of this backend.
            timeout: Seconds to wait for each backend.

        Returns:
            By run id, why a live run was not updated: its backend cannot be reached or did not
            answer in time, or the run can only be observed from another machine or home.

        Raises:
            RunNotFound: One of the runs does not exist.
            StoreError: The store cannot be used.
        """
        self._require_open()
        given = [await self.get(run_id) for run_id in run_ids]
        by_backend: dict[str, list[TrainingRun]] = {}
        for run in given:
            by_backend.setdefault(run.backend, []).append(run)
        if not run_ids:
            names = await to_thread.run_sync(self._store.backends_to_watch)
            by_backend = {name: [] for name in names}
        missed: dict[str, str] = {}
        await run_all(
            partial(self._refresh, name, runs, timeout, missed)
            for name, runs in by_backend.items()
            if backend in {None, name}
        )
        return missed

    async def _refresh(
        self,
        name: str,
        given: Sequence[TrainingRun],
        timeout: float | None,
        missed: dict[str, str],
    ) -> None:
        began = utc_now()
        poller = self._poller(name, only=[run.id for run in given] or None)
        reason = f"{name} did not answer within {timeout or 0:g} s"
        with anyio.move_on_after(timeout) as limit:
            try:
                for run in given:
                    if run.status.is_terminal:
                        await self._complete(run)
                await poller.refresh()
            except StoreError:
                raise
            except TrainingBackendError as error:
                reason = error.message
        await poller.load()
        unseen = [
            run
            for run in poller.runs.values()
            if run.last_seen_at is None or run.last_seen_at < began
        ]
        if limit.cancelled_caught and len(unseen) == len(poller.runs):
            await self._observer.unreachable(unseen, BackendUnavailable(reason))
        missed.update((run.id, self._why_missed(poller, run) or reason) for run in unseen)

    def _why_missed(self, poller: Poller, run: TrainingRun) -> str | None:
        if (error := poller.trouble_of(run.id)) is not None:
            return error.message
        known = self._backends.get(run.backend)
        if known is not None and not known.sees(run):
            return f"it can only be observed from {run.place}"
        return None

    async def _complete(self, run: TrainingRun) -> None:
        """Read the rest of a finished run's log, unless it is complete."""
        complete = await to_thread.run_sync(self._store.is_complete, run.id)
        if not complete and await self._records.may_be_at_provider(run):
            with suppress(RunNotFound, UnsupportedOperation):
                await self._observer.observe(run)

    async def logs(
        self,
        run_id: str,
        *,
        after: str | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield a run's log in order: the provider's records and those added by this client.

        Every record is stored once, so all readers get the same records in the same order.

        Args:
            after: Start after the record with this cursor.
            tail: Start with the last `tail` records; not together with `after`.
            follow: Wait for new records until the run has finished.

        Raises:
            RunNotFound: There is no such run, or its provider does not have it (any more);
                raised after all stored records.
            TrainingBackendError: The provider cannot be reached; raised after all stored records.
        """
        if tail is not None and (after is not None or tail < 0):
            raise ValueError("tail must be 0 or more, and cannot be combined with after")
        run = await self.get(run_id)
        found = self._following.logs(run, after=after, tail=tail, follow=follow)
        async with aclosing(found) as records:
            async for record in records:
                yield record

    async def metrics(
        self, run_id: str, *, after_step: int | None = None, names: Collection[str] | None = None
    ) -> Metrics:
        """Return the stored metrics of a run, by step.

        Args:
            after_step: Only later steps, to read on where an earlier call ended.
            names: Only these metrics, such as `train_loss`; None: all.
        """
        run = await self.get(run_id)
        read = partial(self._store.metrics, run.id, after_step=after_step, names=names)
        return await to_thread.run_sync(read)

    async def watch(
        self,
        on_event: OnEvent | None = None,
        *,
        only: Collection[str] | None = None,
        sources: Collection[str] | None = None,
    ) -> None:
        """Keep all live runs of this store up to date until cancelled; see `Watcher`.

        Args:
            on_event: Called once per event, even with several watchers on the store.
            only: Names of the backends to watch; None: all.
            sources: Only events of these sources, such as `status`; None: all.
        """
        await self.watcher(on_event=on_event, only=only, sources=sources).run()

    def watcher(
        self,
        *,
        on_event: OnEvent | None = None,
        only: Collection[str] | None = None,
        sources: Collection[str] | None = None,
    ) -> Watcher:
        """Return the watcher that `watch` runs, to call `sweep` yourself."""
        self._require_open()
        return Watcher(
            self._store,
            self._leases,
            self._poller,
            on_event=on_event,
            only=only,
            sources=sources,
            deliver_results=self._results.deliver_due,
        )

    async def wait(
        self,
        *run_ids: str,
        until: str | Collection[str] = "finished",
        timeout: float | None = None,
    ) -> Sequence[TrainingRun]:
        """Wait until each of the runs has a status, and return them as they were then.

        A run that is already past a status up to `running` is not waited for. A run that finishes
        without reaching any of the statuses is returned too, and reported in a warning, as is a
        run that is paused; see `TrainingRun.has_reached`.

        Args:
            until: A status such as `running` or `paused`, or several; `finished` stands for
                `completed`, `failed` and `cancelled`.
            timeout: Maximum seconds to wait; None: no limit.

        Raises:
            ValueError: There is no such status.
            WaitTimeout: The timeout expired; the runs keep running.
            UnsupportedOperation: The launch of a run was interrupted, so it would never finish.
            TrainingBackendError: The provider cannot be reached, and the error is not temporary.
        """
        wanted = statuses_of(*([until] if isinstance(until, str) else until))
        runs = [await self.get(run_id) for run_id in run_ids]
        reached: dict[str, TrainingRun] = {}
        with anyio.move_on_after(timeout), span("training_backends.wait", runs=len(runs)):
            await self._following.wait(runs, wanted, reached)
        left = {run.id for run in runs} - reached.keys()
        now = {run_id: await self.get(run_id) for run_id in left}
        reached |= {run.id: run for run in now.values() if is_reached(run, wanted)}
        left -= reached.keys()
        if not left:
            return [await self._results.deliver(reached[run.id]) for run in runs]
        subject = "1 run is" if len(left) == 1 else f"{len(left)} runs are"
        raise WaitTimeout(
            f"Timed out after {timeout:g} s; {subject} still in progress.",
            hint="Wait again with a longer timeout, or check with `status`.",
        )

    async def stop(
        self, run_id: str, *, save_checkpoint: bool = True, resumable: bool = False
    ) -> TrainingRun:
        """Ask the provider to stop a run, which may take a while.

        Safe to repeat. A run that was never launched is cancelled immediately. If its launch was
        interrupted, the provider is first searched for a job.

        Args:
            save_checkpoint: Save the progress so far, if the provider can.
            resumable: Let a repeated call of `run` resume it, instead of raising `RunFailed`.

        Raises:
            UnsupportedOperation: Another process is launching the run, and it has no job yet
                that could be stopped; or it cannot be found out whether an interrupted launch
                has created one.
        """
        run = await self.get(run_id)
        if not run.status.is_terminal:
            await self._observer.require_here(run, "stop")
        stopped = await self._steering.stop(run, save_checkpoint=save_checkpoint)
        if resumable:
            await self._attempts.note_stop(run_id)
        return stopped

    async def pause(self, run_id: str) -> TrainingRun:
        """Ask the provider to pause a run, which may take a while.

        Safe to repeat. `unpause` continues it in place, under the same id; `resume` is for runs
        that have failed or were cancelled.

        Raises:
            UnsupportedOperation: The backend cannot pause runs, or the run is not in progress.
        """
        run = await self.status(run_id)
        await self._observer.require_here(run, "pause")
        return await self._steering.pause(run)

    async def unpause(self, run_id: str) -> TrainingRun:
        """Ask the provider to continue a paused run in place.

        Safe to repeat.

        Raises:
            UnsupportedOperation: The backend cannot pause runs, or the run is not in progress.
        """
        run = await self.status(run_id)
        await self._observer.require_here(run, "unpause")
        return await self._steering.unpause(run)

    async def resume(
        self,
        run_id: str,
        *,
        checkpoint: str | None = None,
        new_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """Continue a stopped or failed run as a new run; start a run not started yet.

        The callbacks are those of `launch`.

        Args:
            checkpoint: Checkpoint to continue from; None: the newest.
            new_id: Id of the new run; default: a generated one.

        Raises:
            UnsupportedOperation: The backend cannot resume runs, or the run is still active.
            BudgetExceeded: Cost or duration exceeds the budget; nothing was started.
        """
        watch = LaunchWatch(on_progress=on_progress, on_update=on_update, confirm=confirm)
        if new_id is not None:
            _require_text("new_id", new_id)
        run = await self.status(run_id)
        await self._observer.require_here(run, "resume")
        return await self._steering.resume(run, watch, checkpoint=checkpoint, new_id=new_id)

    async def download(
        self, run_id: str, target: Path | str, *, checkpoint: str | None = None
    ) -> Path:
        """Download the trained model of a run into `target`, atomically.

        Args:
            checkpoint: Checkpoint whose model to download, also of a run that is in progress or
                has failed; None: the run's result.

        Raises:
            UnsupportedOperation: The backend has no weight download, or the run has no model.
            ConfigError: There is no such checkpoint.
        """
        return await self._results.download(run_id, Path(target), checkpoint)

    async def push(
        self,
        run_id: str,
        target: str,
        *,
        checkpoint: str | None = None,
        private: bool = True,
        profile: str | None = None,
    ) -> str:
        """Upload the trained model of a run to the Hugging Face Hub, as one commit.

        Args:
            target: `hf://ORG/NAME`; the repository is created if necessary.
            checkpoint: See `download`.
            private: Create a private repository, and reject one that exists and is public.
            profile: Credential profile of `huggingface`; None: the default one.

        Returns:
            The URL of the repository.

        Raises:
            ConfigError: The target is invalid, or the repository is public.
            CredentialNotFound: No token is stored.
            UnsupportedOperation: See `download`.
        """
        return await self._results.push(
            run_id, target, checkpoint=checkpoint, private=private, profile=profile
        )

    async def publish(
        self,
        run_id: str,
        url: str,
        *,
        checkpoint: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> str:
        """Copy the trained model of a run to an object store; safe to repeat.

        A `manifest.json` with the SHA-256 of each file is written last: a copy without it is
        incomplete.

        Args:
            url: Such as `s3://bucket/models/support`, with nothing below it.
            checkpoint: See `download`.
            on_progress: Called with a name, the bytes copied and all bytes.

        Returns:
            The URL of the manifest.

        Raises:
            ConfigError: The URL is invalid, or has another result.
            BackendNotInstalled: The package of the store is not installed.
            TrainingBackendError: The store or the model cannot be used; see also `download`.
        """
        return await self._results.publish(
            run_id, url, checkpoint=checkpoint, on_progress=on_progress
        )

    async def sample(self, run_id: str, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Prompt the trained model of a run, if its backend can serve it.

        Args:
            prompt: A user's message, or the messages of a conversation that ends with one.
            max_tokens: Maximum tokens to generate.

        Raises:
            ValueError: The conversation is malformed.
            UnsupportedOperation: The backend cannot serve models or continue conversations, or
                the run has no model.
            BackendUnavailable: The model cannot be loaded.
        """
        return await self._results.sample(run_id, prompt, max_tokens)

    async def evaluate(
        self,
        run_id: str,
        file: Path | str,
        *,
        scorer: "Scorer | None" = None,
        rows: int | None = None,
        max_tokens: int = 256,
        on_row: "Callable[[EvaluatedRow, int], object] | None" = None,
    ) -> "Evaluation":
        """Ask the trained model of a run the prompts of a data file and score its answers.

        A row is a conversation that ends with the assistant's answer, a `prompt` and a
        `completion`, or, for a classifier, a text and its labels, whose accuracy is the score. The
        model is asked what comes before the last answer, including earlier turns as they are in
        the data. Rows with tools or images are skipped and counted, as are those with a system
        prompt or earlier turns if the backend takes single messages only.

        Args:
            scorer: Called in a thread with the last user message, the expected and the given
                answer, one call at a time; default: whether both answers are the same apart from
                white space.
            rows: Ask only the first `rows` of these rows; None: all.
            max_tokens: Maximum tokens of an answer.
            on_row: Called with each row, in the order of the file, and the number of all rows.

        Raises:
            DatasetError: The file cannot be read, or has no row that can be asked.
            TrainingBackendError: As by `sample`.
        """
        # Not at all for programs that evaluate nothing.
        from training_backends.client.evaluation import (  # noqa: PLC0415
            Evaluation,
            ask_all,
            exact_match,
            read_questions,
        )

        run = await self.get(run_id)
        chats = (await self._backend(run.backend)).capabilities.samples_chats
        read = partial(read_questions, Path(file), rows, chats=chats)
        questions, skipped = await to_thread.run_sync(read)
        ask = partial(self.sample, run.id, max_tokens=max_tokens)
        found = await ask_all(ask, questions, scorer=scorer or exact_match, on_row=on_row)
        return Evaluation(rows=tuple(found), skipped=skipped)

    async def delete(self, run_id: str, *, record_only: bool = False) -> None:
        """Delete a finished run or a draft, here and, if supported, at the provider.

        Safe to repeat after a crash: a run already deleted at the provider is no error.

        Args:
            record_only: Delete only the stored record, whatever the status, for a run whose
                machine or provider no longer exists.

        Raises:
            RunNotFound: No run has exactly this id; an earlier call may have deleted it.
            UnsupportedOperation: The run is active, its launch was interrupted and the provider
                may have a job for it, or it belongs to another machine or home.
        """
        if record_only:
            run = await self.get(run_id)
            await to_thread.run_sync(partial(self._store.delete, run.id, created_at=run.created_at))
            return
        run = await self.status(run_id)
        await self._observer.require_here(run, "delete")
        backend = await self._backend(run.backend)
        if not run.status.is_terminal:
            run = await self._steering.discard(run)
        if not run.status.is_terminal:
            raise backend.unsupported(f"delete a run that is {run.status}", "Stop it first.")
        if backend.capabilities.deletes:
            with suppress(RunNotFound):
                await backend.delete(run)
        await to_thread.run_sync(partial(self._store.delete, run.id, created_at=run.created_at))

    async def remove_checkpoints(self, run_id: str, steps: Collection[int]) -> TrainingRun:
        """Remove the files of some checkpoints of a finished run; its model stays.

        Raises:
            RunNotFound: No run has exactly this id.
            UnsupportedOperation: The run is not finished, belongs to another machine or home, or
                its backend cannot remove checkpoints.
        """
        run, backend = await self._finished(run_id, "remove checkpoints of")
        await backend.remove_checkpoints(run, steps)

        def change(now: TrainingRun) -> TrainingRun:
            points = tuple(
                point.model_copy(update={"path": None}) if point.step in steps else point
                for point in now.checkpoints
            )
            return now.model_copy(update={"checkpoints": points})

        return await to_thread.run_sync(self._store.update, run.id, change)

    async def remove_log(self, run_id: str, *, keep_steps: Collection[int] = ()) -> int:
        """Delete the log and the metrics of a finished run; its status changes stay.

        Args:
            keep_steps: Steps whose metrics are kept.

        Returns:
            The size of the deleted records.

        Raises:
            RunNotFound: No run has exactly this id.
            UnsupportedOperation: The run is not finished, or belongs to another machine or home.
        """
        run, backend = await self._finished(run_id, "remove the log of")
        await backend.remove_log(run)
        return await to_thread.run_sync(
            partial(self._store.trim, run.id, keep_steps=frozenset(keep_steps))
        )

    async def _finished(self, run_id: str, verb: str) -> tuple[TrainingRun, TrainingBackend]:
        run = await self.get(run_id)
        await self._observer.require_here(run, verb)
        backend = await self._backend(run.backend)
        if not run.status.is_terminal:
            raise backend.unsupported(f"{verb} a run that is {run.status}", "Stop it first.")
        return run, backend

    async def check_store(self, *, within: float | None = None) -> Sequence[str]:
        """Return the problems of the run store, one line each, without changing it.

        Args:
            within: Seconds after which to return what was found; None: check everything.
        """
        return await to_thread.run_sync(partial(check, self._store_url, within=within))

    async def recover_store(self) -> Recovery:
        """Back up a damaged run store and rebuild it.

        The new store contains the readable runs of the old one and the providers' jobs.

        Raises:
            StoreError: Another process uses the store, or its files cannot be moved.
        """
        names = dict.fromkeys((*installed_backends(), *self._backends))
        return await recover(self._store_url, self._store, names, self._backend)

    def exclusive(self, name: str) -> AbstractAsyncContextManager[object]:
        """Exclude all other processes on this run store from a block, by a name.

        Waits until a process that holds the name leaves its block or has ended.
        """
        return self._leases.hold(name)

    def _require_open(self) -> None:
        # A closed client no longer renews its leases, so a launch could be started twice.
        if self._closed:
            raise TrainingBackendError(
                "This AsyncTrainingClient is closed.",
                hint="Create a new client, or close it after the last call.",
            )

    def _poller(self, backend: str, *, only: Collection[str] | None = None) -> Poller:
        return Poller(backend, self._store, self._leases, self._observer, only=only)


async def _close(backend: TrainingBackend) -> None:
    """Close a backend; log an error, because raising it would hide the caller's result."""
    try:
        await backend.aclose()
    except TrainingBackendError as error:
        log.warning("backend not closed", backend=backend.name, reason=error.message)


def _require_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    return value


def _as_status(status: str) -> TrainingStatus:
    try:
        return TrainingStatus(status)
    except ValueError:
        words = ", ".join(TrainingStatus)
        raise ValueError(f"status must be one of {words}, not {status!r}") from None
