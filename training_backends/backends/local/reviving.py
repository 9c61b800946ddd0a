"""Keep a run's place in the queue over a restart of the machine."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from training_backends.backends.local.hub import Handed
from training_backends.backends.local.process import spawn
from training_backends.backends.local.state import is_orphaned
from training_backends.core.files import hold_lock
from training_backends.rundir.directory import RunDir, RunSpec

__all__ = ["revive"]


def revive(
    run: RunDir, spec: RunSpec, slots_dir: Path, program: Sequence[str], handed: Handed
) -> None:
    """Start the process of a run that waits in the queue without one.

    Of several who see that at once, one does it.
    """
    with suppress(BlockingIOError), hold_lock(run.path / ".reviving", patience=0):
        if not is_orphaned(run):
            return  # somebody else was quicker
        if spec.slots_dir != slots_dir:  # all state was moved
            run.write_spec(spec.model_copy(update={"slots_dir": slots_dir}))
        spawn(run, program, handed)
