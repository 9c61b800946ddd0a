"""Verbs and requests as a program that uses OpenTelemetry sees them, and runs named in logs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import LogCapture

from tests.client.conftest import MakeConfig
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
