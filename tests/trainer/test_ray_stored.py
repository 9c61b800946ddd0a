"""The driver and workers of a run in an object store, with processes that only write files."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import moto.server
import pytest

from tests.buckets import Bucket, bucket, s3_server
from tests.waiting import wait_until
from training_backends.core.config import DataSource
from training_backends.core.run import Failure
from training_backends.rundir.checkpoints import STATE, describe_files
from training_backends.rundir.directory import (
    CheckpointState,
    Event,
    ExitRecord,
    ResultRecord,
    RunDir,
    RunSpec,
    TrainerExitCode,
)
from training_backends.rundir.stored import StoredRun
from training_backends.trainer.control import StopRequest
from training_backends.trainer.launch import Outcome
from training_backends.trainer.queue import Device
from training_backends.trainer.ray_stored import Driver, DriverLink, Worker

pytestmark = pytest.mark.slow

__all__ = ["bucket", "s3_server"]

pytest.importorskip("s3fs")

Process = Callable[[RunDir, int], int]
"""Acts as the training process of a rank, in its run directory; returns an exit code."""


@pytest.fixture
def url(bucket: Bucket, tmp_path: Path) -> str:
    """A run that a client has uploaded."""
    data = tmp_path / "train.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data.write_text(f"{json.dumps(row)}\n" * 8)
    spec = RunSpec(
        run_id="r",
        model="tiny-mistral",
        train=(DataSource(path=Path("data/train-0.jsonl")),),
        training_steps=9,
        batch_size=2,
        keep_checkpoints=2,
    )
    url = f"{bucket.url}/team/runs/r"
    StoredRun.at(url).create(spec, {"data/train-0.jsonl": data})
    return url


class Nodes:
    """Two workers in threads, each with a scratch directory of its own, or all on one node."""

    def __init__(self, url: str, scratch: Path, *, is_one: bool = False) -> None:
        self.url = url
        self.scratch = scratch
        self.is_one = is_one
        self.patience = 0.0
        self.driver = Driver(url, str(scratch / "driver"))
        self.known: list[bool] = []

    def drive(self, *lives: Process) -> TrainerExitCode:
        """Run the driver; each life of the workers has training processes of its own."""

        def launch(
            run: RunDir, spec: RunSpec, stop: StopRequest, devices: Sequence[Device]
        ) -> ExitRecord:
            assert (spec.run_id, stop.requested, devices) == ("r", False, ())
            self.driver.store_tokens()
            with Outcome(run).collected() as outcome:
                for process in lives:
                    self._live(DriverLink(str(run.path)), process)
                record = outcome.read()
            assert record is not None
            return record

        return self.driver.drive(launch)

    def _live(self, link: DriverLink, process: Process) -> None:
        meeting, said = Barrier(2), []

        def work(rank: int) -> bool:
            def broadcast(value: Any) -> Any:
                if rank == 0:
                    said.append(value)
                meeting.wait(60)
                return said[0]

            worker = Worker(
                self.url,
                str(self.scratch / ("driver" if self.is_one else f"node-{rank}")),
                rank=rank,
                processes=2,
                ask=lambda name, *values: getattr(link, name)(*values),
                patience=self.patience,
            )
            return worker.work(lambda run: process(run, rank), broadcast)

        with ThreadPoolExecutor(2) as pool:
            self.known += pool.map(work, range(2))


@pytest.fixture
def nodes(url: str, tmp_path: Path) -> Nodes:
    return Nodes(url, tmp_path / "scratch")


def save(run: RunDir, rank: int, step: int) -> None:
    """Write a rank's share of a checkpoint, as `write_checkpoint` does."""
    path = run.checkpoints / f".step-{step}.tmp"
    path.mkdir(parents=True)
    (path / f"__{rank}_0.distcp").write_bytes(f"{rank} at {step}".encode())
    sizes, checksums = describe_files(path)
    state = CheckpointState(step=step, files=sizes, checksums=checksums)
    (path / STATE).write_text(state.model_dump_json())
    path.rename(run.checkpoints / f"step-{step}")


def start(run: RunDir) -> list[str]:
    """Return the checkpoints that a process finds."""
    return sorted(path.name for path, _ in run.read_checkpoints())


def complete(run: RunDir, rank: int, step: int) -> int:
    """Report the end, with a result, as the first process does."""
    if rank == 0:
        run.result.mkdir()
        (run.result / "model.bin").write_bytes(b"model")
        result = ResultRecord(path="result", format="full", base_model="tiny-mistral")
        record = ExitRecord(status="completed", code=0, step=step, result=result)
        Outcome(run).report(record)
    return 0


def test_what_the_processes_write_is_in_the_store_at_the_end(
    nodes: Nodes, bucket: Bucket, tmp_path: Path
) -> None:
    """Log, the newest checkpoints, the result and how the run ended; the nodes are left clean."""
    spans = []

    def process(run: RunDir, rank: int) -> int:
        spans.append(sorted(path.name for path in (run.tokens / "train-0").iterdir()))
        for step in (3, 6, 9):
            save(run, rank, step)
            if rank == 0:
                run.add_event(Event(name="checkpoint", step=step))
        return complete(run, rank, 9)

    assert nodes.drive(process) is TrainerExitCode.DONE
    assert len(spans[0]) == len(spans[1]) > 2
    stored = StoredRun.at(nodes.url)
    assert [*stored.checkpoints()] == [6, 9]
    stored.update(copy := RunDir(tmp_path / "copy"))
    names = [event.name for event, _ in copy.read_events()]
    assert names.count("checkpoint") == 3
    assert copy.read_exit()
    assert bucket.get("team/runs/r/result/model.bin") == b"model"
    assert not [*nodes.scratch.rglob("step-*"), *nodes.scratch.rglob("*.bin")]


@pytest.mark.parametrize("is_one", [False, True])
def test_a_checkpoint_that_a_node_took_with_it_is_not_continued_from(
    url: str, tmp_path: Path, is_one: bool
) -> None:
    """All workers start again from the one before, with the shares of both."""
    nodes = Nodes(url, tmp_path / "scratch", is_one=is_one)
    found = []

    def first(run: RunDir, rank: int) -> int:
        save(run, rank, 3)
        wait_until(StoredRun.at(url).checkpoints)
        if rank == 0:
            save(run, rank, 6)  # the other process died before it had written its share
        return 1

    def second(run: RunDir, rank: int) -> int:
        found.append((start(run), sorted(p.name for p in run.checkpoints.glob("*/__*"))))
        for step in (6, 9):
            save(run, rank, step)
        return complete(run, rank, 9)

    nodes.drive(first, second)
    assert found == [(["step-3"], ["__0_0.distcp", "__1_0.distcp"])] * 2
    assert [*StoredRun.at(nodes.url).checkpoints()] == [6, 9]
    assert nodes.known == [False, False, True, True]


def test_a_process_that_failed_ends_the_run_and_no_worker_is_started_again(nodes: Nodes) -> None:
    """The other one has only lost contact."""

    def process(run: RunDir, rank: int) -> int:
        if rank == 1:
            failure = Failure(kind="validation", message="The data is empty.")
            Outcome(run).report(ExitRecord(status="failed", code=4, failure=failure))
        return 1

    def never(run: RunDir, rank: int) -> int:
        raise AssertionError(run, rank)

    nodes.patience = 60.0
    assert nodes.drive(process, never) is TrainerExitCode.BAD_INPUT
    assert nodes.known == [True, True, True, True]


def test_a_request_to_stop_reaches_every_process(nodes: Nodes) -> None:
    """The client writes it to the store."""

    def process(run: RunDir, rank: int) -> int:
        if rank == 0:
            StoredRun.at(nodes.url).request_stop(save_checkpoint=True)
        assert wait_until(run.stop.exists)
        save(run, rank, 2)
        if rank == 0:
            Outcome(run).report(ExitRecord(status="stopped", code=3, step=2))
        return 0

    assert nodes.drive(process) is TrainerExitCode.STOPPED
    stored = StoredRun.at(nodes.url)
    assert ([*stored.checkpoints()], stored.read_stop()) == ([2], None)


def test_fewer_rows_at_a_time_are_remembered_in_the_next_life(nodes: Nodes) -> None:
    """One process has run out of memory, and both start again."""
    rows = []

    def first(run: RunDir, rank: int) -> int:
        if rank == 1:
            Outcome(run).limit_rows(1)
        return 1

    def second(run: RunDir, rank: int) -> int:
        rows.append(Outcome(run).max_rows())
        return complete(run, rank, 9)

    nodes.drive(first, second)
    assert rows == [1, 1]


def test_the_log_catches_up_after_the_store_was_unavailable(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training continues, and the log says so."""
    # A second server with the content of the first: moto keeps it in this process.
    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    monkeypatch.delenv("TRAINING_BACKENDS_OBJECTS__OPTIONS__S3__ENDPOINT_URL")
    monkeypatch.setenv("TRAINING_BACKENDS_OBJECTS__OPTIONS", json.dumps({"s3": options}))
    through, both = Nodes(nodes.url, tmp_path / "through"), Barrier(2)

    def process(run: RunDir, rank: int) -> int:
        nonlocal server
        both.wait(60)  # from here on, only the driver uses the store
        if rank == 0:
            server.stop()
            run.add_event(Event(name="message", message="meanwhile"))
            assert wait_until(lambda: "store is unavailable" in capfd.readouterr().err)
            server = moto.server.ThreadedMotoServer(ip_address=host, port=port, verbose=False)
            server.start()
            [log] = (tmp_path / "through").rglob("driver/r/events.jsonl")
            assert wait_until(lambda: "The object store was unavailable" in log.read_text())
        return complete(run, rank, 9)

    try:
        assert through.drive(process) is TrainerExitCode.DONE
        StoredRun.at(nodes.url).update(copy := RunDir(tmp_path / "copy"))
    finally:
        server.stop()
    messages = " ".join(event.message for event, _ in copy.read_events())
    assert "meanwhile" in messages
    assert "The object store was unavailable" in messages
