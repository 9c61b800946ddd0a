"""Processes that torch's elastic agent starts, restarts and ends."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Trainer
from tests.trainer.continuing import last_step, rows_by_step
from tests.waiting import wait_until
from training_backends.core.run import Failure
from training_backends.rundir.directory import ExitRecord, RunDir, RunSpec, TrainerExitCode
from training_backends.trainer.control import StopRequest
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.launch import Outcome, launch, loopback_store
from training_backends.trainer.process import train
from training_backends.trainer.queue import Device

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MakeRun = Callable[..., RunDir]

BEGINNING = """
import json, os, pathlib, signal, sys, time
run, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
life, shared = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), run / ".processes"
ended = {"status": "completed", "code": 0, "step": 3}
"""
REPORT = '(shared / "exit.json").write_text(json.dumps(ended))'


def run_program(run: RunDir, program: str) -> ExitRecord:
    """Launch two processes of a program."""
    command = (sys.executable, "-c", BEGINNING + program)
    return launch(run, run.read_spec(), StopRequest(run.stop), program=command)


@pytest.fixture
def run(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two processes."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):  # launching changes them
        monkeypatch.setenv(name, "1")
    return make_run(tmp_path / "r", num_processes=2)


def messages(run: RunDir) -> list[str]:
    return [event.message for event, _ in run.read_events()]


def test_what_the_processes_report_counts_not_their_exit_codes(run: RunDir) -> None:
    """One reports and fails, the other waits for it forever: the run ends as reported."""
    record = run_program(run, f'if rank == "1": {REPORT}; sys.exit(1)\ntime.sleep(600)')
    assert (record.status, record.step) == ("completed", 3)
    assert not Outcome(run).directory.exists()
    assert messages(run) == []


def test_a_process_without_memory_starts_all_again(run: RunDir) -> None:
    """The event says with how many rows."""
    short = 'if life == 0: (shared / "micro_batch_size").write_text("2"); sys.exit(1)\n'
    record = run_program(run, short + f'if rank == "0": {REPORT}')
    assert record.status == "completed"
    (message,) = messages(run)
    assert message.startswith("Out of memory: retrying with 2 rows at a time. Restarting")


def test_a_process_that_keeps_dying_fails_the_run(run: RunDir) -> None:
    """After some restarts the failure names the process and its signal; it can be resumed."""
    program = 'if rank == "1": os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)'
    with pytest.raises(TrainerError, match=r"process 2 of 2 .*signal 9") as caught:
        run_program(run, program)
    assert (caught.value.failure.kind, caught.value.failure.retryable) == ("lost", True)
    assert len(messages(run)) == 8


def test_processes_receive_settings_of_libraries_and_no_token(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is fetched before they start, so they do not ask the hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    keep = '(run / f"{rank}.json").write_text(json.dumps(dict(os.environ)))\n'
    run_program(run, keep + f'if rank == "0": {REPORT}')
    for rank in "01":
        given = json.loads((run.path / f"{rank}.json").read_bytes())
        assert (given["NCCL_P2P_DISABLE"], given["HF_HUB_OFFLINE"]) == ("1", "1")
        assert "hf_secret" not in given.values()


def test_each_process_sees_one_gpu(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of those that the run was given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keep = '(run / f"{rank}.gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])\n'
    command = (sys.executable, "-c", BEGINNING + keep + f'if rank == "0": {REPORT}')
    devices = [Device(name, name) for name in ("3", "GPU-5")]
    launch(run, run.read_spec(), StopRequest(run.stop), devices, command)
    assert [(run.path / f"{rank}.gpu").read_text() for rank in "01"] == ["3", "GPU-5"]


def test_a_stop_signal_reaches_the_processes_as_a_file(run: RunDir) -> None:
    """They are in sessions of their own, so that only the leader receives signals."""
    program = f"""
if rank == "0":
    os.kill(int(sys.argv[2]), signal.SIGTERM)
    while not (run / "stop").exists():
        time.sleep(0.01)
    {REPORT}
"""
    stop = StopRequest(run.stop)
    with stop.listening():
        launch(run, run.read_spec(), stop, program=(sys.executable, "-c", BEGINNING + program))
    assert run.stop.read_text() == "save"


def test_the_first_report_counts(run: RunDir) -> None:
    """The others fail because the first one did."""
    outcome = Outcome(run)
    outcome.directory.mkdir()
    for kind in ("validation", "internal"):
        failure = Failure(kind=kind, message=kind)
        outcome.report(ExitRecord(status="failed", code=4, failure=failure))
    record = outcome.read()
    assert record is not None
    assert record.failure is not None
    assert record.failure.kind == "validation"


def test_only_this_machine_reaches_the_store() -> None:
    """Who does could send the processes anything; any other address means other machines."""
    store = loopback_store()
    socket.create_connection(("127.0.0.1", store.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))


def test_fewer_gpus_than_processes_fail_the_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run.write_spec(run.read_spec().model_copy(update={"device": "auto"}))
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "num_processes is 2, but only 1" in record.failure.message


def test_data_that_cannot_be_used_fails_the_run_at_once(run: RunDir, trainer: Trainer) -> None:
    """All processes find the same fault; the failure is not retried."""
    (source,) = run.read_spec().train
    spec = run.read_spec().model_dump() | {"train": [source.local_path.with_name("none.jsonl")]}
    run.write_spec(RunSpec.model_validate(spec))
    forked = partial(launch, program=trainer.worker)
    assert train(run.path, forked) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "none.jsonl cannot be read" in record.failure.message
    assert not any("Restarting" in message for message in messages(run))


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def has_ended(pid: int) -> bool:
    """Tell whether a process does not exist, or is only still listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_is_replaced_and_a_signal_saves_a_checkpoint(
    make_run: MakeRun, trainer: Trainer, tmp_path: Path
) -> None:
    """Steps repeated after the kill give the same numbers to the last digit."""
    changes: dict[str, Any] = {"training_steps": 3000, "checkpoint_every": 10, "validation": []}
    run = make_run(tmp_path / "r", **changes, num_processes=2)
    pid = trainer.start(run, forks=True)
    wait_until(lambda: run.exit.exists() or last_step(run) >= 12, patience=200)
    os.kill(children_of(pid)[1], signal.SIGKILL)
    wait_until(lambda: any("Restarting" in message for message in messages(run)), patience=200)
    reached = len(run.read_metrics())
    wait_until(lambda: run.exit.exists() or len(run.read_metrics()) > reached + 1, patience=200)
    os.kill(pid, signal.SIGTERM)
    assert trainer.end() == TrainerExitCode.STOPPED, run.read_exit()
    assert run.read_checkpoints()[-1][1].step == last_step(run)
    steps = [row.step for row, _ in run.read_metrics()]
    assert len(steps) > len(set(steps)), "no step was repeated"
    assert all(len(rows) == 1 for rows in rows_by_step(run).values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_the_leader(run: RunDir, trainer: Trainer) -> None:
    """Even if it is killed before the others have loaded anything."""
    pid = trainer.start(run)
    left = wait_until(lambda: children_of(pid), lambda found: len(found) == 2, patience=200)
    os.kill(pid, signal.SIGKILL)
    assert trainer.end() == -signal.SIGKILL
    wait_until(lambda: all(map(has_ended, left)))
