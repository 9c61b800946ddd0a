"""The boundary to backends: time limits, type checks and translated exceptions."""

import errno
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from inspect import isawaitable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import anyio
from pydantic import SecretStr

from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    Health,
    RemoteRun,
    TrainingBackend,
)
from training_backends.core.capabilities import Capabilities
from training_backends.core.errors import (
    AuthenticationFailed,
    BackendBroken,
    BackendUnavailable,
    CredentialNotFound,
    Issue,
    RateLimited,
    TrainingBackendError,
    VaultLocked,
)
from training_backends.core.estimate import Estimate
from training_backends.core.logging import get_logger
from training_backends.core.plugins import installed_backends
from training_backends.core.redaction import redact
from training_backends.core.registry import create_backend
from training_backends.core.run import (
    LogRecord,
    Observation,
    Reply,
    RunState,
    TrainingRun,
    ValidationReport,
)

__all__ = [
    "CallersCredentials",
    "callers_own",
    "guarded",
    "has_lists",
    "is_about_server",
    "is_callers_own",
    "make_backend",
    "time_limit",
]

log = get_logger()

TIME_LIMITS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "aclose": 10.0,
        "health": 30.0,
        "list_remote": 300.0,
        "observe": 180.0,
        "pause": 300.0,
        "status": 180.0,
        "statuses": 300.0,
        "stop": 300.0,
        "unpause": 300.0,
    }
)
"""Seconds for each method: more than the HTTP layer takes with all its retries. Methods that read
data or transfer files have no limit."""
CREATE_LIMIT: Final = 60.0
"""Seconds for import, `create` and `capabilities` together; generous for cold disks."""
_RETURNS: Final[Mapping[str, type | tuple[type, ...]]] = MappingProxyType(
    {
        "capabilities": Capabilities,
        "create": TrainingBackend,
        "download": Path,
        "download_checkpoint": Path,
        "estimate": Estimate,
        "health": Health,
        "launch": RunState,
        "list_remote": Sequence,
        "observe": Observation,
        "options_tolerating": Mapping,
        "poll_interval": tuple,
        "resume": RunState,
        "sample": Reply,
        "status": RunState,
        "statuses": Mapping,
        "suspend": int,
        "tolerated_bad_rows": (int, float),
        "validate": ValidationReport,
    }
)
_LONGEST: Final = 2000
"""Characters kept of the text of a backend's exception."""
_CALLERS: Final = "_training_backends_callers_own"
_SHORTAGES: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
_PACKAGE: Final = "training-backends"


def make_backend(name: str, context: BackendContext) -> TrainingBackend:
    """Load, create and guard the backend registered as `name`.

    Runs in a daemon thread that is abandoned after a minute, so that a plugin that hangs blocks
    neither the caller nor the end of the process.

    Raises:
        ConfigError: No such backend is installed.
        BackendNotInstalled: The backend cannot be imported.
        BackendBroken: The backend cannot be created.
        BackendUnavailable: Creating the backend timed out.
    """
    package = installed_backends().get(name, name)
    context = replace(context, credentials=CallersCredentials(context.credentials))
    made: list[TrainingBackend | BaseException] = []

    def work() -> None:
        try:
            with _translated(name, package, "create"):
                backend = _checked("create", create_backend(name, context))
            guard = guarded(backend, name, package)
            with suppress(TrainingBackendError):
                _ = guard.capabilities  # if it hangs, the time limit applies
            made.append(guard)
        except BaseException as error:  # re-raised in the calling thread
            made.append(error)

    thread = threading.Thread(
        target=copy_context().run, args=(work,), name=f"create {name}", daemon=True
    )
    thread.start()
    thread.join(CREATE_LIMIT)
    if not made:
        raise _timed_out(name, package, "create", CREATE_LIMIT)
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def guarded(backend: TrainingBackend, name: str, package: str | None = None) -> TrainingBackend:
    """Wrap a backend so that its methods have time limits and raise only our exceptions.

    Args:
        name: The backend's name in the client.
        package: Distribution that provides it; default: the top-level package of its module.
    """
    package = package or type(backend).__module__.partition(".")[0]
    return cast("TrainingBackend", _Guard(backend, name, package))


def has_lists(backend: TrainingBackend) -> bool:
    """Return whether a backend overrides `statuses` with requests that cover many runs."""
    kind = backend.__class__  # for a guard, the class of the backend inside
    return kind.statuses is not TrainingBackend.statuses


def is_about_server(error: TrainingBackendError) -> bool:
    """Return whether an error for one run applies to all runs of its backend."""
    if isinstance(error, BackendUnavailable):
        return not error.sent
    return isinstance(error, AuthenticationFailed | CredentialNotFound | VaultLocked | RateLimited)


@contextmanager
def time_limit(seconds: float | None, error: TrainingBackendError) -> Iterator[None]:
    """Cancel the block after `seconds` and raise `error`; None: no limit."""
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise error


@contextmanager
def callers_own() -> Iterator[None]:
    """Mark exceptions from a caller's callback, so that they are not translated."""
    try:
        yield
    except BaseException as error:
        error.__dict__[_CALLERS] = True
        raise


def is_callers_own(error: BaseException) -> bool:
    """Return whether an exception comes from a caller's callback."""
    return bool(getattr(error, _CALLERS, False))


class CallersCredentials:
    """A credential source whose errors leave a backend's verb unchanged, as a callback's do."""

    def __init__(self, source: CredentialSource) -> None:
        self._source = source

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """See `CredentialSource.get`."""
        with callers_own():
            return await self._source.get(provider, profile)

    async def get_all(self, provider: str, profile: str | None = None) -> Mapping[str, SecretStr]:
        """See `CredentialSource.get_all`."""
        with callers_own():
            return await self._source.get_all(provider, profile)


class _Guard:
    """A proxy of a backend that applies the boundary to each attribute."""

    __slots__ = ("_backend", "_name", "_package")

    def __init__(self, backend: TrainingBackend, name: str, package: str) -> None:
        self._backend = backend
        self._name = name
        self._package = package

    @property  # type: ignore[misc]
    def __class__(self) -> type[TrainingBackend]:  # type: ignore[override]
        """The backend's class, so that `isinstance` works."""
        return type(self._backend)

    def __repr__(self) -> str:
        return f"<backend {self._name!r} of {self._package}>"

    def __getattr__(self, name: str) -> Any:
        if not hasattr(type(self._backend), name):
            return getattr(self._backend, name)
        with _translated(self._name, self._package, name):
            value = getattr(self._backend, name)
            if isinstance(value, type) or not callable(value):
                return _checked(name, value)
        return self._verb(name, value)

    def _verb(self, verb: str, value: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            run_id = next((each.id for each in given if isinstance(each, TrainingRun)), None)
            with _translated(self._name, self._package, verb, run_id):
                answer = value(*args, **kwargs)
                if isawaitable(answer):
                    return self._awaited(verb, answer, run_id)
                if isinstance(answer, AsyncGenerator):
                    return self._streamed(verb, answer, run_id)
                return _checked(verb, answer)

        return call

    async def _awaited(self, verb: str, answer: Awaitable[Any], run_id: str | None) -> Any:
        limit = TIME_LIMITS.get(verb)
        with (
            _translated(self._name, self._package, verb, run_id),
            time_limit(limit, _timed_out(self._name, self._package, verb, limit or 0.0)),
        ):
            return _checked(verb, await answer)

    async def _streamed(
        self, verb: str, answer: AsyncGenerator[Any, None], run_id: str | None
    ) -> AsyncGenerator[Any, None]:
        with _translated(self._name, self._package, verb, run_id):
            async with aclosing(answer):
                async for item in answer:
                    yield item


# -- errors ------------------------------------------------------------------------------------


@contextmanager
def _translated(name: str, package: str, verb: str, run_id: str | None = None) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        single = _single(error)
        if is_callers_own(single):
            raise
        if not isinstance(single, TrainingBackendError):
            log.debug("backend failed", backend=name, verb=verb, run_id=run_id, exc_info=error)
            raise _broken(error, name, package, verb, run_id) from _without_secrets(error, {})
        single.backend = single.backend or name
        single.run_id = single.run_id or run_id
        _without_secrets(single, {})
        if single is error:
            raise
        raise single from single.__cause__


def _broken(
    error: BaseException, name: str, package: str, verb: str, run_id: str | None
) -> BackendBroken:
    reason = ": ".join(filter(None, (type(error).__name__, _text(error))))
    hint = (
        f"This is a bug in {package}; please report it to its authors with the traceback logged "
        "under TRAINING_BACKENDS_LOG_LEVEL=debug."
    )
    if package == _PACKAGE:
        hint = (
            "This is a bug; please report it with the traceback logged under "
            "TRAINING_BACKENDS_LOG_LEVEL=debug."
        )
    transient = isinstance(error, ConnectionError | TimeoutError)
    if _is_shortage(error) or (isinstance(error, OSError) and not transient):
        hint = "Check memory, open files, disk space and permissions on this machine, then retry."
    return BackendBroken(
        f"The backend {name!r} of {package} failed in {verb!r}: {reason}",
        package=package,
        hint=hint,
        backend=name,
        run_id=run_id,
        retryable=transient or _is_shortage(error),
    )


def _timed_out(name: str, package: str, verb: str, limit: float) -> BackendUnavailable:
    return BackendUnavailable(
        f"The backend {name!r} of {package} did not finish {verb!r} within {limit:g} s.",
        hint="Retry. If the problem persists, report it to the authors of the backend.",
        backend=name,
    )


def _is_shortage(error: BaseException) -> bool:
    """Return whether the machine is temporarily out of a resource, such as memory."""
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError) or "can't start new thread" in _text(error)


def _single(error: BaseException) -> BaseException:
    """Return the only error inside nested groups, or the group if it has several."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _text(error: BaseException) -> str:
    try:
        text = redact(str(error))
    except Exception:  # its own __str__ is broken too
        return ""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _without_secrets(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    """Return an error with secrets redacted from its text, attributes and causes.

    The error is changed in place. If it still shows a secret, because it builds its text from
    other state, it is replaced by a `RuntimeError` that names its class.
    """
    if id(error) in done:
        return done[id(error)]
    done[id(error)] = error
    error.args = tuple(map(_clean, error.args))
    error.__dict__.update({name: _clean(value) for name, value in vars(error).items()})
    if isinstance(error, OSError):
        for name in ("strerror", "filename", "filename2"):
            if isinstance(value := getattr(error, name), str):
                setattr(error, name, redact(value))
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    error.__cause__ = cause and _without_secrets(cause, done)
    error.__context__ = context and _without_secrets(context, done)
    error.__suppress_context__ = suppressed
    if isinstance(error, BaseExceptionGroup):
        inner = [_without_secrets(each, done) for each in error.exceptions]
        is_clean = inner == list(error.exceptions) and not _shows_secret(error)
        stand_in: BaseException = BaseExceptionGroup(redact(error.message), inner)
    else:
        is_clean = isinstance(error, TrainingBackendError) or not _shows_secret(error)
        stand_in = RuntimeError(f"{type(error).__name__}: {_text(error)}")
    if is_clean:
        return error
    stand_in.__cause__, stand_in.__context__ = error.__cause__, error.__context__
    stand_in.__suppress_context__ = suppressed
    done[id(error)] = stand_in.with_traceback(error.__traceback__)
    return stand_in


def _shows_secret(error: BaseException) -> bool:
    shown = "".join(traceback.format_exception_only(error)) + repr(error)
    return redact(shown) != shown


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Issue):
        return replace(value, message=redact(value.message), fix=value.fix and redact(value.fix))
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        return value if redact(text) == text else redact(text).encode()
    if type(value) in {list, tuple}:
        return type(value)(map(_clean, value))
    return value


# -- results -----------------------------------------------------------------------------------


def _checked(verb: str, answer: Any) -> Any:
    """Return a method's result after checking its type.

    Raises:
        TypeError: The result has the wrong type.
    """
    wanted = _RETURNS.get(verb)
    if wanted is not None and not isinstance(answer, wanted):
        raise _wrong_type(answer, wanted)
    if isinstance(answer, Estimate):
        return answer.model_copy(update={"notes": _clean(answer.notes)})
    parts: Sequence[tuple[Any, type]] = ()
    if isinstance(answer, Observation):
        parts = [(answer.state, RunState), *((each, LogRecord) for each in answer.records)]
    elif verb == "statuses":
        parts = [(each, RunState) for each in answer.values()]
    elif verb == "list_remote":
        parts = [(each, RemoteRun) for each in answer]
    elif verb == "poll_interval":
        shortest, longest = answer
        parts = [(shortest, timedelta), (longest, timedelta)]
    for part, kind in parts:
        if not isinstance(part, kind):
            raise _wrong_type(part, kind)
    return answer


def _wrong_type(found: Any, wanted: type | tuple[type, ...]) -> TypeError:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    names = " or ".join(kind.__name__ for kind in kinds)
    return TypeError(f"returned {type(found).__name__}, not {names}")
