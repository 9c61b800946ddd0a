"""Spans for OpenTelemetry, in programs that use it; nothing at all in others.

OpenTelemetry is not imported here. A program that wants spans has imported it to say where they
go (or `opentelemetry-instrument` has); in one that has not, they would go nowhere.
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
    """What is being done; without OpenTelemetry, nobody hears of it."""

    __slots__ = ("_span",)

    def __init__(self, otel_span: "OtelSpan | None" = None) -> None:
        self._span = otel_span

    def set(self, **attributes: Value) -> None:
        """Say more of it, as soon as it is known."""
        if self._span is not None:
            self._span.set_attributes(_clean(attributes))


class _Unheard(AbstractContextManager[Span]):
    """A span in a program without OpenTelemetry."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return _SILENT

    def __exit__(self, *error: object) -> None:
        return None


_SILENT: Final = Span()
_UNHEARD: Final = _Unheard()


def span(
    name: str, /, *, outgoing: bool = False, **attributes: Value
) -> AbstractContextManager[Span]:
    """Tell OpenTelemetry how long the block takes and how it ends.

    Secrets are taken out of attributes and errors. Never around a `yield` of an asynchronous
    generator: until it is resumed, its caller's spans would be inside this one.

    Args:
        outgoing: Whether it is a call to a server.
        attributes: What it is about; None is left out. A name with dots is given as
            `**{"http.request.method": "GET"}`.
    """
    if "opentelemetry.trace" not in sys.modules:
        return _UNHEARD
    return _told(name, outgoing=outgoing, attributes=attributes)


@contextmanager
def _told(name: str, *, outgoing: bool, attributes: Mapping[str, Value]) -> Iterator[Span]:
    from opentelemetry import trace  # noqa: PLC0415  # optional, and imported already

    with trace.get_tracer(_NAME).start_as_current_span(
        name,
        kind=trace.SpanKind.CLIENT if outgoing else trace.SpanKind.INTERNAL,
        attributes=_clean(attributes),
        # Its own way to record an error writes the whole traceback, uncleaned.
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
