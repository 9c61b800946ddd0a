"""The asynchronous client: launches runs, remembers them, follows and ends them."""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import anyio
from anyio import from_thread, to_thread

from training_backends.client.boundary import callers_own, guarded, make_backend
from training_backends.client.config_file import ConfigLike, to_config
from training_backends.client.follow import Following
from training_backends.client.journal import (
    Confirm,
    LaunchWatch,
    OnNotice,
    OnProgress,
    OnUpdate,
)
from training_backends.client.launch import RunRecords, Steering
from training_backends.client.leases import Leases
from training_backends.client.observe import Looks, WatchSettings, last_seen
from training_backends.client.poller import Round
from training_backends.client.recovery import Recovery, recover
from training_backends.client.run_record import (
    launch_lease,
    new_run_record,
    require_options,
    require_same,
)
from training_backends.client.watch import OnEvent, Watcher
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    TrainingBackend,
)
from training_backends.core.concurrency import run_all
from training_backends.core.config import TrainingConfig
from training_backends.core.counting import Counting, CountProgress, wishing
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    ConfigError,
    RunNotFound,
    StoreError,
    TrainingBackendError,
    UnsupportedOperation,
    WaitTimeout,
)
from training_backends.core.estimate import Estimate
from training_backends.core.logging import get_logger
from training_backends.core.options import given_options
from training_backends.core.plugins import installed_backends
from training_backends.core.run import (
    LogRecord,
    Reply,
    TrainingRun,
    ValidationReport,
    new_run_id,
    utc_now,
)
from training_backends.core.settings import Settings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.core.tracing import span
from training_backends.credentials.vault import CredentialVault
from training_backends.datasets.inspect import inspect, raise_for_errors
from training_backends.store import MetricPoint, RunStore
from training_backends.store.salvage import check

__all__ = ["AsyncTrainingClient"]

log = get_logger()


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
        home: Path | str | None = None,
        store_url: str | None = None,
        credentials: CredentialSource | None = None,
        backends: Mapping[str, TrainingBackend] | None = None,
    ) -> None:
        settings = load_settings(Settings)
        self.home = Path(home or settings.home).expanduser().absolute()
        if home is None:
            store_url = store_url or settings.store_url
        self._store_url = store_url or f"sqlite:///{self.home / 'runs.db'}"
        self._store = RunStore(self._store_url)
        self._credentials = credentials or CredentialVault(home=self.home)
        self._backends = {name: guarded(given, name) for name, given in (backends or {}).items()}
        self._own: list[TrainingBackend] = []
        watching = load_settings(WatchSettings)
        self._leases = Leases(self._store, self.home / "leases")
        self._records = RunRecords(self._store, self._leases)
        self._looks = Looks(self._store, self._backend, watching)
        self._steering = Steering(self._store, self._leases, self._records, self._looks)
        self._following = Following(
            self._store, self._leases, self._records, self._looks, self._round
        )
        self._making = anyio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the backends that this client made, and the store; the client cannot be used then.

        Safe to repeat.
        """
        self._closed = True
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                stack.push_async_callback(to_thread.run_sync, self._store.close)
                stack.push_async_callback(to_thread.run_sync, self._leases.close)
                for backend in self._own:
                    stack.push_async_callback(_close, backend)

    def backend(self, name: str) -> TrainingBackend:
        """Return the backend with this name, made on first use.

        Its verbs are limited in time, and raise `BackendBroken` for every exception that is not
        from this package.

        Raises:
            TrainingBackendError: The client is closed; so in every method.
            ConfigError: No such backend is installed.
            BackendNotInstalled: It cannot be loaded.
            BackendBroken: It cannot be created.
            BackendUnavailable: It was not created within a minute.
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
        """Return the backend; importing it, its first use reads many files, so in a thread."""
        self._require_open()
        _require_text("backend", name)
        async with self._making:
            if name not in self._backends:
                await to_thread.run_sync(self.backend, name)
            return self._backends[name]

    async def inspect(self, config: ConfigLike, *, backend: str | None = None) -> Dataset:
        """Read the data files of a configuration and say what is in them.

        Args:
            config: Also a mapping, or the path of a YAML file; so in every method. Relative data
                paths are resolved against the file, without one against the working directory.
            backend: Whose rules they are held against; None: those of the Mistral protocol.
        """
        chosen = None if backend is None else await self._backend(backend)
        return await self._read(await self._config(config, chosen), chosen)

    async def validate(self, config: ConfigLike, *, backend: str) -> ValidationReport:
        """Check configuration and data; nothing is uploaded or spent."""
        chosen = await self._backend(backend)
        config = await self._config(config, chosen)
        dataset, report = await self._judged(chosen, config)
        return ValidationReport(issues=(*dataset.issues, *report.issues), dataset=dataset)

    async def estimate(
        self,
        config: ConfigLike,
        *,
        backend: str,
        sample: int | None = None,
        exact: bool = False,
        on_counting: CountProgress | None = None,
    ) -> Estimate:
        """Say what the run will take, as far as that is known before it starts.

        Args:
            sample: Count the tokens of so many rows, with an interval; None: of all rows,
                or of a sample where the data is huge.
            exact: Count all rows however many there are.
            on_counting: Told of the file, the bytes counted and its size.

        Raises:
            ConfigError: The options are not the backend's.
            DatasetError: The data cannot be used.
        """
        chosen = await self._backend(backend)
        config = await self._config(config, chosen)
        dataset = await self._inspected(chosen, config)
        raise_for_errors(dataset)
        wishes = Counting(sample=sample, exact=exact, on_progress=on_counting)
        return await self._estimated(chosen, config, dataset, wishes)

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
        """Start a run and return once the provider has accepted the start.

        Repeating the call with the same `run_id` continues where it stood and never
        starts a second run.

        Args:
            run_id: The caller's own id; default a new one.
            on_progress: Told of uploads: step, bytes done, bytes in all.
            on_update: Told whenever more is known of the run.
            on_notice: Called with a sentence to show, such as that the run exists already or
                that its data has changed since; default: such sentences are logged.
            confirm: Asked before anything that costs money is started. Without it a run is
                started at any price within the budget, and at an unknown price only if
                `budget.max_cost` is not set.

        Raises:
            ConfigError, DatasetError: The run cannot work; nothing was started.
            BudgetExceeded: It would cost or take too much, or its price is unknown and cannot
                be compared with the budget; nothing was started.
            DuplicateRun: `run_id` belongs to another configuration, or the provider has a
                similar run.
            AmbiguousLaunch: It cannot be told whether an earlier try got through.
        """
        chosen = await self._backend(backend)
        config = await self._config(config, chosen)
        run_id = new_run_id() if run_id is None else _require_text("run_id", run_id)
        watch = LaunchWatch(
            on_progress=on_progress, on_update=on_update, on_notice=on_notice, confirm=confirm
        )
        run = new_run_record(run_id, backend, config)
        async with self._leases.hold(launch_lease(run_id)) as lease:
            known = await self._records.known(run_id)
            if known is None:
                dataset, estimate = await self._prepare(chosen, config, watch)
                run = run.model_copy(update={"estimate": estimate})
                await to_thread.run_sync(self._store.insert, run)
                await self._records.remember_data(run_id, dataset.files)
            else:
                require_same(known, run)
                await self._records.notice_known(known, watch)
                if not await self._records.was_launched(known):
                    await self._looks.require_here(known, "launch")
            return await self._records.launch(run_id, watch, chosen.launch, lease=lease)

    async def get(self, run_id: str) -> TrainingRun:
        """Return a run as it was last seen.

        Raises:
            RunNotFound: There is no run with exactly this id; `candidates` has ids that begin
                with it.
        """
        self._require_open()
        _require_text("run_id", run_id)
        return await to_thread.run_sync(self._store.get, run_id)

    async def status(self, run_id: str) -> TrainingRun:
        """Ask the provider where a run stands, remember it and return the run.

        A run that can only be observed from another machine or home is returned as it was last
        seen, with the reason in `stale`.

        Raises:
            RunNotFound: There is no such run, or its provider does not know it any more.
            TrainingBackendError: The provider cannot be asked. `get` returns what was last
                seen; its `stale` says that it may no longer be true.
        """
        run = await self.get(run_id)
        if run.status.is_terminal or not await self._records.may_be_at_provider(run):
            return run
        if not await self._looks.sees(run):
            return last_seen(run)
        try:
            return await self._looks.look(run)
        except RunNotFound:
            if await self._records.was_launched(run):
                raise
            return run  # its launch was cut off before the provider had it

    async def list(
        self, *, backend: str | None = None, status: TrainingStatus | str | None = None
    ) -> Sequence[TrainingRun]:
        """Return the runs of this store as they were last seen, newest first.

        Args:
            status: Also as a word, such as `completed`.

        Raises:
            ValueError: There is no such status; it names those that there are.
        """
        self._require_open()
        status = None if status is None else _as_status(status)
        return await to_thread.run_sync(lambda: self._store.list(backend=backend, status=status))

    async def refresh(
        self, *run_ids: str, backend: str | None = None, timeout: float | None = None
    ) -> Mapping[str, str]:
        """Bring live runs up to date, all of the store or those given; backends side by side.

        Args:
            backend: Only runs of this one.
            timeout: Seconds after which a backend that has not answered is given up.

        Returns:
            By run id, why a live run is not up to date: its backend cannot be asked or did not
            answer in time, or the run can only be observed from another machine or home.

        Raises:
            RunNotFound: There is no run with one of these ids.
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
        rounds = self._round(name, only=[run.id for run in given] or None)
        reason = f"{name} did not answer within {timeout or 0:g} s"
        with anyio.move_on_after(timeout):
            try:
                for run in given:
                    if run.status.is_terminal:
                        await self._complete(run)
                await rounds.refresh()
            except StoreError:
                raise
            except TrainingBackendError as error:
                reason = error.message
        await rounds.load()
        for run in rounds.runs.values():
            if run.last_seen_at is None or run.last_seen_at < began:
                missed[run.id] = self._why_missed(rounds, run) or reason

    def _why_missed(self, rounds: Round, run: TrainingRun) -> str | None:
        if (error := rounds.trouble_of(run.id)) is not None:
            return error.message
        known = self._backends.get(run.backend)
        if known is not None and not known.sees(run):
            return f"only {run.place} can observe it"
        return None

    async def _complete(self, run: TrainingRun) -> None:
        """Read the rest of the log of a run that is over, where that was not done yet."""
        whole = await to_thread.run_sync(self._store.is_whole, run.id)
        if not whole and await self._records.may_be_at_provider(run):
            with suppress(RunNotFound, UnsupportedOperation):
                await self._looks.look(run)

    async def logs(
        self, run_id: str, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield a run's log in order: its provider's, and what became known of it here.

        Every record is stored once, so each reader gets the same, in the same order.

        Args:
            after: Go on behind the record with this cursor.
            follow: Stay until the run is over and everything was yielded.

        Raises:
            RunNotFound: There is no such run, or its provider does not know it (any more);
                what was stored before has been yielded then.
            TrainingBackendError: The provider cannot be asked; likewise.
        """
        run = await self.get(run_id)
        async with aclosing(self._following.logs(run, after=after, follow=follow)) as records:
            async for record in records:
                yield record

    async def metrics(self, run_id: str) -> Sequence[MetricPoint]:
        """Return everything that was measured while a run trained, by step, as last seen."""
        run = await self.get(run_id)
        return await to_thread.run_sync(self._store.metrics, run.id)

    async def watch(
        self, on_event: OnEvent | None = None, *, only: Collection[str] | None = None
    ) -> None:
        """Keep all live runs of this store up to date until cancelled; see `Watcher`.

        Args:
            on_event: Told of each event once, whichever watcher on the store saw it.
            only: Names of the backends whose runs are watched; None watches all.
        """
        await self.watcher(on_event=on_event, only=only).run()

    def watcher(
        self, *, on_event: OnEvent | None = None, only: Collection[str] | None = None
    ) -> Watcher:
        """Make what `watch` runs, to sweep by hand."""
        self._require_open()
        return Watcher(self._store, self._leases, self._round, on_event=on_event, only=only)

    async def wait(self, *run_ids: str, timeout: float | None = None) -> Sequence[TrainingRun]:
        """Return the runs once all of them are over.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.

        Raises:
            WaitTimeout: The time is over first; the runs go on.
            UnsupportedOperation: The launch of a run was cut off, so it would wait for ever.
            TrainingBackendError: The provider cannot be asked, and it is no passing trouble.
        """
        runs = [await self.get(run_id) for run_id in run_ids]
        with anyio.move_on_after(timeout):
            await self._following.wait(runs)
            return [await self.get(run.id) for run in runs]
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
        if not run.status.is_terminal:
            await self._looks.require_here(run, "stop")
        return await self._steering.stop(run, save_checkpoint=save_checkpoint)

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
        """Continue a stopped or failed run as a new one; a run not yet started is started.

        The callbacks are those of `launch`.

        Raises:
            UnsupportedOperation: The backend cannot, or the run is still going.
            BudgetExceeded: It would cost or take too much; nothing was started.
        """
        watch = LaunchWatch(on_progress=on_progress, on_update=on_update, confirm=confirm)
        if new_id is not None:
            _require_text("new_id", new_id)
        run = await self.status(run_id)
        await self._looks.require_here(run, "resume")
        return await self._steering.resume(run, watch, checkpoint=checkpoint, new_id=new_id)

    async def download(self, run_id: str, target: Path | str) -> Path:
        """Fetch the finished model of a run into `target`; it appears whole or not at all.

        Raises:
            UnsupportedOperation: The backend hands out no weights, or the run has no result.
        """
        run = await self.status(run_id)
        await self._looks.require_here(run, "download the model of")
        backend = await self._backend(run.backend)
        if backend.capabilities.downloads:
            _require_model(backend, run, "download")
        return await backend.download(run, Path(target))

    async def sample(self, run_id: str, prompt: str, *, max_tokens: int = 64) -> Reply:
        """Ask the finished model of a run, where its backend has it at hand.

        Args:
            max_tokens: Longest answer.

        Raises:
            UnsupportedOperation: The backend has no models at hand, or the run has no result.
            BackendUnavailable: The model cannot be loaded.
        """
        run = await self.status(run_id)
        await self._looks.require_here(run, "ask the model of")
        backend = await self._backend(run.backend)
        if backend.capabilities.samples:
            _require_model(backend, run, "ask")
        return await backend.sample(run, prompt, max_tokens=max_tokens)

    async def delete(self, run_id: str, *, record_only: bool = False) -> None:
        """Delete a run that has ended, or a draft, and what the provider keeps of it where it can.

        Safe to repeat after a crash: what the provider has deleted already is no hindrance.

        Args:
            record_only: Delete the record here without asking the provider, whatever the status:
                for a run whose machine or provider is gone for good.

        Raises:
            RunNotFound: There is no run with exactly this id, perhaps because an earlier call
                has deleted it.
            UnsupportedOperation: The run has not ended, its launch was cut off and the provider
                may have a job for it, or it belongs to another machine or home.
        """
        if record_only:
            run = await self.get(run_id)
            await to_thread.run_sync(partial(self._store.delete, run.id, created_at=run.created_at))
            return
        run = await self.status(run_id)
        await self._looks.require_here(run, "delete")
        backend = await self._backend(run.backend)
        if not run.status.is_terminal:
            run = await self._steering.discard(run)
        if not run.status.is_terminal:
            raise backend.unsupported(f"delete a run that is {run.status}", "Stop it first.")
        if backend.capabilities.deletes:
            with suppress(RunNotFound):
                await backend.delete(run)
        await to_thread.run_sync(partial(self._store.delete, run.id, created_at=run.created_at))

    async def check_store(self) -> Sequence[str]:
        """Return what is wrong with the run store, one line each; changes nothing."""
        return await to_thread.run_sync(check, self._store_url)

    async def recover_store(self) -> Recovery:
        """Set a damaged run store aside and make a new one of all that can still be known.

        That is what can be read of the old one, and what the providers list.

        Raises:
            StoreError: Another process uses the store, or its files cannot be moved.
        """
        names = dict.fromkeys((*installed_backends(), *self._backends))
        return await recover(self._store_url, self._store, names, self._backend)

    def _require_open(self) -> None:
        # The leases of a closed client are not renewed: a launch could be started twice.
        if self._closed:
            raise TrainingBackendError(
                "This AsyncTrainingClient is closed.",
                hint="Make a new one, or close it after the last call.",
            )

    async def _config(self, config: ConfigLike, backend: TrainingBackend | None) -> TrainingConfig:
        """Return a configuration given in any form, ready to be checked by the backend."""
        found = await to_thread.run_sync(to_config, config)
        if backend is None or not found.options:
            return found
        options = given_options(backend.options_model, found.options)
        return found.model_copy(update={"options": options})

    async def _read(self, config: TrainingConfig, backend: TrainingBackend | None) -> Dataset:
        look = partial(inspect, config, on_progress=_check_cancelled)
        if backend is not None:
            look = partial(look, dialect=backend.capabilities.dialect)
        return await to_thread.run_sync(look)

    async def _inspected(self, backend: TrainingBackend, config: TrainingConfig) -> Dataset:
        """Read the data as the backend's options want it judged.

        Raises:
            ConfigError: The options are not the backend's.
        """
        require_options(backend, config)
        dataset = await self._read(config, backend)
        return dataset.tolerating(backend.tolerated_bad_rows(config))

    async def _judged(
        self, backend: TrainingBackend, config: TrainingConfig
    ) -> tuple[Dataset, ValidationReport]:
        """Read the data and ask the backend, which is handed only options that fit."""
        try:
            dataset = await self._inspected(backend, config)
        except ConfigError as error:
            return await self._read(config, backend), ValidationReport(issues=error.issues)
        with span("training_backends.validate", backend=backend.name), self._counting():
            return dataset, await backend.validate(config, dataset)

    async def _prepare(
        self, backend: TrainingBackend, config: TrainingConfig, watch: LaunchWatch
    ) -> tuple[Dataset, Estimate]:
        """Do all that can be done before a run exists."""
        dataset, report = await self._judged(backend, config)
        raise_for_errors(dataset)
        if not report.ok:
            raise ConfigError(
                f"The backend {backend.name!r} cannot run this configuration.",
                issues=report.errors,
                backend=backend.name,
            )
        estimate = await self._estimated(backend, config, dataset)
        if backend.capabilities.quotes:
            config.budget.check(estimate)  # the quote decides later
        else:
            await watch.decide(estimate, config.budget)
        return dataset, estimate

    async def _estimated(
        self,
        backend: TrainingBackend,
        config: TrainingConfig,
        dataset: Dataset,
        wishes: Counting | None = None,
    ) -> Estimate:
        with span("training_backends.estimate", backend=backend.name), self._counting(wishes):
            return await backend.estimate(config, dataset)

    def _counting(self, wishes: Counting | None = None) -> AbstractContextManager[None]:
        """Have backends count tokens as wished, keep the counts, and stop when nobody waits."""
        wishes = wishes or Counting()
        told = wishes.on_progress

        def on_progress(path: Path, done: int, total: int) -> None:
            _check_cancelled()
            if told:
                with callers_own():
                    told(path, done, total)

        cache = self.home / "cache" / "tokens"
        return wishing(replace(wishes, cache=cache, on_progress=on_progress))

    def _round(self, backend: str, *, only: Collection[str] | None = None) -> Round:
        return Round(backend, self._store, self._leases, self._looks, only=only)


async def _close(backend: TrainingBackend) -> None:
    """Close a backend; one that cannot be closed must not hide the result of the work."""
    try:
        await backend.aclose()
    except TrainingBackendError as error:
        log.warning("backend not closed", backend=backend.name, reason=error.message)


def _require_model(backend: TrainingBackend, run: TrainingRun, verb: str) -> None:
    if run.status is not TrainingStatus.COMPLETED:
        raise backend.unsupported(
            f"{verb} the model of a run that is {run.status}", "Only a completed run has a model."
        )


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


def _check_cancelled(*_: object) -> None:
    """End reading and counting in a thread once nobody waits for it."""
    from_thread.check_cancelled()
