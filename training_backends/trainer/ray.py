"""Train a run directory on the Ray cluster that runs this program.

The driver asks Ray Train for a worker and passes stop requests on; the worker starts the trainer as
a process of its own, as the local backend does. If the worker or its node is lost, Ray Train starts
another, which continues from the newest checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from ctypes import CDLL
from pathlib import Path
from typing import Any, Final

from training_backends.rundir.directory import RunDir, TrainerExitCode

__all__ = ["drive"]

_ENDED_BY_ITSELF: Final = frozenset(
    {TrainerExitCode.DONE, TrainerExitCode.STOPPED, TrainerExitCode.BAD_INPUT}
)
_GROUP: Final = ("RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "MASTER_")
"""How the variables begin by which torch finds the group that Ray Train has made."""
_PAUSE: Final = 1.0
"""Seconds between two looks at a directory that another trainer still holds."""
_PR_SET_PDEATHSIG: Final = 1


def drive(path: Path, wanted: Namespace) -> TrainerExitCode:
    """Train with workers of the cluster; return how the run ended."""
    import ray  # noqa: PLC0415
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    run = RunDir(path)
    ray.init()
    # Only the driver gets a signal when the job is stopped, and `ray.init` has set its handler.
    signal.signal(signal.SIGTERM, lambda *_: run.request_stop())
    resources = {"CPU": wanted.cpus} | ({"GPU": wanted.gpus} if wanted.gpus else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run_dir": str(path)},
        scaling_config=ScalingConfig(
            num_workers=wanted.workers,
            use_gpu=bool(wanted.gpus),
            resources_per_worker=resources,
            accelerator_type=wanted.accelerator,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(path / "ray"),
            failure_config=FailureConfig(max_failures=wanted.max_failures),
        ),
    )
    trainer.fit()
    record = run.read_exit()
    return TrainerExitCode.CRASHED if record is None else TrainerExitCode(record.code)


def _work(config: dict[str, Any]) -> None:
    """Run the trainer in this worker; an error makes Ray Train start another worker."""
    run = RunDir(Path(config["run_dir"]))
    command = [sys.executable, "-m", "training_backends.trainer.ray", str(run.path)]
    while True:
        done = subprocess.run(command, env=_environment(), check=False)  # noqa: S603  # our own
        code = done.returncode
        if code in _ENDED_BY_ITSELF or run.read_exit() is not None:
            return
        if code != TrainerExitCode.ALREADY_ACTIVE:
            raise RuntimeError(f"the trainer exited with {code} and without a result")
        time.sleep(_PAUSE)


def _environment() -> dict[str, str]:
    """Return this worker's environment without its own process group."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_GROUP)}


def _train(path: Path) -> int:
    """Train in this process, which dies with the worker that has started it."""
    parent = os.getppid()
    if sys.platform == "linux":
        CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return TrainerExitCode.CRASHED
    from training_backends.trainer.process import train  # noqa: PLC0415

    return train(path)


if __name__ == "__main__":
    sys.exit(_train(Path(sys.argv[1])))
