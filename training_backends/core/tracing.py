"""OpenTelemetry spans, if the program uses OpenTelemetry.

OpenTelemetry is not imported here. A program that exports spans has imported it already, or
`opentelemetry-instrument` has; in any other program spans would be discarded.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

from training_backends.core.redaction import redact, redact_value

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan

__all__ = ["Span", "span"]

_NAME: Final = "training_backends"

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
    if "opentelemetry.trace" not in sys.modules:
        return _NO_SPAN
    return _recorded(name, outgoing=outgoing, attributes=attributes)


@contextmanager
def _recorded(name: str, *, outgoing: bool, attributes: Mapping[str, Value]) -> Iterator[Span]:
    from opentelemetry import trace  # noqa: PLC0415  # optional, and already imported

    with trace.get_tracer(_NAME).start_as_current_span(
        name,
        kind=trace.SpanKind.CLIENT if outgoing else trace.SpanKind.INTERNAL,
        attributes=_clean(attributes),
        # OpenTelemetry's own error recording includes the traceback, unredacted.
        record_exception=False,
        set_status_on_exception=False,
    ) as otel_span:
        try:
            yield Span(otel_span)
        except Exception as error:
            kind, message = type(error).__qualname__, redact(str(error))
            otel_span.set_attribute("error.type", kind)
            otel_span.add_event("exception", {"exception.type": kind, "exception.message": message})
            otel_span.set_status(trace.StatusCode.ERROR, message)
            raise


def _clean(attributes: Mapping[str, Value]) -> dict[str, str | bool | int | float]:
    cleaned = redact_value(attributes)
    return {name: value for name, value in cleaned.items() if value is not None}
