"""The synchronous client."""

import asyncio
import atexit
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from anyio import from_thread, get_cancelled_exc_class, to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.config_file import ConfigLike
from training_backends.client.journal import Confirm, OnNotice, OnProgress, OnUpdate
from training_backends.client.recovery import Recovery
from training_backends.core.backend import CredentialSource, TrainingBackend
from training_backends.core.counting import CountProgress
from training_backends.core.dataset import Dataset
from training_backends.core.errors import TrainingBackendError
from training_backends.core.estimate import Estimate
from training_backends.core.run import LogRecord, Reply, TrainingRun, ValidationReport
from training_backends.core.status import TrainingStatus
from training_backends.store import MetricPoint

__all__ = ["TrainingClient"]

_T = TypeVar("_T")
_POLL: Final = 0.5
"""Seconds between checks that the task that reads a log is still running."""
_EXIT_PATIENCE: Final = 5.0
"""Seconds that interpreter shutdown waits for an open client to close."""


class _Loop:
    """The event loop of a client, in a daemon thread that also closes the client.

    It keeps no reference to the `TrainingClient`, so that an unclosed client can be garbage
    collected; a daemon thread does not keep the interpreter alive.
    """

    def __init__(self, client: AsyncTrainingClient) -> None:
        self._client = client
        self._pid = os.getpid()
        self._closed = False
        self._exiting = False
        self._starting = threading.Lock()
        started: Future[tuple[from_thread.BlockingPortal, Callable[[], object]]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="TrainingClient", daemon=True
        )
        self._thread.start()
        self._portal, self._wake = started.result()
        # Otherwise an unfinished launch would keep its lease until it expires.
        atexit.register(self._exit)

    def check(self) -> None:
        """Check that the client can be used.

        Raises:
            TrainingBackendError: The client was closed, or inherited by a forked process.
        """
        if self._pid != os.getpid():
            raise TrainingBackendError(
                "A TrainingClient cannot be used in a process forked after it was created.",
                hint="Create a new TrainingClient in the child process.",
            )
        if self._closed:
            raise _closed_error()

    def start(self, function: Callable[..., Awaitable[_T]], *args: Any) -> "Future[_T]":
        """Start a coroutine in the loop."""
        self.check()
        if self._thread is threading.current_thread():
            raise TrainingBackendError(
                "A TrainingClient cannot be called from its own callbacks.",
                hint="Return from the callback first, or call the client from another thread.",
            )
        # A call on a loop that is being closed would never return.
        with self._starting:
            self.check()
            return self._portal.start_task_soon(function, *args)

    def stop(self) -> None:
        """Cancel running calls and close the client, without waiting; safe in any thread."""
        if self._closed or self._pid != os.getpid():
            return
        # Only a blocked loop can hold the lock for long, and its call is lost anyway.
        locked = self._starting.acquire(timeout=_EXIT_PATIENCE)
        self._closed = True
        if locked:
            self._starting.release()
        atexit.unregister(self._exit)
        with suppress(RuntimeError):  # the loop has already ended
            self._wake()

    def close(self, timeout: float | None = None) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _exit(self) -> None:
        self._exiting = True
        self.close(_EXIT_PATIENCE)

    def _run(self, started: "Future[Any]") -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            elif not self._exiting:
                raise
            # Python 3.12+ starts no threads at shutdown; the process closes open connections.
        finally:
            self._closed = True

    async def _serve(self, started: "Future[Any]") -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            async with from_thread.BlockingPortal() as portal:
                started.set_result((portal, partial(loop.call_soon_threadsafe, stopped.set)))
                await stopped.wait()
                await portal.stop(cancel_remaining=True)
        finally:
            await self._client.aclose()


def _closed_error() -> TrainingBackendError:
    """Return the error for a call on a closed client."""
    return TrainingBackendError(
        "This TrainingClient is closed.",
        hint="Create a new client, or close it after the last call.",
    )


class TrainingClient:
    """Synchronous version of `AsyncTrainingClient`, with the same names, arguments and errors.

    It runs an event loop in its own thread. Use it as a context manager, or call `close`; an
    unclosed client is closed at interpreter shutdown. After `close`, and in a process forked
    after its creation, every call raises `TrainingBackendError`.
    """

    def __init__(
        self,
        *,
        home: Path | str | None = None,
        store_url: str | None = None,
        credentials: CredentialSource | None = None,
        backends: Mapping[str, TrainingBackend] | None = None,
    ) -> None:
        self._client = AsyncTrainingClient(
            home=home, store_url=store_url, credentials=credentials, backends=backends
        )
        self._loop = _Loop(self._client)
        weakref.finalize(self, self._loop.stop).atexit = False

    @property
    def home(self) -> Path:
        """Directory for all state."""
        return self._client.home

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """See `AsyncTrainingClient.aclose`; calls in other threads raise. Safe to repeat."""
        self._loop.close()

    def _call(self, function: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        """Run a coroutine in the loop's thread; cancel it on Ctrl-C.

        Otherwise it would keep running, and closing the client would wait for it.
        """
        task = self._loop.start(function, *args)
        try:
            return task.result()
        except CancelledError:
            raise _closed_error() from None
        except BaseException:
            task.cancel()
            raise

    def backend(self, name: str) -> TrainingBackend:
        """See `AsyncTrainingClient.backend`; the backend itself is asynchronous."""
        self._loop.check()
        return self._client.backend(name)

    def inspect(self, config: ConfigLike, *, backend: str | None = None) -> Dataset:
        """See `AsyncTrainingClient.inspect`."""
        return self._call(partial(self._client.inspect, config, backend=backend))

    def validate(self, config: ConfigLike, *, backend: str) -> ValidationReport:
        """See `AsyncTrainingClient.validate`."""
        return self._call(partial(self._client.validate, config, backend=backend))

    def estimate(
        self,
        config: ConfigLike,
        *,
        backend: str,
        sample: int | None = None,
        exact: bool = False,
        on_counting: CountProgress | None = None,
    ) -> Estimate:
        """See `AsyncTrainingClient.estimate`; the callback runs in a worker thread."""
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
        config: ConfigLike,
        *,
        backend: str,
        run_id: str | None = None,
        on_progress: OnProgress | None = None,
        on_update: OnUpdate | None = None,
        on_notice: OnNotice | None = None,
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
            on_notice=on_notice,
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
        self, *, backend: str | None = None, status: TrainingStatus | str | None = None
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
            except Exception as error:  # raised in the caller's thread
                end = error
            await _put(records, end)

        task = self._loop.start(pump)
        try:
            while (item := _take(records, task)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            task.cancel()
            # Empty the queue, so that a thread blocked in `put` can end.
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
        """See `AsyncTrainingClient.watch`; ends on Ctrl-C.

        Args:
            on_event: Called with each event, in a worker thread.
        """

        async def deliver(run: TrainingRun, record: LogRecord) -> None:
            if on_event is not None:
                await to_thread.run_sync(on_event, run, record)

        watcher = self._client.watcher(on_event=deliver if on_event else None, only=only)
        self._call(watcher.run)

    def wait(self, *run_ids: str, timeout: float | None = None) -> Sequence[TrainingRun]:
        """See `AsyncTrainingClient.wait`."""
        return self._call(partial(self._client.wait, *run_ids, timeout=timeout))

    def stop(self, run_id: str, *, save_checkpoint: bool = True) -> TrainingRun:
        """See `AsyncTrainingClient.stop`."""
        stop = partial(self._client.stop, run_id, save_checkpoint=save_checkpoint)
        return self._call(stop)

    def pause(self, run_id: str) -> TrainingRun:
        """See `AsyncTrainingClient.pause`."""
        return self._call(self._client.pause, run_id)

    def unpause(self, run_id: str) -> TrainingRun:
        """See `AsyncTrainingClient.unpause`."""
        return self._call(self._client.unpause, run_id)

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

    def download(self, run_id: str, target: Path | str) -> Path:
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
    """Return the next item of the queue.

    Raises:
        TrainingBackendError: The client was closed by another thread.
    """
    while True:
        ended = task.done()  # checked first, so that items put before the end are returned
        try:
            return records.get(timeout=_POLL)
        except queue.Empty:
            if ended:
                raise _closed_error() from None


async def _put(records: "queue.Queue[Any]", item: Any) -> None:
    """Put an item without blocking the loop; cancelled when the reader stops."""
    put: Callable[[], None] = partial(records.put, item, timeout=None)
    try:
        records.put_nowait(item)
    except queue.Full:
        await to_thread.run_sync(put, abandon_on_cancel=True)
