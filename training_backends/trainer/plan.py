"""When things are due in a run: log lines, checkpoints, the end."""

from itertools import chain
from typing import Any

from training_backends.rundir.directory import RunSpec
from training_backends.trainer.data import Order, PackedSchedule, Schedule

__all__ = ["Plan"]

_LOGGED_STEPS = 2000
"""A longer run logs every n-th step, so that it writes about as many lines."""
_FEWEST_BETWEEN = 10
"""Steps between two checkpoints, as hosted services have it; none is told of sooner."""


class Plan:
    """A run's length and rhythm; the same for every process that works on it.

    Attributes:
        examples: The rows of all files.
    """

    def __init__(self, spec: RunSpec, files: list[list[Any]]) -> None:
        rows = tuple(len(examples) for examples in files)
        weights = tuple(source.weight for source in spec.train)
        self._batch_size = spec.batch_size
        self.examples = list(chain.from_iterable(files))
        self.order = Order(rows, weights, spec.seed)
        self.schedule = self._lay_out(spec, rows)
        self.total_steps = len(self.schedule) // spec.batch_size
        tenth = -(-self.total_steps // 10)
        self.checkpoint_every = spec.checkpoint_every or max(_FEWEST_BETWEEN, tenth)
        self.log_every = max(1, self.total_steps // _LOGGED_STEPS)
        self._counted = (0, 0)  # step, tokens up to its end

    def _lay_out(self, spec: RunSpec, rows: tuple[int, ...]) -> Schedule:
        if not spec.packing:
            steps = spec.total_steps(rows)
            return Schedule(self.examples, self.order, steps * spec.batch_size)
        return PackedSchedule(
            self.examples,
            self.order,
            seq_len=spec.seq_len,
            batch_size=spec.batch_size,
            steps=spec.training_steps,
            rows=spec.rows_seen(rows) if spec.training_steps is None else None,
        )

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
        return self.schedule.rows(step * self._batch_size) / self.order.epoch_size

    def tokens(self, step: int) -> int:
        """Return the tokens read by the end of `step`; ask in rising order."""
        known, total = self._counted
        total += self.schedule.tokens(known * self._batch_size, step * self._batch_size)
        self._counted = (step, total)
        return total
