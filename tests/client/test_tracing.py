"""Verbs and requests as a program that uses OpenTelemetry sees them, and runs named in logs."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import LogCapture

from tests.client.conftest import MakeConfig
from tests.waiting import until
from training_backends import AsyncTrainingClient, CredentialVault
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio


@pytest.fixture
def lines() -> Iterator[LogCapture]:
    captured = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, captured])
    yield captured
    structlog.reset_defaults()


async def launch(home: Path, provider: ScriptedProvider, make_config: MakeConfig) -> str:
    vault = CredentialVault({"mistral": "test-key"}, home=home)
    settings = MistralSettings(base_url=provider.base_url, poll_min=0.01)
    backend = MistralAPIBackend(credentials=vault, settings=settings)
    async with AsyncTrainingClient(home=home, backends={"mistral": backend}) as client:
        config = make_config(hyperparameters={"training_steps": 10})
        run = await client.launch(config, backend="mistral", run_id="mine")
        await backend.aclose()
    return str(run.remote_id)


async def test_a_launch_is_a_span_with_its_requests_inside(
    tmp_path: Path, make_config: MakeConfig, spans: InMemorySpanExporter
) -> None:
    """Each verb and each request, with the run they are for."""
    with ScriptedProvider() as provider:
        await launch(tmp_path, provider, make_config)
    told = {span.name: span for span in spans.get_finished_spans()}
    verb = told["training_backends.launch"]
    create = told["POST /v1/fine_tuning/jobs"]
    assert (verb.attributes or {})["run_id"] == "mine"
    assert create.parent is not None
    assert create.parent.span_id == verb.context.span_id
    assert {"training_backends.validate", "training_backends.estimate"} <= told.keys()


async def test_a_request_s_span_names_its_route(
    tmp_path: Path, make_config: MakeConfig, spans: InMemorySpanExporter
) -> None:
    """Without ids, which have no bound; with method, status and host."""
    with ScriptedProvider() as provider:
        remote_id = await launch(tmp_path, provider, make_config)
        host, port = provider.base_url.removeprefix("http://").split("/")[0].split(":")
    requests = [each for each in spans.get_finished_spans() if each.name[0].isupper()]
    assert {each.name for each in requests} >= {
        "POST /v1/files",
        "POST /v1/fine_tuning/jobs",
        "GET /v1/fine_tuning/jobs/{id}",
    }
    for each in requests:
        told = dict(each.attributes or {})
        assert each.name == f"{told['http.request.method']} {told['url.template']}"
        assert told["http.response.status_code"] == 200
        assert (told["server.address"], told["server.port"]) == (host, int(port))
        assert remote_id not in each.to_json()


async def test_polls_are_recorded_only_if_a_status_changed(
    tmp_path: Path, make_config: MakeConfig, spans: InMemorySpanExporter
) -> None:
    """A run of a day would otherwise fill the caller's trace; a wait is one span."""
    polls = 0
    with ScriptedProvider() as provider:
        vault = CredentialVault({"mistral": "test-key"}, home=tmp_path)
        settings = MistralSettings(base_url=provider.base_url, poll_min=0.01)
        backend = MistralAPIBackend(credentials=vault, settings=settings)
        async with AsyncTrainingClient(home=tmp_path, backends={"mistral": backend}) as client:
            config = make_config(hyperparameters={"training_steps": 10})
            provider.auto = "validate"
            run = await client.launch(config, backend="mistral", run_id="mine")
            spans.clear()

            async def finish() -> None:
                nonlocal polls
                await until(lambda: len(provider.asked("GET")) > 20)
                provider.set_status(str(run.remote_id), "RUNNING")
                polls = len(provider.asked("GET"))
                await until(lambda: len(provider.asked("GET")) > polls + 10)
                provider.set_status(str(run.remote_id), "SUCCESS")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(finish)
                await client.wait("mine")
            await backend.aclose()
    told = [
        (each.name, (each.attributes or {}).get("run_id")) for each in spans.get_finished_spans()
    ]
    assert polls > 20
    assert told[-1] == ("training_backends.wait", None)
    observed = ("training_backends.observe", "mine")
    assert 1 <= told.count(observed) <= 3
    assert set(told[:-1]) == {observed}


async def test_every_line_about_a_run_names_it(
    tmp_path: Path, make_config: MakeConfig, lines: LogCapture
) -> None:
    """Those of the requests too, which know of no run."""
    with ScriptedProvider() as provider:
        await launch(tmp_path, provider, make_config)
    created = [
        line for line in lines.entries if "POST" in line.get("call", "") and "start" in line["call"]
    ]
    assert created
    assert all((line["run_id"], line["backend"]) == ("mine", "mistral") for line in created)
