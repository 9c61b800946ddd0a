"""Train a run directory on the Ray cluster that runs this program.

The driver holds the run directory's lock, and Ray Train takes the part that torch's elastic agent
has on one machine: it starts the workers, and starts all of them again if one is lost. Each worker
starts a training process of its own; they continue from the newest checkpoint.

If the run is in an object store, the driver and each worker have a run directory of their own, see
`trainer.ray_stored`.
"""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from training_backends.core.errors import TrainingBackendError
from training_backends.objects.store import is_object_url
from training_backends.rundir.directory import ExitRecord, RunDir, RunSpec, TrainerExitCode
from training_backends.trainer.control import StopRequest
from training_backends.trainer.environment import VISIBLE
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.launch import Outcome
from training_backends.trainer.process import train
from training_backends.trainer.queue import Device
from training_backends.trainer.ray_stored import Driver, DriverLink, Worker

__all__ = ["drive"]

_GROUP: Final = ("RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "MASTER_")
"""How the variables begin by which torch finds the process group of Ray Train."""


def drive(place: str, wanted: Namespace) -> TrainerExitCode:
    """Train with workers of the cluster; return how the run ended.

    Args:
        place: The run directory, or its URL in an object store.
    """
    if not is_object_url(place):
        return train(Path(place), partial(_launch, wanted=wanted))
    try:
        driver = Driver(place, wanted.scratch)
        return driver.drive(partial(_launch, wanted=wanted, driver=driver))
    except TrainingBackendError as error:  # about the store, which cannot have the reason
        print(error, file=sys.stderr)  # noqa: T201  # the job's log, which clients quote
        return TrainerExitCode.CRASHED


def _launch(
    run: RunDir,
    spec: RunSpec,
    stop: StopRequest,
    devices: Sequence[Device],
    *,
    wanted: Namespace,
    driver: Driver | None = None,
) -> ExitRecord:
    """Train with workers of Ray Train; see `launch.launch`."""
    import ray  # noqa: PLC0415
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    del stop, devices  # the processes read the request from the directory, and Ray assigns GPUs
    ray.init()
    # Only the driver receives a signal when the job is stopped; `ray.init` has set a handler.
    signal.signal(signal.SIGTERM, lambda *_: run.request_stop())
    resources = {"CPU": wanted.cpus} | ({"GPU": wanted.gpus} if wanted.gpus else {})
    config: dict[str, Any] = {"run_dir": str(run.path)}
    if driver is not None:
        driver.store_tokens()
        config = {"url": driver.url, "scratch": wanted.scratch, "link": _start_link(run)}
    trainer = TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=spec.num_processes,
            use_gpu=bool(wanted.gpus),
            resources_per_worker=resources,
            accelerator_type=wanted.accelerator,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=wanted.max_failures),
        ),
    )
    failure = None
    with Outcome(run).collected() as outcome:
        try:
            trainer.fit()
        except Exception as error:  # a training process may have reported the reason
            failure = error
        record = outcome.read()
    if record is None:
        message = f"Workers were lost, also after {wanted.max_failures} restarts: {failure}"
        raise TrainerError(message, kind="lost", retryable=True) from failure
    return record


def _start_link(run: RunDir) -> Any:
    """Start an actor next to this program, by which workers reach its run directory."""
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(DriverLink).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
    return actor.remote(str(run.path))


def _work(config: dict[str, Any]) -> None:
    """Run a training process in this worker; an error makes Ray Train start all workers again."""
    if "url" not in config:
        run = RunDir(Path(config["run_dir"]))
        if _run_process(run) != TrainerExitCode.DONE and Outcome(run).read() is None:
            raise _Exited
        return
    import ray  # noqa: PLC0415
    from ray.train import get_context  # noqa: PLC0415
    from ray.train.collective import broadcast_from_rank_zero  # noqa: PLC0415

    context, link = get_context(), config["link"]
    worker = Worker(
        config["url"],
        config["scratch"],
        rank=context.get_world_rank(),
        processes=context.get_world_size(),
        ask=lambda name, *values: ray.get(getattr(link, name).remote(*values)),
    )
    if not worker.work(partial(_run_process, stored=config["url"]), broadcast_from_rank_zero):
        raise _Exited


class _Exited(RuntimeError):
    """The training process has exited without reporting how the run ended."""


def _run_process(run: RunDir, stored: str | None = None) -> int:
    """Run a training process; return its exit code."""
    import ray  # noqa: PLC0415

    command = [sys.executable, "-m", "training_backends.trainer", "work"]
    command += [str(run.path), str(os.getpid()), *(("--stored", stored) if stored else ())]
    env = _environment(ray.get_gpu_ids())
    return subprocess.run(command, env=env, check=False).returncode  # noqa: S603  # our own program


def _environment(gpus: Sequence[object]) -> dict[str, str]:
    """Return the environment of this worker's training process."""
    found = dict(os.environ)
    if int(found.get("WORLD_SIZE", "1")) == 1:
        found = {name: value for name, value in found.items() if not name.startswith(_GROUP)}
    else:
        # The processes meet at the store that Ray Train has opened for the workers.
        found |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "trainer"}
    if gpus:
        # Ray Train shows each worker those of all workers on its node.
        found |= {VISIBLE: ",".join(map(str, gpus)), "LOCAL_RANK": "0"}
    return found
