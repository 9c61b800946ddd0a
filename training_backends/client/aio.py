"""The asynchronous client: launches runs, remembers them, follows and ends them."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio import from_thread, to_thread
from pydantic import ValidationError

from training_backends.client.journal import (
    Confirm,
    LaunchWatch,
    OnProgress,
    OnUpdate,
    StoreJournal,
)
from training_backends.client.locks import launch_lock
from training_backends.client.store import RunStore
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    Journal,
    TrainingBackend,
)
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    BackendUnavailable,
    BudgetExceeded,
    ConfigError,
    DuplicateRun,
    Issue,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
    WaitTimeout,
)
from training_backends.core.estimate import Estimate
from training_backends.core.logs import get_logger
from training_backends.core.registry import backend_class
from training_backends.core.run import (
    Failure,
    FailureKind,
    LogRecord,
    RunState,
    TrainingRun,
    ValidationReport,
    new_run_id,
    utc_now,
)
from training_backends.core.settings import Settings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.credentials.vault import CredentialVault
from training_backends.datasets.inspect import inspect, raise_for_errors

__all__ = ["AsyncTrainingClient"]

log = get_logger()

_LAUNCHED = "launched"
"""Journal step that is finished once the provider accepted the start."""
_FIRST_POLL, _LONGEST_POLL = 0.2, 15.0
"""Seconds between two looks at a run: a tenth of the time watched, within these."""
_FOLLOW_LOOK = 5.0
"""Seconds after which a followed log brings the run's record up to date again."""


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

    async def inspect(self, config: TrainingConfig) -> Dataset:
        """Read the data files of a configuration and say what is in them."""

        def check_cancelled(*_: object) -> None:
            from_thread.check_cancelled()

        return await to_thread.run_sync(partial(inspect, config, on_progress=check_cancelled))

    async def validate(self, config: TrainingConfig, *, backend: str) -> ValidationReport:
        """Check configuration and data; nothing is uploaded or spent."""
        chosen = self.backend(backend)
        dataset, report = await self._checked(chosen, config)
        return ValidationReport(issues=(*dataset.issues, *report.issues), dataset=dataset)

    async def estimate(self, config: TrainingConfig, *, backend: str) -> Estimate:
        """Say what the run will take, as far as that is known before it starts.

        Raises:
            DatasetError: The data cannot be used.
        """
        chosen = self.backend(backend)
        dataset, _ = await self._checked(chosen, config)
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
        chosen = self.backend(backend)
        run_id = run_id or new_run_id()
        watch = LaunchWatch(on_progress=on_progress, on_update=on_update, confirm=confirm)
        run = _new_run(run_id, backend, config)
        async with launch_lock(self.home / "locks", run_id):
            known = await self._known(run_id)
            if known is None:
                estimate = await self._prepare(chosen, config, watch)
                run = run.model_copy(update={"estimate": estimate})
                await to_thread.run_sync(self._store.insert, run)
            else:
                _same(known, run)
            return await self._launch(run_id, watch, chosen.launch)

    async def get(self, run_id: str) -> TrainingRun:
        """Return a run as it was last seen, by its id or a unique beginning of it."""
        return await to_thread.run_sync(self._store.get, run_id)

    async def status(self, run_id: str) -> TrainingRun:
        """Ask the provider where a run stands, remember it and return the run."""
        run = await self.get(run_id)
        at_provider = run.remote_id is not None or await self._was_launched(run)
        if run.status.is_terminal or not at_provider:
            return run
        return await self._saw(run, await self.backend(run.backend).status(run))

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
        records = self.backend(run.backend).logs(run, after=after, follow=follow)
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
        """
        runs = [await self.get(run_id) for run_id in run_ids]
        try:
            with anyio.fail_after(timeout):
                return [await self._wait_for(run.id) for run in runs]
        except TimeoutError:
            raise WaitTimeout(
                f"After {timeout:g} s not every run is over; they go on.",
                hint="Wait again with a longer --timeout, or look with `status`.",
            ) from None

    async def stop(self, run_id: str, *, save_checkpoint: bool = True) -> TrainingRun:
        """Ask the provider to end a run; it may take a while until it is over.

        Safe to repeat. A run that was never launched is cancelled at once.
        """
        run = await self.get(run_id)
        if run.status.is_terminal:
            return run
        if run.remote_id is None and not await self._was_launched(run):
            return await self._saw(run, _ended(TrainingStatus.CANCELLED))
        backend = self.backend(run.backend)
        await backend.stop(run, save_checkpoint=save_checkpoint)
        return await self._saw(run, await backend.status(run))

    async def resume(
        self, run_id: str, *, checkpoint: str | None = None, new_id: str | None = None
    ) -> TrainingRun:
        """Continue a stopped or failed run as a new one; a run not yet started is started.

        Raises:
            UnsupportedOperation: The backend cannot, or the run is still going.
        """
        run = await self.get(run_id)
        backend = self.backend(run.backend)
        watch = LaunchWatch()
        if not run.status.is_terminal and not await self._was_launched(run):
            async with launch_lock(self.home / "locks", run.id):
                return await self._launch(run.id, watch, backend.launch)
        if run.status not in {TrainingStatus.FAILED, TrainingStatus.CANCELLED}:
            raise backend.unsupported(
                f"resume a run that is {run.status}", "Only a failed or cancelled run is resumed."
            )
        new_run = _new_run(new_id or new_run_id(), run.backend, run.config)
        new_run = new_run.model_copy(update={"resumed_from": run.id})
        async with launch_lock(self.home / "locks", new_run.id):
            known = await self._known(new_run.id)
            if known is None:
                await to_thread.run_sync(self._store.insert, new_run)
            else:
                _same(known, new_run)
            return await self._launch(
                new_run.id,
                watch,
                lambda new, journal: backend.resume(run, new, journal, checkpoint=checkpoint),
            )

    async def download(self, run_id: str, target: Path) -> Path:
        """Fetch the finished model of a run into `target`; it appears whole or not at all.

        Raises:
            UnsupportedOperation: The backend hands out no weights, or the run has no result.
        """
        run = await self.status(run_id)
        backend = self.backend(run.backend)
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

        Raises:
            UnsupportedOperation: The run is not over.
        """
        run = await self.status(run_id)
        backend = self.backend(run.backend)
        if not run.status.is_terminal:
            raise backend.unsupported(f"delete a run that is {run.status}", "Stop it first.")
        if backend.capabilities.deletes:
            await backend.delete(run)
        await to_thread.run_sync(self._store.delete, run.id)

    async def _checked(
        self, backend: TrainingBackend, config: TrainingConfig
    ) -> tuple[Dataset, ValidationReport]:
        """Read the data and ask the backend, which is handed only options that fit."""
        dataset = await self.inspect(config)
        try:
            backend.options_model.model_validate(config.options)
        except ValidationError as error:
            return dataset, ValidationReport(issues=tuple(_option_issues(backend, error)))
        dataset = dataset.tolerating(backend.tolerated_bad_rows(config))
        return dataset, await backend.validate(config, dataset)

    async def _prepare(
        self, backend: TrainingBackend, config: TrainingConfig, watch: LaunchWatch
    ) -> Estimate:
        """Do all that can be done before a run exists."""
        dataset, report = await self._checked(backend, config)
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

    async def _launch(
        self,
        run_id: str,
        watch: LaunchWatch,
        start: Callable[[TrainingRun, Journal], Awaitable[RunState]],
    ) -> TrainingRun:
        """Have the backend start a recorded run, unless it was started before."""
        run = await self.get(run_id)
        if run.status.is_terminal or await self._was_launched(run):
            return run
        journal = StoreJournal(self._store, run_id, watch)
        try:
            state = await start(run.model_copy(update={"failure": None}), journal)
        except TrainingBackendError as error:
            error.run_id = error.run_id or run_id
            await self._launch_failed(run, error)
            raise

        async def accepted() -> str:
            return state.remote_id or run_id

        await journal.step(_LAUNCHED, accepted, repeatable=True)
        return await self._saw(run, state, forget_failure=True)

    async def _launch_failed(self, run: TrainingRun, error: TrainingBackendError) -> None:
        """Remember why a launch did not work; only a refused price ends the run."""
        if isinstance(error, BudgetExceeded):
            failure = Failure(kind="quota", message=error.message)
            ended = _ended(TrainingStatus.CANCELLED, failure)
            await self._saw(run, ended)
            return
        failure = Failure(kind=_kind(error), message=error.message, retryable=True)
        await to_thread.run_sync(
            self._store.update, run.id, lambda now: now.model_copy(update={"failure": failure})
        )

    async def _saw(
        self, run: TrainingRun, state: RunState, *, forget_failure: bool = False
    ) -> TrainingRun:
        def change(now: TrainingRun) -> TrainingRun:
            if forget_failure:
                now = now.model_copy(update={"failure": None})
            return now.updated(state)

        seen = await to_thread.run_sync(self._store.update, run.id, change)
        if seen.status is not run.status:
            log.info("run changed", run_id=run.id, before=run.status, status=seen.status)
        return seen

    async def _wait_for(self, run_id: str) -> TrainingRun:
        watched_since = anyio.current_time()
        while True:
            run = await self._look(run_id)
            if run.status.is_terminal:
                return run
            watched = anyio.current_time() - watched_since
            await anyio.sleep(min(max(watched / 10, _FIRST_POLL), _LONGEST_POLL))

    async def _look(self, run_id: str) -> TrainingRun:
        """Ask for a run's status; while the provider is away, take what was last seen."""
        try:
            return await self.status(run_id)
        except (BackendUnavailable, RateLimited) as error:
            log.warning("run cannot be seen now", run_id=run_id, reason=error.message)
            return await self.get(run_id)

    async def _known(self, run_id: str) -> TrainingRun | None:
        try:
            run = await self.get(run_id)
        except RunNotFound:
            return None
        return run if run.id == run_id else None

    async def _was_launched(self, run: TrainingRun) -> bool:
        entry = await to_thread.run_sync(self._store.entry, run.id, _LAUNCHED)
        return entry is not None


def _new_run(run_id: str, backend: str, config: TrainingConfig) -> TrainingRun:
    try:
        run = TrainingRun(id=run_id, backend=backend, config=config, created_at=utc_now())
        # The way through JSON makes it equal to what the store gives back.
        return TrainingRun.model_validate_json(run.model_dump_json())
    except ValidationError:
        raise ConfigError(
            f"{run_id!r} cannot be a run's id.",
            hint="Use up to 128 letters, digits, dots, dashes and underscores.",
        ) from None


def _same(known: TrainingRun, asked: TrainingRun) -> None:
    """Refuse to continue a run under an id that stands for something else."""
    differing = [
        name
        for name in ("backend", "config", "resumed_from")
        if getattr(known, name) != getattr(asked, name)
    ]
    if differing:
        raise DuplicateRun(
            f"The run {known.id!r} exists already with another {' and '.join(differing)}.",
            hint="Choose another --id, or launch the configuration that it was made with.",
            other=known.id,
            run_id=known.id,
        )


def _ended(status: TrainingStatus, failure: Failure | None = None) -> RunState:
    return RunState(status=status, failure=failure, finished_at=utc_now())


def _kind(error: TrainingBackendError) -> FailureKind:
    names: dict[str, FailureKind] = {
        "AuthenticationFailed": "auth",
        "CredentialNotFound": "auth",
        "PermissionDenied": "auth",
        "ConfigError": "validation",
        "DatasetError": "validation",
        "PayloadTooLarge": "validation",
    }
    return names.get(type(error).__name__, "provider")


def _option_issues(backend: TrainingBackend, error: ValidationError) -> list[Issue]:
    known = ", ".join(backend.options_model.model_fields) or "none"
    return [
        Issue(
            code=detail["type"],
            message=detail["msg"],
            field=".".join(("options", *(str(part) for part in detail["loc"]))),
            fix=f"options of {backend.name}: {known}",
        )
        for detail in error.errors(include_url=False)
    ]
