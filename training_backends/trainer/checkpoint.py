"""Write checkpoints atomically, and find the newest intact one.

The trained weights and their optimizer state are stored by torch's distributed checkpoint (DCP):
one format, whatever the number of processes that write and read it. The optimizer's state has a
directory of its own, which is removed once the run has completed.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from training_backends.core.errors import first_line
from training_backends.core.files import sync_directory, write_atomic
from training_backends.rundir.checkpoints import (
    OPTIMIZER,
    STATE,
    IntactCheckpoint,
    describe_files,
    find_best,
    find_newest,
    step_of,
)
from training_backends.rundir.directory import CheckpointState, RunDir
from training_backends.trainer.errors import TrainerError, failure_of
from training_backends.trainer.world import has_lost_contact

__all__ = [
    "load_tensors",
    "newest_checkpoint",
    "save_tensors",
    "trained_weights",
    "write_checkpoint",
]


def write_checkpoint(
    run: RunDir,
    step: int,
    fill: Callable[[Path], None],
    *,
    metrics: dict[str, float],
    scheduled: bool,
    keep: int,
    keep_best: bool = False,
) -> Path:
    """Write `checkpoints/step-N`, and remove the oldest beyond `keep`.

    Args:
        keep_best: Keep the one with the lowest validation loss as well.
        fill: Writes the files into the (temporary) directory it is given.
        scheduled: Whether a checkpoint was due, see `CheckpointState`.

    Raises:
        TrainerError: The checkpoint cannot be written, for example because the disk is full;
            earlier ones are kept.
    """
    run.checkpoints.mkdir(exist_ok=True)
    _clean(run)
    target = run.checkpoints / f"step-{step}"
    temporary = run.checkpoints / f".step-{step}.tmp"
    with _reported(step, temporary):
        temporary.mkdir()
        fill(temporary)
        _sync(temporary)
        sizes, checksums = describe_files(temporary)
        state = CheckpointState(
            step=step, metrics=metrics, files=sizes, checksums=checksums, scheduled=scheduled
        )
        write_atomic(temporary / STATE, state.model_dump_json(indent=2))
        _remove(target)
        temporary.rename(target)
        sync_directory(run.checkpoints)
    best = find_best(run) if keep_best else None
    for path, _ in run.read_checkpoints()[:-keep]:
        if best is None or path != best.path:
            _remove(path)
    _clean(run)
    return target


@contextmanager
def _reported(step: int, temporary: Path) -> Iterator[None]:
    """Report why a checkpoint could not be written, and remove the partial one."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(temporary.parent).free
        # The partial checkpoint takes up the space that is missing.
        shutil.rmtree(temporary, ignore_errors=True)
        failure = failure_of(error)
        is_known = isinstance(error, TrainerError) or failure.kind == "out_of_memory"
        if is_known or has_lost_contact(error):
            raise
        raise TrainerError(
            f"Cannot write the checkpoint at step {step}: {failure.message.rstrip('.')}. "
            f"{free / 1e6:,.0f} MB of disk space are available, and earlier checkpoints are kept: "
            "free some space, then resume.",
            kind="internal",
            retryable=True,
        ) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a crash leaves no partial one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _clean(run: RunDir) -> None:
    """Remove leftovers of a crash; damaged checkpoints only once a newer intact one exists."""
    newest = max((step_of(path) for path in run.checkpoints.glob("step-*")), default=-1)
    for path in run.checkpoints.glob(".step-*"):
        name, _, kind = path.name.removeprefix(".").rpartition(".")
        if kind != "damaged" or step_of(Path(name)) <= newest:
            shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def newest_checkpoint(run: RunDir) -> IntactCheckpoint | None:
    """Return the newest intact checkpoint, or None; report damaged ones and rename them."""
    intact, damaged = find_newest(run)
    for each in damaged:
        renamed = each.path.with_name(f".{each.path.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        each.path.rename(renamed)
        run.add_event(each.event(intact))
    return intact


Weights = dict[str, torch.nn.Parameter]


def trained_weights(model: Any) -> Weights:
    """Return the weights that are trained, by name; shared ones once."""
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def save_tensors(directory: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
    """Write the trained weights and their optimizer state; called by all processes at once."""
    parts = {directory: _weights(weights), directory / OPTIMIZER: _optimizer(weights, optimizer)}
    for path, tensors in parts.items():
        with _own_errors():
            save(
                tensors,
                storage_writer=FileSystemWriter(path, sync_files=False),
                no_dist=not distributed.is_initialized(),
            )


def load_tensors(
    directory: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    alone: bool = False,
) -> None:
    """Load the trained weights, and their optimizer state, in place.

    Args:
        alone: Only this process loads, not all processes at once.

    Raises:
        TrainerError: The checkpoint has another format, or belongs to other weights.
    """
    if not (directory / ".metadata").is_file():
        raise TrainerError(
            f"{directory.name} was saved by an earlier version, whose checkpoints cannot be "
            "resumed from. Remove it, or start a new run."
        )
    parts = {directory: _weights(weights)}
    if optimizer is not None:
        # Earlier versions saved everything in one place.
        is_apart = (directory / OPTIMIZER).is_dir()
        place = directory / OPTIMIZER if is_apart else directory
        parts[place] = parts.get(place, {}) | _optimizer(weights, optimizer)
    try:
        for path, tensors in parts.items():
            with _own_errors():
                load(
                    tensors,
                    storage_reader=FileSystemReader(path),
                    no_dist=alone or not distributed.is_initialized(),
                )
    except (RuntimeError, ValueError) as error:
        raise TrainerError(
            f"{directory.name} does not fit the model: {first_line(error)}"
        ) from error


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what failed instead of DCP's report of it, which is no `Exception`."""
    try:
        with warnings.catch_warnings():
            # Without a process group DCP warns that it assumes a single process.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as report:
        (error, _), *_ = report.failures.values()
        raise error from None


def _weights(weights: Weights) -> dict[str, Any]:
    return {"model": {name: weight.detach() for name, weight in weights.items()}}


def _optimizer(weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": {name: optimizer.state[weight] for name, weight in weights.items()}}
