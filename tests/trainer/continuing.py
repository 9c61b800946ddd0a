"""Continue runs, and hold what came of it against what was."""

import hashlib
import shutil
from pathlib import Path

from training_backends.rundir.checkpoints import step_of
from training_backends.rundir.directory import ExitRecord, RunDir, RunSpec, TrainerExitCode
from training_backends.trainer.control import StopRequest
from training_backends.trainer.process import train

KEPT = "kept"


def train_to_continue(run: RunDir) -> TrainerExitCode:
    """Train a run, and keep its checkpoints as they are before it has completed."""

    def launch(run: RunDir, spec: RunSpec, stop: StopRequest, _: object) -> ExitRecord:
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415  # loads torch

        process = TrainingProcess(run, spec, stop)
        result = process.run()
        shutil.copytree(run.checkpoints, run.path / KEPT)
        return ExitRecord(
            status="completed", code=TrainerExitCode.DONE, step=process.step, result=result
        )

    return train(run.path, launch)


def before_its_end(finished: RunDir, path: Path) -> RunDir:
    """Return a copy of a run of `train_to_continue`, as it was before it completed."""
    run = RunDir(shutil.copytree(finished.path, path))
    run.exit.unlink()
    shutil.rmtree(run.checkpoints)
    (run.path / KEPT).rename(run.checkpoints)
    return run


def assert_continues_bit_equal(finished: RunDir, path: Path, step: int) -> None:
    """Train a copy on from `step`: every measure behind it and the weights are the same."""
    run = before_its_end(finished, path)
    run.metrics.unlink()
    shutil.rmtree(run.result)
    for checkpoint in run.checkpoints.iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert train(run.path) is TrainerExitCode.DONE
    whole = _measures(finished)
    assert _measures(run) == {at: whole[at] for at in range(step + 1, max(whole) + 1)}
    name = "model.safetensors"
    assert (run.result / name).read_bytes() == (finished.result / name).read_bytes()


def _measures(run: RunDir) -> dict[int, dict[str, float]]:
    """Return what was measured at each step, but for what depends on the machine."""
    machine = {"tokens_per_second", "memory_bytes"}
    return {
        row.step: {name: value for name, value in row.measures().items() if name not in machine}
        for row, _ in run.read_metrics()
    }


def rows_by_step(run: RunDir) -> dict[int, set[tuple[object, ...]]]:
    """Return what was measured at each step, every time that it was done."""
    found: dict[int, set[tuple[object, ...]]] = {}
    for row, _ in run.read_metrics():
        told = (row.train_loss, row.grad_norm, row.learning_rate, row.tokens)
        found.setdefault(row.step, set()).add((*told, row.valid_loss, row.epoch))
    return found


def hashes(run: RunDir) -> dict[str, str]:
    """Return the digests of the finished weights."""
    files = sorted(run.result.rglob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def last_step(run: RunDir) -> int:
    """Return the step that was written down last."""
    return max((row.step for row in run.read_newest_metrics()), default=0)
