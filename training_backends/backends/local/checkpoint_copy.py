"""Find the checkpoint that a run is continued from, and put it into the new run's directory."""

from pathlib import Path

from training_backends.backends.local.disk import copy_whole, reporting_disk
from training_backends.backends.local.state import read_ending
from training_backends.core.errors import ConfigError, DuplicateRun, Issue
from training_backends.core.files import make_private_directory
from training_backends.core.run import TrainingRun
from training_backends.rundir.checkpoints import damage_of, find_newest, step_of
from training_backends.rundir.directory import RunDir

__all__ = ["copy_checkpoint"]


def copy_checkpoint(run: TrainingRun, source: RunDir, target: RunDir, wanted: str | None) -> int:
    """Copy a checkpoint of a run that is over; return its step, 0 if there is none.

    Args:
        wanted: A step, such as `120` or `step-120`; None for the newest that is whole.

    Raises:
        DuplicateRun: The run still trains.
        ConfigError: There is no such checkpoint, or it is damaged.
    """
    if not read_ending(source):
        raise DuplicateRun(
            f"The run {run.id} still trains.",
            other=run.id,
            hint="Stop it first.",
            backend=run.backend,
            run_id=run.id,
        )
    path = _newest(run, source, target) if wanted is None else _named(run, source, wanted)
    if path is None:
        return 0
    with reporting_disk(run):
        target.checkpoints.mkdir(parents=True, exist_ok=True)
        copy_whole(path, target.checkpoints / path.name)
    return step_of(path)


def _newest(run: TrainingRun, source: RunDir, target: RunDir) -> Path | None:
    whole, damaged = find_newest(source)
    with reporting_disk(run):
        make_private_directory(target.path)
        for each in damaged:
            target.add_event(each.event(whole))
    return whole.path if whole else None


def _named(run: TrainingRun, source: RunDir, wanted: str) -> Path:
    found = {step_of(path): path for path in source.checkpoints.glob("step-*")}
    step = wanted.removeprefix("step-")
    if not step.isdecimal() or int(step) not in found:
        message = f"run {run.id} has no checkpoint {wanted!r} on disk"
        fix = f"there are: {', '.join(map(str, sorted(found))) or 'none'}"
    elif reason := damage_of(found[int(step)]):
        message, fix = f"the checkpoint {wanted!r} is damaged: {reason}", "take another"
    else:
        return found[int(step)]
    issue = Issue(code="unknown_checkpoint", message=message, field="checkpoint", fix=fix)
    raise ConfigError(
        f"There is no checkpoint {wanted!r} to continue from.",
        issues=[issue],
        backend=run.backend,
        run_id=run.id,
    )
