"""A training process continues the trace of its launch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from training_backends.rundir.directory import RunDir, TrainerExitCode

if TYPE_CHECKING:
    from tests.forking import Trainer

pytestmark = pytest.mark.engine

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("exporter", ["console", "not-installed"])
def test_training_is_a_span_of_the_trace_that_launched_it(
    tmp_path: Path,
    make_run: Callable[..., RunDir],
    trainer: "Trainer",
    capfd: pytest.CaptureFixture[str],
    *,
    monkeypatch: pytest.MonkeyPatch,
    exporter: str,
) -> None:
    """Exported as the variables of OpenTelemetry say; a wrong one does not fail the run."""
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-b7ad6b7169203331-01")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", exporter)
    run = make_run(tmp_path / "mine", training_steps=1)
    trainer.start(run)
    assert trainer.end() == TrainerExitCode.DONE
    told = [event for event, _ in run.read_events() if event.message == f"Trace {TRACE}"]
    assert [event.data["trace_id"] for event in told] == [TRACE]
    if exporter == "console":
        out = capfd.readouterr().out
        span = json.loads(out[out.index("{") : out.rindex("}") + 1])
        assert span["name"] == "training_backends.train"
        assert span["context"]["trace_id"] == f"0x{TRACE}"
        assert span["parent_id"] == "0xb7ad6b7169203331"
        assert span["attributes"] == {"run_id": "mine"}
