"""Traces through the gateway: from a client's request to the run that it launches."""

from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.gateway.conftest import Site, site
from tests.waiting import until
from training_backends.core.tracing import span, trace_headers

pytestmark = pytest.mark.anyio

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = int(PARENT.split("-")[1], 16)


def finished(spans: InMemorySpanExporter, name: str) -> list[Any]:
    """Return the spans of a name."""
    return [each for each in spans.get_finished_spans() if each.name == name]


async def test_a_request_is_a_span_of_its_client_s_trace(
    here: Site, spans: InMemorySpanExporter
) -> None:
    """Named by its route; an id or a key is in none of its attributes."""
    file_id = await here.upload()
    await here.http.get(f"/v1/files/{file_id}", headers={"traceparent": PARENT})
    (found,) = await until(lambda: finished(spans, "GET /v1/files/{file_id}"))
    assert found.kind is trace.SpanKind.SERVER
    assert found.context.trace_id == TRACE
    assert found.parent.span_id == int(PARENT.split("-")[2], 16)
    assert dict(found.attributes) == {
        "http.request.method": "GET",
        "http.route": "/v1/files/{file_id}",
        "http.response.status_code": 200,
    }


async def test_the_launch_of_a_job_belongs_to_the_trace_that_created_it(
    here: Site, spans: InMemorySpanExporter
) -> None:
    """Although it happens later, in a task of its own."""
    file_id = await here.upload()
    here.http.headers["traceparent"] = PARENT
    await here.started(files=[file_id])
    (launch,) = await until(lambda: finished(spans, "training_backends.launch"))
    assert launch.context.trace_id == TRACE


async def test_a_job_keeps_its_trace_through_a_restart(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    """It is stored with the job; requests without a trace store none."""
    async with site(tmp_path) as here:
        job = await here.create()
        here.http.headers["traceparent"] = PARENT
        traced = await here.create(suffix="x")
        for each in (job, traced):
            await here.until(each["id"], "VALIDATED")
    async with site(tmp_path, here.backend) as here:
        await here.http.post(f"/v1/fine_tuning/jobs/{traced['id']}/start")
        (launch,) = await until(lambda: finished(spans, "training_backends.launch"))
        assert launch.context.trace_id == TRACE


def test_a_trace_is_passed_on_by_headers(spans: InMemorySpanExporter) -> None:
    """Of the span in which the request is made; outside of all, there are none."""
    assert trace_headers() == {}
    with span("outer"):
        headers = trace_headers()
    (outer,) = finished(spans, "outer")
    assert headers == {
        "traceparent": f"00-{outer.context.trace_id:032x}-{outer.context.span_id:016x}-01"
    }
