"""Continue a finished run from one of its checkpoints, and hold it against what it was."""

import shutil
from pathlib import Path

from training_backends.engine.training import train
from training_backends.rundir.checkpoints import step_of
from training_backends.rundir.directory import ExitCode, RunDir


def assert_continues_bit_equal(finished: RunDir, path: Path, step: int) -> None:
    """Train a copy on from `step`: every measure behind it and the weights are the same."""
    run = RunDir(shutil.copytree(finished.path, path))
    run.exit.unlink()
    run.metrics.unlink()
    shutil.rmtree(run.result)
    for checkpoint in run.checkpoints.iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert train(run.path) is ExitCode.DONE
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
