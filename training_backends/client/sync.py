"""The same client for code that is not asynchronous."""

import queue
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from anyio import from_thread, get_cancelled_exc_class, to_thread

from training_backends.client.aio import AsyncTrainingClient
from training_backends.client.journal import Confirm, OnProgress, OnUpdate
from training_backends.client.recovering import Recovery
from training_backends.client.store import MetricPoint
from training_backends.core.backend import CredentialSource, TrainingBackend
from training_backends.core.config import TrainingConfig
from training_backends.core.counting import CountProgress
from training_backends.core.dataset import Dataset
from training_backends.core.estimate import Estimate
from training_backends.core.run import LogRecord, Reply, TrainingRun, ValidationReport
from training_backends.core.status import TrainingStatus

__all__ = ["TrainingClient"]

_T = TypeVar("_T")
_LOOK: Final = 0.5
"""Seconds between two looks whether the task that gives log records still lives."""


class TrainingClient:
    """`AsyncTrainingClient` with plain methods; same names, arguments and errors.

    It runs an event loop in a thread of its own. Use it as a context manager, or call
    `close`.
    """

    def __init__(
        self,
        *,
        home: Path | None = None,
        store_url: str | None = None,
        credentials: CredentialSource | None = None,
        backends: Mapping[str, TrainingBackend] | None = None,
    ) -> None:
        self._client = AsyncTrainingClient(
            home=home, store_url=store_url, credentials=credentials, backends=backends
        )
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(from_thread.start_blocking_portal())

    @property
    def home(self) -> Path:
        """Directory for all state."""
        return self._client.home

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See `AsyncTrainingClient.aclose`; ends what other threads still wait for here."""
        with self._stack:
            self._portal.call(self._client.aclose)
            self._portal.call(self._portal.stop, True)  # noqa: FBT003  # positional only

    def _call(self, function: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        """Run a coroutine in the loop's thread; a Ctrl-C here ends it there too.

        Left alone it would go on, and closing the client would wait for its end.
        """
        task = self._portal.start_task_soon(function, *args)
        try:
            return task.result()
        except BaseException:
            task.cancel()
            raise

    def backend(self, name: str) -> TrainingBackend:
        """See `AsyncTrainingClient.backend`; the backend itself is asynchronous."""
        return self._client.backend(name)

    def inspect(self, config: TrainingConfig, *, backend: str | None = None) -> Dataset:
        """See `AsyncTrainingClient.inspect`."""
        return self._call(partial(self._client.inspect, config, backend=backend))

    def validate(self, config: TrainingConfig, *, backend: str) -> ValidationReport:
        """See `AsyncTrainingClient.validate`."""
        return self._call(partial(self._client.validate, config, backend=backend))

    def estimate(
        self,
        config: TrainingConfig,
        *,
        backend: str,
        sample: int | None = None,
        exact: bool = False,
        on_counting: CountProgress | None = None,
    ) -> Estimate:
        """See `AsyncTrainingClient.estimate`; the callback runs in a thread of its own."""
        estimate = partial(
            self._client.estimate,
            config,
            backend=backend,
            sample=sample,
            exact=exact,
            on_counting=on_counting,
        )
        return self._call(estimate)

    def launch(
        self,
        config: TrainingConfig,
        *,
        backend: str,
        run_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """See `AsyncTrainingClient.launch`; the callbacks run in the client's thread."""
        launch = partial(
            self._client.launch,
            config,
            backend=backend,
            run_id=run_id,
            on_progress=on_progress,
            on_update=on_update,
            confirm=confirm,
        )
        return self._call(launch)

    def get(self, run_id: str) -> TrainingRun:
        """See `AsyncTrainingClient.get`."""
        return self._call(self._client.get, run_id)

    def status(self, run_id: str) -> TrainingRun:
        """See `AsyncTrainingClient.status`."""
        return self._call(self._client.status, run_id)

    def list(
        self, *, backend: str | None = None, status: TrainingStatus | None = None
    ) -> Sequence[TrainingRun]:
        """See `AsyncTrainingClient.list`."""
        return self._call(partial(self._client.list, backend=backend, status=status))

    def refresh(
        self, *run_ids: str, backend: str | None = None, timeout: float | None = None
    ) -> Mapping[str, str]:
        """See `AsyncTrainingClient.refresh`."""
        refresh = partial(self._client.refresh, *run_ids, backend=backend, timeout=timeout)
        return self._call(refresh)

    def logs(
        self, run_id: str, *, after: str | None = None, follow: bool = False
    ) -> Iterator[LogRecord]:
        """See `AsyncTrainingClient.logs`."""
        # The generator is consumed by one task in the loop: stepping it from here, call
        # by call, would break any timeout or task group that it holds.
        records: queue.Queue[LogRecord | BaseException | None] = queue.Queue(maxsize=256)

        async def pump() -> None:
            end: BaseException | None = None
            try:
                async with aclosing(self._client.logs(run_id, after=after, follow=follow)) as logs:
                    async for record in logs:
                        await _put(records, record)
            except get_cancelled_exc_class():
                raise
            except Exception as error:  # handed over to the caller's thread
                end = error
            await _put(records, end)

        task = self._portal.start_task_soon(pump)
        try:
            while (item := _take(records, task)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            task.cancel()
            # Make room, so that a thread still waiting to put can end.
            with suppress(queue.Empty):
                while True:
                    records.get_nowait()

    def metrics(self, run_id: str) -> Sequence[MetricPoint]:
        """See `AsyncTrainingClient.metrics`."""
        return self._call(self._client.metrics, run_id)

    def watch(
        self,
        on_event: Callable[[TrainingRun, LogRecord], None] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """See `AsyncTrainingClient.watch`; ends with a Ctrl-C.

        Args:
            on_event: Told of each event, in a thread of its own.
        """

        async def tell(run: TrainingRun, record: LogRecord) -> None:
            if on_event is not None:
                await to_thread.run_sync(on_event, run, record)

        watcher = self._client.watcher(on_event=tell if on_event else None, only=only)
        self._call(watcher.run)

    def wait(self, *run_ids: str, timeout: float | None = None) -> Sequence[TrainingRun]:
        """See `AsyncTrainingClient.wait`."""
        return self._call(partial(self._client.wait, *run_ids, timeout=timeout))

    def stop(self, run_id: str, *, save_checkpoint: bool = True) -> TrainingRun:
        """See `AsyncTrainingClient.stop`."""
        stop = partial(self._client.stop, run_id, save_checkpoint=save_checkpoint)
        return self._call(stop)

    def resume(
        self,
        run_id: str,
        *,
        checkpoint: str | None = None,
        new_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        confirm: Confirm | None = None,
    ) -> TrainingRun:
        """See `AsyncTrainingClient.resume`; the callbacks run in the client's thread."""
        resume = partial(
            self._client.resume,
            run_id,
            checkpoint=checkpoint,
            new_id=new_id,
            on_progress=on_progress,
            on_update=on_update,
            confirm=confirm,
        )
        return self._call(resume)

    def download(self, run_id: str, target: Path) -> Path:
        """See `AsyncTrainingClient.download`."""
        return self._call(self._client.download, run_id, target)

    def sample(self, run_id: str, prompt: str, *, max_tokens: int = 64) -> Reply:
        """See `AsyncTrainingClient.sample`."""
        return self._call(partial(self._client.sample, run_id, prompt, max_tokens=max_tokens))

    def delete(self, run_id: str, *, record_only: bool = False) -> None:
        """See `AsyncTrainingClient.delete`."""
        self._call(partial(self._client.delete, run_id, record_only=record_only))

    def check_store(self) -> Sequence[str]:
        """See `AsyncTrainingClient.check_store`."""
        return self._call(self._client.check_store)

    def recover_store(self) -> Recovery:
        """See `AsyncTrainingClient.recover_store`."""
        return self._call(self._client.recover_store)


def _take(records: "queue.Queue[Any]", task: "Future[None]") -> Any:
    """Return what comes next; None also when the client was closed by another thread."""
    while True:
        over = task.done()  # asked first: what it put before its end is still taken
        try:
            return records.get(timeout=_LOOK)
        except queue.Empty:
            if over:
                return None


async def _put(records: "queue.Queue[Any]", item: Any) -> None:
    """Put without blocking the loop; a reader that is gone cancels the wait."""
    put: Callable[[], None] = partial(records.put, item, timeout=None)
    try:
        records.put_nowait(item)
    except queue.Full:
        await to_thread.run_sync(put, abandon_on_cancel=True)
