"""What precedes a launch: reads configuration and data, has them validated, and estimates."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from anyio import from_thread, to_thread

from training_backends.client.boundary import callers_own
from training_backends.client.config_file import ConfigLike, to_config
from training_backends.client.journal import LaunchWatch
from training_backends.client.observe import BackendOf
from training_backends.client.remote_data import RemoteData, located, require_plain_uris
from training_backends.client.run_record import unfit_fields
from training_backends.core.backend import TrainingBackend
from training_backends.core.config import TrainingConfig, given_options
from training_backends.core.dataset import Counting, CountProgress, Dataset
from training_backends.core.errors import ConfigError, Issue
from training_backends.core.estimate import Estimate
from training_backends.core.run import TrainingRun, ValidationReport
from training_backends.core.status import TrainingStatus
from training_backends.core.tracing import span
from training_backends.store import RunStore

__all__ = ["Preparation", "check_cancelled"]


class Preparation:
    """Prepares configurations for backends; starts and spends nothing.

    A recorded configuration names remote data by its URL and digest. A backend that does not read
    URLs itself sees it with the paths of local copies.

    Args:
        cache: Directory of inspections and counts.
    """

    def __init__(
        self, store: RunStore, backend_of: BackendOf, remote: RemoteData, cache: Path
    ) -> None:
        self._store = store
        self._backend_of = backend_of
        self._remote = remote
        self._cache = cache

    async def recorded(self, config: ConfigLike, backend: TrainingBackend | None) -> TrainingConfig:
        """Return a configuration as it is recorded.

        Without unset options, and with the digests of its chat template and of its remote data,
        which is fetched.

        Raises:
            ConfigError: It is invalid.
            TrainingBackendError: Its remote data cannot be fetched.
        """
        options = None if backend is None else backend.options_model
        found = await to_thread.run_sync(to_config, config, options)
        if backend is None or not _reads_uris(backend):
            found = await self._fetched(found)
        else:
            require_plain_uris(found)
        if found.chat_template is not None:
            template = await to_thread.run_sync(found.chat_template.pinned)
            found = found.model_copy(update={"chat_template": template})
        if options is None or not found.options:
            return found
        given = given_options(options, found.options)
        return found.model_copy(update={"options": given})

    async def localized(self, run: TrainingRun) -> TrainingRun:
        """Return a recorded run as its backend sees it; fetches data that is not here (again)."""
        backend = await self._backend_of(run.backend)
        if _reads_uris(backend):
            return run
        config = await self._fetched(run.config)
        return run.model_copy(update={"config": self._local(config, backend)})

    async def inspect(self, recorded: TrainingConfig, backend: TrainingBackend | None) -> Dataset:
        """Read the data of a recorded configuration; None: for the Mistral protocol."""
        local = self._local(recorded, backend)
        return _located(await self._read(local, backend), recorded, local)

    async def validate(
        self, recorded: TrainingConfig, backend: TrainingBackend
    ) -> ValidationReport:
        """Return what inspection and backend find, with the data as it was read."""
        local = self._local(recorded, backend)
        dataset, report = await self._judged(backend, local)
        issues = located((*dataset.issues, *report.issues), recorded, local)
        return ValidationReport(issues=issues, dataset=_located(dataset, recorded, local))

    async def estimate(
        self,
        recorded: TrainingConfig,
        backend: TrainingBackend,
        *,
        sample: int | None,
        exact: bool,
        on_counting: CountProgress | None,
    ) -> Estimate:
        """Estimate without validation by the backend; see `AsyncTrainingClient.estimate`."""
        local = self._local(recorded, backend)
        _require_valid(backend, unfit_fields(backend, local))
        dataset = await self._inspected(backend, local)
        _require_sound(_located(dataset, recorded, local))
        wishes = Counting(sample=sample, exact=exact, on_progress=on_counting)
        return await self._estimated(backend, local, dataset, wishes)

    async def prepare(
        self, recorded: TrainingConfig, backend: TrainingBackend, watch: LaunchWatch
    ) -> tuple[Dataset, Estimate]:
        """Validate and estimate, before the run is recorded.

        Raises:
            ConfigError, DatasetError: The configuration or data is invalid.
            BudgetExceeded: Cost or duration exceeds the budget, or the user rejected it.
        """
        local = self._local(recorded, backend)
        dataset, report = await self._judged(backend, local)
        _require_sound(_located(dataset, recorded, local))
        _require_valid(backend, located(report.errors, recorded, local))
        estimate = await self._estimated(backend, local, dataset, Counting())
        if backend.capabilities.quotes:
            local.budget.check(estimate)  # the provider's quote is confirmed later
        else:
            await watch.decide(estimate, local.budget)
        return dataset, estimate

    async def _fetched(self, config: TrainingConfig) -> TrainingConfig:
        """Return a configuration with the digests of its remote data, which is then local."""
        if all(each.uri is None for each in (*config.data.train, *config.data.validation)):
            return config
        found = await self._remote.recorded(config)
        if await to_thread.run_sync(self._remote.is_full):
            open_runs = await to_thread.run_sync(self._unfinished)
            needed = [
                each.sha256
                for config in (found, *(run.config for run in open_runs))
                for each in (*config.data.train, *config.data.validation)
                if each.sha256
            ]
            await to_thread.run_sync(self._remote.trim, needed)
        return found

    def _unfinished(self) -> list[TrainingRun]:
        open_statuses = (status for status in TrainingStatus if not status.is_terminal)
        return [run for status in open_statuses for run in self._store.list(status=status)]

    def _local(self, config: TrainingConfig, backend: TrainingBackend | None) -> TrainingConfig:
        """Return a recorded configuration as a backend sees it."""
        if backend is not None and _reads_uris(backend):
            return config
        return self._remote.local(config)

    async def _read(self, config: TrainingConfig, backend: TrainingBackend | None) -> Dataset:
        def read() -> Dataset:
            # In a thread, and not at all for commands that read no data.
            from training_backends.datasets.inspect import inspect, list_files  # noqa: PLC0415

            if backend is not None and not backend.capabilities.inspects:
                return list_files(config)
            observed = partial(inspect, config, on_progress=check_cancelled, cache=self._cache)
            if backend is None:
                return observed()
            return observed(provider_format=backend.capabilities.provider_format)

        return await to_thread.run_sync(read)

    async def _inspected(self, backend: TrainingBackend, config: TrainingConfig) -> Dataset:
        """Read the data, tolerating as many bad rows as the backend's options allow."""
        dataset = await self._read(config, backend)
        return dataset.tolerating(backend.tolerated_bad_rows(config))

    async def _judged(
        self, backend: TrainingBackend, config: TrainingConfig
    ) -> tuple[Dataset, ValidationReport]:
        """Read the data and have the backend validate it, unless a field does not fit it."""
        if issues := unfit_fields(backend, config):
            return await self._read(config, backend), ValidationReport(issues=tuple(issues))
        dataset = await self._inspected(backend, config)
        with span("training_backends.validate", backend=backend.name):
            return dataset, await backend.validate(config, self._counting(dataset, Counting()))

    async def _estimated(
        self, backend: TrainingBackend, config: TrainingConfig, dataset: Dataset, wishes: Counting
    ) -> Estimate:
        with span("training_backends.estimate", backend=backend.name):
            return await backend.estimate(config, self._counting(dataset, wishes))

    def _counting(self, dataset: Dataset, wishes: Counting) -> Dataset:
        """Return the dataset for a backend: counts are kept, and cancelled with the task."""
        callback = wishes.on_progress

        def on_progress(path: Path, done: int, total: int) -> None:
            check_cancelled()
            if callback:
                with callers_own():
                    callback(path, done, total)

        wishes = replace(wishes, cache=self._cache, on_progress=on_progress)
        return dataset.model_copy(update={"counting": wishes})


def check_cancelled(*_: object) -> None:
    """Cancel reading and counting in a thread together with the task that waits for it."""
    from_thread.check_cancelled()


def _reads_uris(backend: TrainingBackend) -> bool:
    """Return whether a backend or its provider reads data by URI itself."""
    return "uri" in backend.capabilities.data


def _located(dataset: Dataset, config: TrainingConfig, local: TrainingConfig) -> Dataset:
    """Return a dataset whose issues name the URL of remote data, not its path in the cache."""
    return dataset.model_copy(update={"issues": located(dataset.issues, config, local)})


def _require_sound(dataset: Dataset) -> None:
    from training_backends.datasets.inspect import raise_for_errors  # noqa: PLC0415  # see `_read`

    raise_for_errors(dataset)


def _require_valid(backend: TrainingBackend, errors: Sequence[Issue]) -> None:
    if errors:
        raise ConfigError(
            f"The configuration is not valid for the backend {backend.name!r}.",
            issues=errors,
            backend=backend.name,
        )
