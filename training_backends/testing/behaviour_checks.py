"""Checks of errors, declared methods and resources: what a client relies on at any time."""

import gc
import tempfile
import threading
import traceback
from asyncio import all_tasks
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Final

import anyio
import anyio.lowlevel

from training_backends.core.backend import RemoteFilters
from training_backends.core.errors import (
    AuthenticationFailed,
    BackendUnavailable,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
    UnsupportedOperation,
)
from training_backends.core.status import TrainingStatus
from training_backends.testing.faults import Disturbance
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.subject import MANY, CheckSkipped, Subject, expect, needs

__all__ = ["BehaviourChecks"]

_CLASSES: Final[Mapping[int, type[TrainingBackendError]]] = MappingProxyType(
    {
        401: AuthenticationFailed,
        403: PermissionDenied,
        404: RunNotFound,
        429: RateLimited,
        500: BackendUnavailable,
        503: BackendUnavailable,
    }
)
_BROKEN: Final[tuple[Disturbance, ...]] = ("lose", "drop", "html", "hang")
_LONGEST_BLOCK: Final = 0.25
"""Seconds for which a call may block the event loop. The shortest of several calls counts, since a
busy machine delays single ones."""

_LONG_ENOUGH: Final = 1.0
"""Seconds after which a method is known to exist."""

Verb = Callable[[], Awaitable[object]]


class BehaviourChecks:
    """Checks of stop, list, health, errors, declared methods and resources."""

    async def check_stop_is_repeatable(self, subject: Subject) -> None:
        """A stop ends the run; stopping a stopping or finished run has no effect."""
        run = await subject.launched()
        for _ in range(2):
            await subject.backend.stop(run)
        await subject.confirm_stop(str(run.remote_id))
        state = await subject.backend.status(run)
        while not state.status.is_terminal:  # there is no notification
            await anyio.sleep(0.02)
            state = await subject.backend.status(run)
        expect(state.status is TrainingStatus.CANCELLED, f"cancelled, not {state.status}")
        await subject.backend.stop(run)

    async def check_stop_of_finished_run_changes_nothing(self, subject: Subject) -> None:
        """Stopping a completed or failed run has no effect."""
        for end, status in (
            (subject.finish, TrainingStatus.COMPLETED),
            (subject.fail, TrainingStatus.FAILED),
        ):
            run = await subject.launched()
            await end(str(run.remote_id))
            await subject.backend.stop(run)
            state = await subject.backend.status(run)
            expect(state.status is status, f"a run to stay {status}, not {state.status}")

    @needs("disturb", "heal")
    async def check_stop_reports_rejection(self, subject: Subject) -> None:
        """A stop that the provider does not accept raises an error; it returns once accepted."""
        run = await subject.launched()
        subject.disturb(403, times=MANY)
        error = await _raised(lambda: subject.backend.stop(run))
        subject.heal()
        expect(isinstance(error, PermissionDenied), f"PermissionDenied of stop, not {error!r}")
        state = await subject.backend.status(run)
        expect(not state.status.is_terminal, "a run whose stop was rejected to keep running")
        await subject.backend.stop(run)
        await subject.confirm_stop(str(run.remote_id))
        other = subject.reopen()
        try:
            seen = await other.status(run)
        finally:
            await other.aclose()
        ended = {TrainingStatus.STOPPING, TrainingStatus.CANCELLED}
        expect(seen.status in ended, f"a stopping run, not {seen.status}")

    @needs("progress")
    async def check_pause_keeps_the_job(self, subject: Subject) -> None:
        """A paused run is paused, not finished, and continues as the same job; both repeatable."""
        backend = subject.backend
        if not backend.capabilities.pauses:
            raise CheckSkipped("the backend does not pause runs")
        run = await subject.launched()
        subject.progress(str(run.remote_id), 1)
        before = list(subject.job_ids())
        paused = {TrainingStatus.PAUSED, TrainingStatus.STOPPING}
        for _ in range(2):
            await backend.pause(run)
            state = await backend.status(run)
            expect(state.status in paused, f"a paused run, not {state.status}")
        for _ in range(2):
            await backend.unpause(run)
            state = await backend.status(run)
            expect(
                state.status not in paused and not state.status.is_terminal,
                f"a run that continues, not {state.status}",
            )
        expect(list(subject.job_ids()) == before, "no further job")

    async def check_lacking_verbs_are_unsupported(self, subject: Subject) -> None:
        """An undeclared method raises UnsupportedOperation."""
        for name, (declared, verb) in (await _verbs(subject, Path("never-written"))).items():
            if declared:
                continue
            error = await _raised(verb)
            expect(
                isinstance(error, UnsupportedOperation),
                f"UnsupportedOperation of the undeclared method `{name}`",
            )

    async def check_declared_verbs_exist(self, subject: Subject) -> None:
        """A declared method does not raise UnsupportedOperation."""
        with tempfile.TemporaryDirectory() as directory:
            verbs = await _verbs(subject, Path(directory, "model"))
            for name, (declared, verb) in verbs.items():
                error = None
                with anyio.move_on_after(_LONG_ENOUGH):  # what works may take long
                    error = await _raised(verb) if declared else None
                expect(
                    error is None or isinstance(error, TrainingBackendError),
                    f"an error of this package from `{name}`, not {error!r}",
                )
                expect(
                    not isinstance(error, UnsupportedOperation),
                    f"the declared method `{name}` to exist",
                )

    async def check_listed_runs_include_ours(self, subject: Subject) -> None:
        """A launched run is included in the list of the provider's runs."""
        _require_lists(subject)
        run = await subject.launched()
        listed = await subject.backend.list_remote(RemoteFilters())
        expect(run.remote_id in {entry.remote_id for entry in listed}, "the run in the list")

    async def check_lists_are_complete(self, subject: Subject) -> None:
        """A list has the runs of all pages, each once."""
        _require_lists(subject)
        for _ in range(subject.page_size + 2):
            await subject.launched()
        listed = [run.remote_id for run in await subject.backend.list_remote(RemoteFilters())]
        expect(len(listed) == len(set(listed)), "each run once")
        missing = set(subject.job_ids()) - set(listed)
        expect(not missing, f"all runs, also the {len(missing)} of further pages")

    async def check_lists_are_filtered(self, subject: Subject) -> None:
        """Each filter of a list is applied."""
        _require_lists(subject)
        live = await subject.launched()
        done = await subject.launched()
        await subject.finish(str(done.remote_id))
        listed = await subject.backend.list_remote(RemoteFilters())
        mine = next(run for run in listed if run.remote_id == live.remote_id)
        cases = {
            RemoteFilters(status=TrainingStatus.COMPLETED): {done.remote_id},
            RemoteFilters(status=TrainingStatus.CANCELLED): set(),
            RemoteFilters(model=mine.model): {live.remote_id, done.remote_id},
            RemoteFilters(model="no-such-model"): set(),
            RemoteFilters(suffix="nosuch"): set(),
        }
        for filters, wanted in cases.items():
            found = {run.remote_id for run in await subject.backend.list_remote(filters)}
            asked = filters.model_dump(mode="json", exclude_none=True)
            expect(found == wanted, f"{len(wanted)} runs for {asked}, not {len(found)}")

    # -- errors ------------------------------------------------------------------------

    @needs("disturb", "heal")
    async def check_errors_have_their_class(self, subject: Subject) -> None:
        """Error responses of the provider raise the error of their kind."""
        run = await subject.launched()
        backend = subject.backend
        for status, kind in _CLASSES.items():
            for ask in (backend.status, backend.observe):
                subject.disturb(status, times=MANY)
                error = await _raised(lambda ask=ask: ask(run))  # type: ignore[misc]
                subject.heal()
                expect(
                    isinstance(error, kind),
                    f"{kind.__name__} from {ask.__name__} after {status}, not {error!r}",
                )

    @needs("disturb", "heal")
    async def check_broken_answers_are_errors_of_this_package(self, subject: Subject) -> None:
        """Without a usable response, a method raises BackendUnavailable or ProtocolError."""
        run = await subject.launched()
        for kind in _BROKEN:
            for ask in (subject.backend.status, subject.backend.observe):
                subject.disturb(kind, times=MANY)
                error = await _raised(lambda ask=ask: ask(run))  # type: ignore[misc]
                subject.heal()
                expect(
                    isinstance(error, BackendUnavailable | ProtocolError),
                    f"BackendUnavailable or ProtocolError after {kind!r}, not {error!r}",
                )

    @needs("disturb", "heal", "secrets")
    async def check_errors_hide_secrets(self, subject: Subject) -> None:
        """No message, hint, repr or traceback shows a secret that the provider repeats."""
        run = await subject.launched()
        backend, new = subject.backend, subject.run()
        verbs: Mapping[str, Verb] = {
            "status": lambda: backend.status(run),
            "stop": lambda: backend.stop(run),
            "launch": lambda: backend.launch(new, MemoryJournal(new)),
            "health": backend.health,
        }
        for status in (400, 401, 403, 500):
            for name, verb in verbs.items():
                subject.disturb(status, times=MANY)
                shown = await _shown(verb)
                subject.heal()
                expect(
                    not any(secret in shown for secret in subject.secrets()),
                    f"no secret in the error of `{name}` after {status}",
                )

    @needs("disturb", "heal")
    async def check_health_reports_problems(self, subject: Subject) -> None:
        """`health` returns every problem as its result, in time; it neither raises nor hangs."""
        for kind in (401, 503, *_BROKEN):
            subject.disturb(kind, times=MANY)
            with anyio.move_on_after(subject.patience / 3) as scope:
                health = await subject.backend.health()
            subject.heal()
            expect(not scope.cancelled_caught, f"health to return in time after {kind!r}")
            expect(not health.ok, f"health not to be ok after {kind!r}")
        health = await subject.backend.health()
        expect(health.ok, f"health to be ok again, not {health.message!r}")

    # -- resources ---------------------------------------------------------------------

    async def check_event_loop_stays_free(self, subject: Subject) -> None:
        """A call lets other tasks run while it waits."""
        run = await subject.launched()
        verbs: Mapping[str, Verb] = {
            "status": lambda: subject.backend.status(run),
            "observe": lambda: subject.backend.observe(run),
            "validate": lambda: subject.backend.validate(subject.config, subject.dataset),
            "health": subject.backend.health,
        }
        for name, verb in verbs.items():
            await verb()  # connect, import
            shortest = min([await _longest_block(verb) for _ in range(3)])
            expect(shortest < _LONGEST_BLOCK, f"`{name}` not to block for {shortest:.2f} s")

    @needs("disturb", "heal")
    async def check_calls_can_be_cancelled(self, subject: Subject) -> None:
        """A call that waits for the provider ends when it is cancelled."""
        run = await subject.launched()
        backend = subject.backend
        for name, verb in (
            ("status", lambda: backend.status(run)),
            ("observe", lambda: backend.observe(run)),
        ):
            subject.disturb("hang", times=MANY)
            with anyio.move_on_after(0.05) as scope:
                await verb()
            subject.heal()
            expect(scope.cancelled_caught, f"`{name}` to end by cancellation")
        state = await backend.status(run)
        expect(not state.status.is_terminal, "the backend to work after a cancelled call")

    async def check_tasks_and_threads_end(self, subject: Subject) -> None:
        """After `aclose`, no task and no thread of the backend is left."""
        tasks, threads = all_tasks(), set(threading.enumerate())
        other = subject.reopen()
        run = subject.run()
        run = run.updated(await other.launch(run, MemoryJournal(run)))
        for _ in range(3):
            await other.status(run)
            await other.observe(run)
        await subject.finish(str(run.remote_id))
        await other.aclose()

        def left() -> list[str]:
            names = [task.get_name() for task in all_tasks() - tasks if not task.done()]
            return names + [
                thread.name
                for thread in set(threading.enumerate()) - threads
                if thread.is_alive() and not _is_shared(thread)
            ]

        await _soon(lambda: not left(), subject)
        expect(not left(), f"no task or thread left after aclose, not {left()}")

    @needs("connections")
    async def check_connections_are_closed(self, subject: Subject) -> None:
        """Connections are few, and `aclose` closes all of them."""
        before = subject.connections()
        other = subject.reopen()
        run = subject.run()
        run = run.updated(await other.launch(run, MemoryJournal(run)))
        for _ in range(20):
            await other.status(run)
        used = subject.connections() - before
        await other.aclose()
        gc.collect()
        expect(used <= 10, f"connections that are used again, not {used} for 20 requests")
        await _soon(lambda: subject.connections() <= before, subject)
        left = subject.connections() - before
        expect(left <= 0, f"no connection left open after aclose, not {left}")

    async def check_close_is_repeatable(self, subject: Subject) -> None:
        """A backend can be closed unused, and twice."""
        unused = subject.reopen()
        for _ in range(2):
            await unused.aclose()
        await subject.launched()
        for _ in range(2):
            await subject.backend.aclose()

    @needs("requests", "connections")
    async def check_creation_sends_nothing(self, subject: Subject) -> None:
        """Creating a backend and reading its properties sends no request."""
        before = subject.requests(), subject.connections()
        other = subject.reopen()
        expect(other.capabilities == subject.backend.capabilities, "the same capabilities")
        expect(other.poll_interval[0] <= other.poll_interval[1], "the shorter interval first")
        other.sees(subject.run())
        after = subject.requests(), subject.connections()
        await other.aclose()
        expect(after == before, "no request before the first call")


def _require_lists(subject: Subject) -> None:
    if not subject.backend.capabilities.lists_remote:
        raise CheckSkipped("the backend does not list runs")


async def _verbs(subject: Subject, target: Path) -> Mapping[str, tuple[bool, Verb]]:
    """Return the optional methods, with whether each is declared, for a completed run."""
    can, backend = subject.backend.capabilities, subject.backend
    failed = await subject.launched()
    await subject.fail(str(failed.remote_id))
    failed = failed.updated(await backend.status(failed))
    run = await subject.launched()
    await subject.finish(str(run.remote_id))
    run = run.updated(await backend.status(run))
    live, new = await subject.launched(), subject.run()
    return {
        "list_remote": (can.lists_remote, lambda: backend.list_remote(RemoteFilters())),
        "download": (can.downloads, lambda: backend.download(run, target)),
        "sample": (can.samples, lambda: backend.sample(run, "hello")),
        "resume": (can.resumes != "no", lambda: backend.resume(failed, new, MemoryJournal(new))),
        "pause": (can.pauses, lambda: backend.pause(live)),
        "unpause": (can.pauses, lambda: backend.unpause(live)),
        "delete": (can.deletes, lambda: backend.delete(run)),
    }


async def _raised(verb: Verb) -> Exception | None:
    try:
        await verb()
    except Exception as error:  # the checks judge every kind
        return error
    return None


async def _shown(verb: Verb) -> str:
    """Return everything that a program may show of a call: its result, or its error."""
    try:
        return repr(await verb())
    except Exception as error:  # the checks judge every kind
        shown = [repr(error), *traceback.format_exception(error)]
        if isinstance(error, TrainingBackendError):
            shown += [error.message, error.hint or "", *map(str, error.issues)]
        return "\n".join(shown)


async def _longest_block(verb: Verb) -> float:
    """Return the longest time for which no other task ran during a call, in seconds."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = monotonic()
        while True:
            await anyio.sleep(0.005)
            now = monotonic()
            longest, last = max(longest, now - last), now

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await anyio.lowlevel.checkpoint()
        await verb()
        await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
    return longest


async def _soon(condition: Callable[[], bool], subject: Subject) -> None:
    """Wait for a condition, for a while."""
    with anyio.move_on_after(min(2.0, subject.patience / 3)):
        while not condition():  # noqa: ASYNC110  # nothing notifies
            await anyio.sleep(0.01)


def _is_shared(thread: threading.Thread) -> bool:
    """Return whether a thread belongs to a pool of the event loop or to the scripted server."""
    return thread.name.startswith(("AnyIO", "asyncio_", "ThreadPoolExecutor", "Thread-")) and (
        not thread.name.startswith("Thread-") or "process_request" in thread.name
    )
