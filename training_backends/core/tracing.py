"""OpenTelemetry spans, if the program uses OpenTelemetry.

OpenTelemetry is not imported here. A program that exports spans has imported it already, or
`opentelemetry-instrument` has; in any other program spans would be discarded.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from training_backends.core.redaction import redact, redact_value

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan

__all__ = [
    "TRACE_VARIABLES",
    "Poll",
    "Span",
    "poll_span",
    "remote_parent",
    "server_span",
    "span",
    "trace_environment",
    "trace_headers",
]

_NAME: Final = "training_backends"
TRACE_VARIABLES: Final = ("TRACEPARENT", "TRACESTATE")
"""Environment variables that pass a trace on to a child process."""
_polls: ContextVar[bool] = ContextVar("polls", default=False)
"""Whether this is inside of a poll, which records no spans and passes no trace on."""

Value = str | bool | int | float | None


class Span:
    """A span; does nothing without OpenTelemetry."""

    __slots__ = ("_span",)

    def __init__(self, otel_span: "OtelSpan | None" = None) -> None:
        self._span = otel_span

    def set(self, **attributes: Value) -> None:
        """Set attributes of the span."""
        if self._span is not None:
            self._span.set_attributes(_clean(attributes))

    def rename(self, name: str) -> None:
        """Change the name, once it is known."""
        if self._span is not None:
            self._span.update_name(name)


class _NoSpan(AbstractContextManager[Span]):
    """The context manager used without OpenTelemetry."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return _EMPTY

    def __exit__(self, *error: object) -> None:
        return None


_EMPTY: Final = Span()
_NO_SPAN: Final = _NoSpan()


def span(
    name: str, /, *, outgoing: bool = False, **attributes: Value
) -> AbstractContextManager[Span]:
    """Record the duration and outcome of the block as a span.

    Secrets are redacted from attributes and errors. Do not use it around a `yield` of an
    asynchronous generator: the caller's spans would become children of this one.

    Args:
        outgoing: Whether the block is a request to a server.
        attributes: Span attributes; None values are dropped. Pass names with dots as
            `**{"http.request.method": "GET"}`.
    """
    if not _is_used() or _polls.get():
        return _NO_SPAN
    return _recorded(name, "CLIENT" if outgoing else "INTERNAL", attributes)


def server_span(headers: Mapping[bytes, bytes]) -> AbstractContextManager[Span]:
    """Record the block as the span of a request that was received.

    It continues the trace of the client. Nothing is recorded if an instrumentation of the server
    already does.

    Args:
        headers: Headers of the request by lower-case name.
    """
    if not _is_used():
        return _NO_SPAN
    from opentelemetry import trace  # noqa: PLC0415  # optional, and already imported

    if trace.get_current_span().is_recording():
        return _NO_SPAN
    names = (name.lower() for name in TRACE_VARIABLES)
    given = {name: headers.get(name.encode(), b"").decode("latin-1") for name in names}
    return _recorded("HTTP", "SERVER", {}, _context(given))


class Poll:
    """A look at something that has rarely changed."""

    __slots__ = ("has_changed",)

    def __init__(self) -> None:
        self.has_changed = False


@contextmanager
def poll_span(name: str, /, **attributes: Value) -> Iterator[Poll]:
    """Record the block as one span if it fails or sets `has_changed`, and otherwise not at all.

    Following a run for a day would otherwise fill the caller's trace.
    """
    poll, began, token = Poll(), time.time_ns(), _polls.set(True)  # its only argument
    failure: Exception | None = None
    try:
        yield poll
    except Exception as error:
        failure = error
        raise
    finally:
        _polls.reset(token)
        if _is_used() and not _polls.get() and (poll.has_changed or failure is not None):
            _record_poll(name, attributes, began, failure)


def _record_poll(
    name: str, attributes: Mapping[str, Value], began: int, failure: Exception | None
) -> None:
    from opentelemetry import trace  # noqa: PLC0415  # optional, and already imported

    found = trace.get_tracer(_NAME).start_span(
        name, attributes=_clean(attributes), start_time=began
    )
    if failure is not None:
        _record_failure(found, failure)
    found.end()


def trace_headers() -> dict[str, str]:
    """Return the headers that let a server continue the current trace; empty without one."""
    if not _is_used() or _polls.get():
        return {}
    headers: dict[str, str] = {}
    _propagator().inject(headers)
    return headers


def trace_environment() -> dict[str, str]:
    """Return the environment variables that let a child process continue the current trace."""
    found = trace_headers()
    names = (name for name in TRACE_VARIABLES if name.lower() in found)
    return {name: found[name.lower()] for name in names}


@contextmanager
def remote_parent(headers: Mapping[str, str] | None) -> Iterator[None]:
    """Make spans in the block continue a trace of another process or request.

    Args:
        headers: As returned by `trace_headers`.
    """
    if not headers or not _is_used():
        yield
        return
    from opentelemetry import context  # noqa: PLC0415  # optional, and already imported

    token = context.attach(_context(headers))
    try:
        yield
    finally:
        context.detach(token)


def _is_used() -> bool:
    return "opentelemetry.trace" in sys.modules


def _propagator() -> Any:
    from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415  # see _is_used

    return tracecontext.TraceContextTextMapPropagator()


def _context(headers: Mapping[str, str]) -> Any:
    return _propagator().extract(headers)


@contextmanager
def _recorded(
    name: str, kind: str, attributes: Mapping[str, Value], context: Any = None
) -> Iterator[Span]:
    from opentelemetry import trace  # noqa: PLC0415  # optional, and already imported

    with trace.get_tracer(_NAME).start_as_current_span(
        name,
        context,
        kind=trace.SpanKind[kind],
        attributes=_clean(attributes),
        # OpenTelemetry's own error recording includes the traceback, unredacted.
        record_exception=False,
        set_status_on_exception=False,
    ) as otel_span:
        try:
            yield Span(otel_span)
        except Exception as error:
            _record_failure(otel_span, error)
            raise


def _record_failure(otel_span: "OtelSpan", error: Exception) -> None:
    from opentelemetry.trace import StatusCode  # noqa: PLC0415  # optional, and already imported

    kind, message = type(error).__qualname__, redact(str(error))
    otel_span.set_attribute("error.type", kind)
    otel_span.add_event("exception", {"exception.type": kind, "exception.message": message})
    otel_span.set_status(StatusCode.ERROR, message)


def _clean(attributes: Mapping[str, Value]) -> dict[str, str | bool | int | float]:
    cleaned = redact_value(attributes)
    return {name: value for name, value in cleaned.items() if value is not None}
