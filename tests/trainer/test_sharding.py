"""Several processes that share a model: they learn what one process learns."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.buckets import Bucket, bucket, s3_server
from tests.forking import Preloaded
from tests.trainer.tasks import METHODS, changes_for, write_tasks
from training_backends.rundir.checkpoints import damage_of, remove_optimizer_state
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.rundir.stored import StoredRun
from training_backends.trainer.__main__ import main
from training_backends.trainer.encode import encode_data
from training_backends.trainer.models import make_tiny_model
from training_backends.trainer.process import train
from training_backends.trainer.sharding import choose_sharding
from training_backends.trainer.world import ALONE, World

__all__ = ["bucket", "s3_server"]

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MakeRun = Callable[..., RunDir]

ROUNDING = 2e-6
"""Relative: sums over two processes are added in another order."""
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in METHODS},
    "LoRA": {"tuning": {"kind": "lora", "rank": 4}},
    "QLoRA": {"tuning": {"kind": "qlora", "rank": 4}},
}
if find_spec("bitsandbytes") is None:
    del CASES["QLoRA"]


class Groups:
    """Trains runs in groups of processes, see `group.py`."""

    def __init__(self, preloaded: Preloaded) -> None:
        self._server = subprocess.Popen(
            [str(preloaded.python), str(Path(__file__).with_name("group.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, size: int, *runs: RunDir, **more: object) -> None:
        """Train runs one after the other, each in the same processes."""
        request = {"size": size, "runs": [str(run.path) for run in runs], **more}
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        assert json.loads(self._server.stdout.readline()) == [0] * size

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


@pytest.fixture(scope="module")
def groups(preloaded: Preloaded) -> Iterator[Groups]:
    """Processes that have loaded torch already."""
    made = Groups(preloaded)
    yield made
    made.close()


@pytest.fixture(scope="module")
def make(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that writes the spec of a short run of a case."""
    tasks = write_tasks(tmp_path_factory.mktemp("tasks"))
    directory = tmp_path_factory.mktemp("runs")

    def make(case: str, name: str, **changes: Any) -> RunDir:
        method = case if case in METHODS else "all weights"
        common = {**changes_for(method, tasks), "training_steps": 2, **CASES[case]}
        return make_run(directory / f"{case} {name}", **{**common, **changes})

    return make


Trained = dict[tuple[str, str], RunDir]


@pytest.fixture(scope="module")
def together(make: MakeRun, groups: Groups) -> Trained:
    """A run of each case and mode, trained by two processes that hold one row at a time."""
    runs = {
        (case, sharding): make(
            case, sharding, sharding=sharding, num_processes=2, micro_batch_size=1
        )
        for case in CASES
        for sharding in ("zero2", "zero3")
    }
    groups.train(2, *runs.values())
    return runs


def measures(run: RunDir, after: int = 0) -> list[dict[str, float]]:
    """Return the metrics of each step, except those that depend on the machine."""
    machine = {"tokens_per_second", "memory_bytes"}
    return [
        {name: value for name, value in row.measures().items() if name not in machine}
        for row, _ in run.read_metrics()
        if row.step > after
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(make: MakeRun, together: Trained, case: str) -> None:
    """Loss, gradient norm and validation agree in each mode, and so does the result."""
    alone = make(case, "alone")
    assert train(alone.path) is TrainerExitCode.DONE
    for sharding in ("zero2", "zero3"):
        run = together[case, sharding]
        for found, expected in zip(measures(run), measures(alone), strict=True):
            assert found == pytest.approx(expected, rel=ROUNDING, abs=1e-7)
        record, other = run.read_exit(), alone.read_exit()
        assert record is not None
        assert other is not None
        assert (record.status, record.step, record.result) == ("completed", 2, other.result)
        for file in alone.result.glob("*.safetensors"):
            ours, theirs = load_file(run.result / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            for name, weight in theirs.items():
                assert ours[name].dtype == weight.dtype
                assert torch.allclose(ours[name], weight, rtol=1e-3, atol=1e-4)


def test_each_process_reports_once(together: Trained) -> None:
    """Only the leader writes events, metrics and checkpoints."""
    run = together["all weights", "zero3"]
    messages = [event.message for event, _ in run.read_events()]
    assert messages.count("Training in 2 processes with zero3") == 1
    assert [row.step for row, _ in run.read_metrics()] == [1, 2]
    assert [state.step for _, state in run.read_checkpoints()] == [2]


def rewind(run: RunDir, path: Path, step: int) -> RunDir:
    """Return a copy of a finished run that was interrupted right after `step`."""
    copy = RunDir(shutil.copytree(run.path, path))
    for left in (copy.exit, copy.metrics):
        left.unlink()
    for directory in (copy.result, copy.path / ".processes"):
        shutil.rmtree(directory, ignore_errors=True)
    for checkpoint, state in copy.read_checkpoints():
        if state.step > step:
            shutil.rmtree(checkpoint)
    return copy


def test_a_run_is_resumed_with_fewer_and_with_more_processes(
    make: MakeRun, make_run: MakeRun, groups: Groups, tmp_path: Path
) -> None:
    """Saved by two processes, a checkpoint is resumed by one and by three, up to rounding."""
    length = {"training_steps": 4, "checkpoint_every": 2}
    alone = make("all weights", "four steps", **length)
    assert train(alone.path) is TrainerExitCode.DONE
    two = make("all weights", "saved by two", **length, sharding="zero3", num_processes=2)
    groups.train(2, two)
    spec = two.read_spec().model_dump(exclude={"num_processes"})
    fewer, more = (rewind(two, tmp_path / name, 2) for name in ("fewer", "more"))
    make_run(fewer.path, **spec, num_processes=1)
    make_run(more.path, **{**spec, "sharding": "zero2"}, num_processes=3)
    assert train(fewer.path) is TrainerExitCode.DONE, fewer.read_exit()
    groups.train(3, more)
    expected = measures(alone, after=2)
    assert len(expected) == 2
    for run in (fewer, more):
        for ours, theirs in zip(measures(run), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_without_optimizer_state_a_checkpoint_is_still_exported(
    together: Trained, tmp_path: Path
) -> None:
    """A checkpoint at the last step, saved by two processes, is the result."""
    for case, sharding in (("all weights", "zero3"), ("LoRA", "zero2")):
        run = RunDir(shutil.copytree(together[case, sharding].path, tmp_path / case))
        remove_optimizer_state(run)
        assert damage_of(run.checkpoints / "step-2") is None
        assert not (run.checkpoints / "step-2" / "optimizer").exists()
        target = tmp_path / f"{case} exported"
        assert main(["export", str(run.path), "step-2", str(target)]) == 0
        (file,) = run.result.glob("*.safetensors")
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_resumed_with_as_many_processes_every_number_is_the_same(
    make: MakeRun, groups: Groups, tmp_path: Path
) -> None:
    """With dropout, whose masks depend on the step and the process only."""
    tuning = {"kind": "lora", "rank": 4, "dropout": 0.2}
    length = {"training_steps": 4, "checkpoint_every": 2}
    run = make("LoRA", "dropout", **length, tuning=tuning, num_processes=2)
    groups.train(2, run)
    again = rewind(run, tmp_path / "again", 2)
    groups.train(2, again)
    assert measures(again) == measures(run, after=2)
    name = "adapter_model.safetensors"
    assert (again.result / name).read_bytes() == (run.result / name).read_bytes()


def test_out_of_memory_all_processes_start_again_with_half_the_rows(
    make: MakeRun, groups: Groups
) -> None:
    """The losses stay those of one process, and the size that fits is kept in the checkpoint."""
    alone = make("all weights", "all rows", batch_size=8)
    assert train(alone.path) is TrainerExitCode.DONE
    run = make("all weights", "short of memory", batch_size=8, num_processes=2)
    groups.train(2, run, fits=2)
    for found, expected in zip(measures(run), measures(alone), strict=True):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=1e-7)
    state = json.loads((run.checkpoints / "step-2" / "engine.json").read_bytes())
    assert state["micro_batch_size"] == 2


def test_the_mode_depends_on_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and where half of a GPU stays free, weights are not divided."""
    model, two = make_tiny_model(0), World(0, 2)

    def choose(requested: str, world: World = two, device: str = "cuda") -> str:
        return choose_sharding(requested, model, world, torch.device(device), torch.float32)

    assert choose("zero3", ALONE) == "none"
    assert (choose("zero3"), choose("zero2")) == ("zero3", "zero2")
    assert choose("auto", device="cpu") == "zero2"
    needed = sum(weight.numel() for weight in model.parameters()) * (4 + 4 + 16 / 2)
    for memory, expected in ((2.1 * needed, "zero2"), (1.9 * needed, "zero3")):
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        assert choose("auto") == expected


def test_processes_that_share_no_directory_train_as_those_that_do(
    make: MakeRun, groups: Groups, together: Trained, bucket: Bucket, tmp_path: Path
) -> None:
    """The first one makes the result from the checkpoint that all have uploaded in parts."""
    shared = together["all weights", "zero3"]
    driver = make("all weights", "apart", sharding="zero3", num_processes=2, micro_batch_size=1)
    encode_data(driver, driver.read_spec(), lambda: False)
    url = f"{bucket.url}/runs/apart"
    stored = StoredRun.at(url)
    stored.create(driver.read_spec(), {})
    stored.store_tokens(driver)
    environment = {n: text for n, text in os.environ.items() if n.startswith(("AWS_", "TRAINING_"))}
    groups.train(2, driver, stored=url, environment=environment)
    assert measures(driver) == measures(shared)
    stored.update(copy := RunDir(tmp_path / "copy"))
    stored.fetch_result(copy)
    name = "model.safetensors"
    found, expected = load_file(copy.result / name), load_file(shared.result / name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [*stored.checkpoints()] == [2]
