"""Programs that use OpenTelemetry see spans; others pay nothing."""

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from training_backends.core.tracing import span

CANARY = "s3cr3tCANARYvalue"


def test_a_block_becomes_a_span_with_what_it_is_about(spans: InMemorySpanExporter) -> None:
    """What is known first, what becomes known later, and which is inside which."""
    with span("launch", run_id="r-1", backend="mistral", remote_id=None) as launch:
        with span("GET /v1/models", outgoing=True, **{"http.request.method": "GET"}) as call:
            call.set(**{"http.response.status_code": 200})
        launch.set(remote_id="j-1")
    inner, outer = spans.get_finished_spans()
    assert outer.name == "launch"
    assert dict(outer.attributes or {}) == {
        "run_id": "r-1",
        "backend": "mistral",
        "remote_id": "j-1",
    }
    assert outer.kind is trace.SpanKind.INTERNAL
    assert dict(inner.attributes or {}) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
    }
    assert inner.kind is trace.SpanKind.CLIENT
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert outer.status.status_code is trace.StatusCode.UNSET


def test_an_error_is_told_and_passed_on(spans: InMemorySpanExporter) -> None:
    """With its class and message, which hold no secret, and without a traceback."""
    with pytest.raises(ValueError, match="refused"), span("launch"):
        raise ValueError(f"refused: password={CANARY}")
    (told,) = spans.get_finished_spans()
    assert told.status.status_code is trace.StatusCode.ERROR
    assert (told.attributes or {})["error.type"] == "ValueError"
    assert [event.name for event in told.events] == ["exception"]
    assert "refused" in told.to_json()
    assert CANARY not in told.to_json()
    assert "test_tracing.py" not in told.to_json()


def test_no_attribute_holds_a_secret(spans: InMemorySpanExporter) -> None:
    """Neither by its name nor by its value."""
    with span("call", api_key=CANARY, url=f"https://u:{CANARY}@host/?token={CANARY}") as call:
        call.set(header=f"Bearer {CANARY}")
    (told,) = spans.get_finished_spans()
    assert CANARY not in told.to_json()


def test_without_opentelemetry_nothing_is_imported() -> None:
    """Neither by the package nor by a span; errors pass through."""
    program = """
import sys
import training_backends
import training_backends.core.tracing as tracing
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry"] = None  # as if it were not installed
with tracing.span("launch", run_id="r") as span:
    span.set(remote_id="j")
try:
    with tracing.span("launch"):
        raise KeyError("x")
except KeyError:
    print("passed on")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "passed on\n"


def test_an_imported_opentelemetry_that_nobody_set_up_is_no_trouble() -> None:
    """The spans go nowhere."""
    with span("launch", run_id="r") as launched:
        launched.set(remote_id="j")
