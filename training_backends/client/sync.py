"""The synchronous client."""

import asyncio
import atexit
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from anyio import from_thread, get_cancelled_exc_class, to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.backend import CredentialSource, TrainingBackend
from training_backends.core.errors import TrainingBackendError
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.objects.settings import ObjectSettings

__all__ = ["TrainingClient"]

_T = TypeVar("_T")
_P = ParamSpec("_P")
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


def _blocking(
    method: Callable[Concatenate[AsyncTrainingClient, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate["TrainingClient", _P], _T]:
    """Return the method with the same signature and docstring, to be called without `await`."""

    @wraps(method)
    def call(self: "TrainingClient", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._call(partial(method, self._client, *args, **kwargs))

    return call


class TrainingClient:
    """Synchronous version of `AsyncTrainingClient`, with the same names, arguments and errors.

    It runs an event loop in its own thread, in which callbacks are called, too; those that report
    counted bytes are called in a worker thread. Use it as a context manager, or call `close`; an
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
        objects: ObjectSettings | None = None,
    ) -> None:
        self._client = AsyncTrainingClient(
            home=home,
            store_url=store_url,
            credentials=credentials,
            backends=backends,
            objects=objects,
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

    inspect = _blocking(AsyncTrainingClient.inspect)
    validate = _blocking(AsyncTrainingClient.validate)
    estimate = _blocking(AsyncTrainingClient.estimate)
    launch = _blocking(AsyncTrainingClient.launch)
    run = _blocking(AsyncTrainingClient.run)
    get = _blocking(AsyncTrainingClient.get)
    status = _blocking(AsyncTrainingClient.status)
    list = _blocking(AsyncTrainingClient.list)
    refresh = _blocking(AsyncTrainingClient.refresh)
    metrics = _blocking(AsyncTrainingClient.metrics)
    wait = _blocking(AsyncTrainingClient.wait)
    stop = _blocking(AsyncTrainingClient.stop)
    pause = _blocking(AsyncTrainingClient.pause)
    unpause = _blocking(AsyncTrainingClient.unpause)
    resume = _blocking(AsyncTrainingClient.resume)
    download = _blocking(AsyncTrainingClient.download)
    push = _blocking(AsyncTrainingClient.push)
    publish = _blocking(AsyncTrainingClient.publish)
    sample = _blocking(AsyncTrainingClient.sample)
    evaluate = _blocking(AsyncTrainingClient.evaluate)
    delete = _blocking(AsyncTrainingClient.delete)
    remove_checkpoints = _blocking(AsyncTrainingClient.remove_checkpoints)
    remove_log = _blocking(AsyncTrainingClient.remove_log)
    check_store = _blocking(AsyncTrainingClient.check_store)
    recover_store = _blocking(AsyncTrainingClient.recover_store)

    def logs(
        self,
        run_id: str,
        *,
        after: str | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> Iterator[LogRecord]:
        """See `AsyncTrainingClient.logs`."""
        # The generator is consumed by one task in the loop: stepping it from here, call
        # by call, would break any timeout or task group that it holds.
        records: queue.Queue[LogRecord | BaseException | None] = queue.Queue(maxsize=256)

        async def pump() -> None:
            end: BaseException | None = None
            try:
                found = self._client.logs(run_id, after=after, tail=tail, follow=follow)
                async with aclosing(found) as logs:
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

    def watch(
        self,
        on_event: Callable[[TrainingRun, LogRecord], None] | None = None,
        *,
        only: Collection[str] | None = None,
        sources: Collection[str] | None = None,
    ) -> None:
        """See `AsyncTrainingClient.watch`; ends on Ctrl-C.

        Args:
            on_event: Called with each event, in a worker thread.
        """

        async def deliver(run: TrainingRun, record: LogRecord) -> None:
            if on_event is not None:
                await to_thread.run_sync(on_event, run, record)

        watcher = self._client.watcher(
            on_event=deliver if on_event else None, only=only, sources=sources
        )
        self._call(watcher.run)


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
