"""When things are due in a run: log lines, checkpoints, the end."""

from training_backends.engine.data import Order, Sample, Schedule
from training_backends.rundir.directory import RunSpec

__all__ = ["Plan"]

_LOGGED_STEPS = 2000
"""A longer run logs every n-th step, so that it writes about as many lines."""


class Plan:
    """A run's length and rhythm; the same for every process that works on it."""

    def __init__(self, spec: RunSpec, files: list[list[Sample]]) -> None:
        rows = tuple(len(samples) for samples in files)
        weights = tuple(source.weight for source in spec.train)
        self._batch_size = spec.batch_size
        self.order = Order(rows, weights, spec.seed)
        self.total_steps = spec.total_steps(rows)
        self.checkpoint_every = spec.checkpoint_every or max(1, -(-self.total_steps // 10))
        self.log_every = max(1, self.total_steps // _LOGGED_STEPS)
        self._counted = (0, 0)  # step, tokens up to its end
        flat = [sample for samples in files for sample in samples]
        self.schedule = Schedule(flat, self.order, self.total_steps * spec.batch_size)

    def is_checkpoint(self, step: int) -> bool:
        """Tell whether a checkpoint is due; always at the last step."""
        return step % self.checkpoint_every == 0 or step == self.total_steps

    def checkpoint_before(self, step: int) -> int:
        """Return the last step before `step` at which a checkpoint was due, or 0."""
        return (step - 1) // self.checkpoint_every * self.checkpoint_every

    def is_logged(self, step: int) -> bool:
        """Tell whether a line of metrics is due."""
        return step % self.log_every == 0 or step == 1

    def epoch(self, step: int) -> float:
        """Return how often the data was seen by the end of `step`."""
        return step * self._batch_size / self.order.epoch_size

    def tokens(self, step: int) -> int:
        """Return the tokens read by the end of `step`; ask in rising order."""
        known, total = self._counted
        total += self.schedule.tokens(known * self._batch_size, step * self._batch_size)
        self._counted = (step, total)
        return total
