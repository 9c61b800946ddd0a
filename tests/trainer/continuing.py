"""Continue runs, and hold what came of it against what was."""

import hashlib
import shutil
from pathlib import Path

from training_backends.rundir.checkpoints import step_of
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.process import train


def assert_continues_bit_equal(finished: RunDir, path: Path, step: int) -> None:
    """Train a copy on from `step`: every measure behind it and the weights are the same."""
    run = RunDir(shutil.copytree(finished.path, path))
    run.exit.unlink()
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
