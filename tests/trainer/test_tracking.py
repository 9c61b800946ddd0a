"""The process that reports a run to its trackers, with a real receiver of webhooks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from openai import OpenAI
from pydantic import ValidationError

from tests.pages import code_blocks
from tests.receiver import Receiver
from tests.waiting import wait_until
from training_backends import (
    MLflowIntegration,
    PluginIntegration,
    TensorBoardIntegration,
    TrainingConfig,
    WandbIntegration,
    WebhookIntegration,
)
from training_backends.core.files import hold_lock
from training_backends.core.run import Failure
from training_backends.rundir.directory import (
    Event,
    ExitRecord,
    MetricsRow,
    RunDir,
    RunSpec,
)
from training_backends.trackers.tracker import Measurement, TrackedRun

pytestmark = pytest.mark.slow

_SECRET = "whsec_" + "c2VjcmV0LW9mLXRoZS1yZWNlaXZlcg=="
_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def run(tmp_path: Path, receiver: Receiver) -> RunDir:
    """A run that reports to the receiver."""
    return _make(tmp_path, {"type": "webhook", "url": receiver.url, "credential": "hook"})


def _make(tmp_path: Path, *integrations: dict[str, Any]) -> RunDir:
    run = RunDir(tmp_path / "exp-1")
    spec = {
        "run_id": "exp-1",
        "model": "tiny-mistral",
        "tuning": "full",
        "train": ["a.jsonl"],
        "training_steps": 3,
        "integrations": integrations,
    }
    run.write_spec(RunSpec.model_validate(spec))
    return run


def _measure(run: RunDir, *steps: int) -> None:
    for step in steps:
        row = MetricsRow(
            at=_AT, step=step, total_steps=3, epoch=1, train_loss=1 / step, learning_rate=0.5
        )
        run.add_metrics(row)


def _complete(run: RunDir) -> None:
    run.write_exit(ExitRecord(status="completed", code=0))


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the process; it is given the secret as the trainer gives it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(run: RunDir) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "training_backends.trainer", "track", str(run.path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        started.append(process)
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps({"0": _SECRET}).encode())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@contextmanager
def training(run: RunDir) -> Iterator[None]:
    """Hold the lock that tells that the run trains."""
    with hold_lock(run.lock):
        yield


def test_a_webhook_receives_parameters_metrics_events_and_the_end(
    run: RunDir, receiver: Receiver, start: Start
) -> None:
    """Everything that happened, each once, in order."""
    _measure(run, 1, 2)
    run.add_event(Event(name="status", message="Training", data={"status": "running"}))
    _complete(run)
    assert start(run).wait(60) == 0
    kinds = [one["type"] for one in receiver.documents]
    assert kinds == ["run.started", "run.metrics", "run.status", "run.completed"]
    assert receiver.documents[0]["parameters"]["model"] == "tiny-mistral"
    assert receiver.steps == [1, 2]


def test_webhooks_are_signed(run: RunDir, receiver: Receiver, start: Start) -> None:
    """By the Standard Webhooks scheme, which the OpenAI SDK verifies, too."""
    _complete(run)
    start(run).wait(60)
    client = OpenAI(api_key="none")
    for headers, body in receiver.received:
        client.webhooks.verify_signature(body, headers, secret=_SECRET)


def test_a_receiver_that_fails_gets_the_same_message_again(
    run: RunDir, receiver: Receiver, start: Start
) -> None:
    """Nothing is lost, and a repetition can be recognized."""
    receiver.refusing = [204, 503]
    _measure(run, 1)
    _complete(run)
    assert start(run).wait(60) == 0
    sent = [headers["webhook-id"] for headers, body in receiver.received if b"metrics" in body]
    assert (len(sent), len({*sent})) == (2, 1)
    assert receiver.documents[-1]["type"] == "run.completed"


def test_a_failing_tracker_is_mentioned_in_the_log_of_the_run(
    run: RunDir, receiver: Receiver, start: Start
) -> None:
    """Once, and without the secret."""
    receiver.refusing = [500] * 3
    with training(run):
        start(run)
        wait_until(lambda: len(receiver.received) >= 3)
        warnings = [it.message for it, _ in run.read_events() if it.level == "warning"]
    assert len(warnings) == 1
    assert "answered 500" in warnings[0]


def test_what_the_library_of_a_tracker_does_at_exit_is_done(
    run: RunDir, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as sending what is left."""
    sent = tmp_path / "sent"
    code = f"import atexit, pathlib; atexit.register(pathlib.Path({str(sent)!r}).touch)"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _complete(run)
    assert start(run).wait(60) == 0
    assert sent.exists()


def test_a_killed_process_is_continued_where_it_was(
    run: RunDir, receiver: Receiver, start: Start
) -> None:
    """What was received is not sent again."""
    with training(run):
        _measure(run, 1)
        first = start(run)
        wait_until((run.path / ".tracking-0.json").exists)
        first.kill()
        first.wait()
        _measure(run, 2)
        _complete(run)
    assert start(run).wait(60) == 0
    assert receiver.steps == [1, 2]


def test_a_run_that_may_continue_is_not_reported_as_finished(
    run: RunDir, receiver: Receiver, start: Start
) -> None:
    """A suspended run has no process and no end."""
    _measure(run, 1)
    assert start(run).wait(60) == 0
    assert receiver.documents[-1]["type"] == "run.metrics"


def test_the_reason_of_a_failure_is_reported(run: RunDir, receiver: Receiver, start: Start) -> None:
    """The receiver need not ask back."""
    failure = Failure(kind="out_of_memory", message="Not enough memory")
    run.write_exit(ExitRecord(status="failed", code=1, failure=failure))
    start(run).wait(60)
    assert (receiver.documents[-1]["type"], receiver.documents[-1]["message"]) == (
        "run.failed",
        "Not enough memory",
    )


def test_tensorboard_reads_every_value_with_its_time(tmp_path: Path, start: Start) -> None:
    """By its own loader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    run = _make(tmp_path, {"type": "tensorboard", "directory": str(tmp_path / "boards")})
    _measure(run, 1, 2)
    _complete(run)
    assert start(run).wait(60) == 0
    found = EventAccumulator(str(tmp_path / "boards" / "exp-1"))
    found.Reload()
    losses = [(it.step, it.value, it.wall_time) for it in found.Scalars("train_loss")]
    assert losses == [(1, 1.0, _AT.timestamp()), (2, 0.5, _AT.timestamp())]


def test_the_page_configures_every_tracker() -> None:
    """Its example is a valid configuration."""
    (block,) = code_blocks("trackers.md", "yaml")
    given = yaml.safe_load(block.text)
    config = TrainingConfig.model_validate({"model": "m", "data": {"train": "a.jsonl"}, **given})
    assert {type(each) for each in config.integrations} == {
        MLflowIntegration,
        TensorBoardIntegration,
        WandbIntegration,
        WebhookIntegration,
    }


def test_the_tracker_of_the_page_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One class is all that another package needs."""
    code = next(it.text for it in code_blocks("trackers.md", "python") if "class" in it.text)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    entry = PluginIntegration(type="console", options={"a": 1})
    tracker = namespace["ConsoleTracker"](entry, TrackedRun("exp-1", tmp_path, {"seed": 3}))
    tracker.start()
    tracker.measured([Measurement(2, _AT, {"train_loss": 0.5})])
    tracker.finish("completed", "")
    assert capsys.readouterr().out.splitlines() == [
        "exp-1 {'seed': 3} {'a': 1}",
        "2 {'train_loss': 0.5}",
        "completed ",
    ]


@pytest.mark.parametrize("url", ["http://user:pass@host/hook", "ftp://host"])
def test_a_url_with_a_password_or_another_scheme_is_rejected(url: str) -> None:
    """It would be stored with the run; the message does not repeat it."""
    with pytest.raises(ValidationError) as error:
        WebhookIntegration(type="webhook", url=url)
    assert "pass@" not in str(error.value.errors(include_input=False))


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    """As data paths are."""
    entries = [
        {"type": "mlflow", "tracking_uri": "sqlite:///mlflow.db"},
        {"type": "tensorboard", "directory": "boards"},
    ]
    given = {"model": "m", "data": {"train": "a.jsonl"}, "integrations": entries}
    found = TrainingConfig.model_validate(given).resolved(tmp_path).integrations
    assert getattr(found[0], "tracking_uri", "") == f"sqlite:///{tmp_path}/mlflow.db"
    assert getattr(found[1], "directory", None) == tmp_path / "boards"


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of MLflow's own server, on SQLite."""
    pytest.importorskip("mlflow.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(f"{url}/health"))
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.trackers
def test_an_mlflow_server_has_parameters_metrics_and_the_end(
    tmp_path: Path, mlflow_server: str, start: Start
) -> None:
    """By MLflow's own client; a second report adds nothing."""
    from mlflow import MlflowClient  # noqa: PLC0415

    run = _make(tmp_path, {"type": "mlflow", "tracking_uri": mlflow_server, "experiment": "bots"})
    _measure(run, 1, 2)
    _complete(run)
    for _ in range(2):
        assert start(run).wait(300) == 0
        (run.path / ".tracking-0.json").unlink()
    client = MlflowClient(mlflow_server)
    where = client.get_experiment_by_name("bots").experiment_id
    (found,) = client.search_runs([where])
    assert (found.info.status, found.data.params["model"]) == ("FINISHED", "tiny-mistral")
    history = client.get_metric_history(found.info.run_id, "train_loss")
    moment = int(_AT.timestamp() * 1000)
    assert [(it.step, it.value, it.timestamp) for it in history] == [
        (1, 1.0, moment),
        (2, 0.5, moment),
    ]


@pytest.mark.trackers
def test_wandb_keeps_an_offline_run(tmp_path: Path, start: Start) -> None:
    """In files that `wandb sync` uploads later."""
    pytest.importorskip("wandb")
    run = _make(tmp_path, {"type": "wandb", "project": "bots", "mode": "offline"})
    _measure(run, 1)
    _complete(run)
    assert start(run).wait(300) == 0
    (written,) = run.path.glob("wandb/offline-run-*-exp-1/*.wandb")
    assert b"train_loss" in written.read_bytes()
