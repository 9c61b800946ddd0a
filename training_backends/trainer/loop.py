"""The training loop: AdamW, cosine decay, clipped gradients, metrics and checkpoints."""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from training_backends.rundir.checkpoints import IntactCheckpoint
from training_backends.rundir.directory import Event, MetricsRow, RunDir, RunSpec
from training_backends.trainer.checkpoint import (
    load_tensors,
    save_tensors,
    write_checkpoint,
)
from training_backends.trainer.control import EarlyStopping, StopRequest
from training_backends.trainer.data import Order, PackedSchedule, Schedule, lengths_of
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.memory import MicroBatch, peak_memory
from training_backends.trainer.objective import (
    BatchLoss,
    Means,
    Objective,
    Totals,
    longest_first,
    weigh,
)
from training_backends.trainer.sharding import RootModule
from training_backends.trainer.world import ALONE, World

__all__ = [
    "Due",
    "Plan",
    "Reporter",
    "TrainingLoop",
    "Validation",
    "learning_rate",
    "make_optimizer",
    "precision_for",
]


class Validation:
    """The validation rows, and how to measure a model on them."""

    def __init__(
        self,
        root: RootModule,
        objective: Objective[Any],
        examples: Sequence[Any],
        *,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        world: World = ALONE,
    ) -> None:
        self._root = root
        self._objective = objective
        self._examples = examples
        self._micro = micro
        self._precision = precision
        self._world = world

    def measure(self) -> Means | None:
        """Return the mean loss and accuracy; None without validation rows.

        Draws no random numbers, so that validation does not change the run.
        """
        return self._micro.attempt(self._measure)

    def _measure(self, size: int) -> Means | None:
        totals = Totals(self._objective, self._world)
        device = self._root.model.device
        with evaluating(self._root.model), self._precision:
            lengths = lengths_of(self._examples)
            ordered = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            for places, counts in self._world.micro_batches(ordered, size):
                batch = self._objective.collate([self._examples[place] for place in places])
                on_device = {name: value.to(device) for name, value in batch.items()}
                found = self._root(self._objective.compute_loss, on_device)
                if counts:
                    totals.add(found)
        return totals.take()


_LOGGED_STEPS = 2000
"""Longer runs log every n-th step, for about this many rows of metrics."""
_FEWEST_BETWEEN = 10
"""Minimum steps between two checkpoints, as with hosted services."""


class Plan:
    """The length of a run, and when it logs and saves; the same in every process.

    Args:
        examples: The rows of all files.
        rows: How many of them each file has.
    """

    def __init__(self, spec: RunSpec, examples: Sequence[Any], rows: tuple[int, ...]) -> None:
        weights = tuple(source.weight for source in spec.train)
        self._batch_size = spec.batch_size
        self.examples: Sequence[Any] = examples
        self.order: Order = Order(rows, weights, spec.seed)
        self.schedule = self._lay_out(spec, rows)
        self.total_steps: int = len(self.schedule) // spec.batch_size
        tenth = -(-self.total_steps // 10)
        self.checkpoint_every: int = spec.checkpoint_every or max(_FEWEST_BETWEEN, tenth)
        self.log_every: int = max(1, self.total_steps // _LOGGED_STEPS)
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

    def step_examples(self, step: int) -> list[Any]:
        """Return the examples of a step, counted from 1."""
        last = step * self._batch_size
        return [self.schedule[position] for position in range(last - self._batch_size, last)]

    def is_checkpoint(self, step: int) -> bool:
        """Return whether a checkpoint is due at `step`; always at the last step."""
        return step % self.checkpoint_every == 0 or step == self.total_steps

    def checkpoint_before(self, step: int) -> int:
        """Return the last step before `step` at which a checkpoint was due, or 0."""
        return (step - 1) // self.checkpoint_every * self.checkpoint_every

    def is_logged(self, step: int) -> bool:
        """Return whether metrics are due at `step`."""
        return step % self.log_every == 0 or step == 1

    def epoch(self, step: int) -> float:
        """Return the epochs completed by the end of `step`."""
        return self.schedule.rows(step * self._batch_size) / self.order.epoch_size

    def tokens(self, step: int) -> int:
        """Return the tokens read by the end of `step`; call with increasing steps."""
        known, total = self._counted
        total += self.schedule.tokens(known * self._batch_size, step * self._batch_size)
        self._counted = (step, total)
        return total


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    save: bool
    stop: bool


class Reporter:
    """Decides what is due after each step, and writes metrics and events."""

    def __init__(
        self,
        run: RunDir,
        *,
        plan: Plan,
        objective: Objective[Any],
        validation: Validation,
        stop: StopRequest,
        device: torch.device,
        world: World = ALONE,
        early: EarlyStopping | None = None,
    ) -> None:
        self._run = run
        self._plan = plan
        self._early = early or EarlyStopping(None)
        self._validation = validation
        self._has_accuracy = objective.has_accuracy
        self._stop = stop
        self._world = world
        self._device = device
        self._losses = {row.step: row.train_loss for row, _ in run.read_metrics()}
        self._measured: dict[str, float] = {}
        self._since: tuple[float, int] | None = None  # seconds, tokens
        self.trained = Totals(objective, world)

    def start_step(self, step: int) -> None:
        """Restart the clock after a row of metrics was written."""
        if self._since is None:
            self._since = time.perf_counter(), self._plan.tokens(step - 1)

    def due(self, step: int) -> Due:
        """Return what is due after `step`; the same in every process."""
        # One number: 0 continue, 1 stop without a checkpoint, 2 stop with one.
        wish = 0
        if step < self._plan.total_steps and self._stop.requested:
            wish = 2 if self._stop.saves_checkpoint else 1
        wish = int(self._world.max(wish))
        saves = wish > 1 or self._plan.is_checkpoint(step)
        return Due(log=saves or self._plan.is_logged(step), save=saves, stop=wish > 0)

    def log(self, step: int, *, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Write the step's metrics, including validation metrics at checkpoints.

        Raises:
            TrainerError: The training diverged.
        """
        # The loss is from before the update, which infinite gradients have already ruined.
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise TrainerError(
                    f"The {name} is {value} at step {step}: the training diverged. "
                    "Reduce the learning rate.",
                    kind="internal",
                )
        speed = self._tokens_per_second(step)
        measured, more = self._measure() if self._plan.is_checkpoint(step) else ({}, {})
        more |= _staged("train", self.trained.take())
        self._losses[step] = loss
        self._run.add_metrics(
            MetricsRow(
                step=step,
                total_steps=self._plan.total_steps,
                epoch=self._plan.epoch(step),
                train_loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens=self._plan.tokens(step),
                tokens_per_second=speed,
                memory_bytes=peak_memory(self._device),
                more=more,
                **measured,
            )
        )
        self._measured = measured
        if "valid_loss" in measured:  # the same in every process
            self._early.add(step, measured["valid_loss"])

    def stops_early(self, step: int) -> bool:
        """Return whether the validation loss has not improved for too long, and report it."""
        if not self._early.is_due or step == self._plan.total_steps:
            return False
        best = self._early.state
        self._run.add_event(
            Event(
                name="message",
                message=f"Stopping early at step {step}: the validation loss has not improved in "
                f"{best['since']} validations since step {best['step']} ({best['loss']:.4f})",
                step=step,
            )
        )
        return True

    def _tokens_per_second(self, step: int) -> float | None:
        # Called after the loss was read, which synchronizes with the GPU.
        if self._since is None:
            return None
        start, before = self._since
        self._since = None
        return (self._plan.tokens(step) - before) / (time.perf_counter() - start)

    def _measure(self) -> tuple[dict[str, float], dict[str, float]]:
        found = self._validation.measure()
        if found is None:
            return {}, {}
        measured = {"valid_loss": found.loss}
        if self._has_accuracy:
            measured["valid_mean_token_accuracy"] = found.accuracy
        return _finite(measured), _staged("valid", found)

    def checkpoint_metrics(self, step: int) -> dict[str, float]:
        """Return the metrics stored with the checkpoint at `step`.

        `train_loss` is the loss of that step; `mean_train_loss` is the mean since the previous
        checkpoint.
        """
        first = self._plan.checkpoint_before(step)
        losses = [loss for at, loss in self._losses.items() if first < at <= step]
        found = {"train_loss": self._losses[step]} if step in self._losses else {}
        if losses:
            found["mean_train_loss"] = math.fsum(losses) / len(losses)
        return found | self._measured

    def checkpoint_saved(self, step: int, name: str, metrics: dict[str, float]) -> None:
        """Report a new checkpoint."""
        values = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        self._run.add_event(
            Event(
                name="checkpoint",
                message=f"Checkpoint saved at step {step}: {values}",
                step=step,
                data={"path": f"checkpoints/{name}", "metrics": metrics},
            )
        )


def _staged(stage: str, means: Means | None) -> dict[str, float]:
    named = means.named if means else {}
    return _finite({f"{stage}_{name}": value for name, value in named.items()})


def _finite(measures: dict[str, float]) -> dict[str, float]:
    """Drop NaN and infinite values, which JSON cannot represent."""
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def precision_for(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the autocast context for computing in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context


_BETAS: Final = (0.9, 0.999)
_MAX_GRAD_NORM: Final = 1.0


def make_optimizer(
    weights: Iterable[torch.nn.Parameter], *, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over the trained weights; biases and norms do not decay.

    Its state exists from the start, so that a checkpoint can be loaded into it.
    """
    weights = list(weights)
    decaying = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, fused=True)
    for weight in weights:
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, then cosine decay.

    As in transformers' `get_cosine_schedule_with_warmup`, whose first rate with a warm-up is 0.
    """
    done = step - 1
    if done < warmup:
        return peak * (done / max(1, warmup))
    progress = (done - warmup) / max(1, total - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


class TrainingLoop:
    """Trains over an already ordered schedule.

    A step's rows are split into micro-batches, so that a step that ran out of memory can be
    retried with smaller ones. Several processes share each step's rows, see `world`.

    Args:
        fill: Writes the additional checkpoint files into the given directory.
    """

    def __init__(
        self,
        root: RootModule,
        *,
        run: RunDir,
        spec: RunSpec,
        plan: Plan,
        objective: Objective[Any],
        reporter: Reporter,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        fill: Callable[[Path], None],
        world: World = ALONE,
    ) -> None:
        self._root = root
        self._weights = root.weights
        self._optimizer = make_optimizer(self._weights.values(), weight_decay=spec.weight_decay)
        self._run = run
        self._plan = plan
        self._objective = objective
        self._reporter = reporter
        self._spec = spec
        self._micro = micro
        self._precision = precision
        self._fill_more = fill
        self._world = world

    def train(self, start: IntactCheckpoint | None = None) -> tuple[int, bool]:
        """Train from a checkpoint or from the beginning; return the last step, and if stopped."""
        step = 0
        if start is not None:
            load_tensors(start.path, self._weights, self._optimizer)
            step = start.state.step
        total_loss, logged = torch.zeros((), device=self._root.model.device), step
        stopped = False
        while step < self._plan.total_steps and not stopped:
            step += 1
            self._reporter.start_step(step)
            total_loss += self._compute_gradients(step)
            norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), _MAX_GRAD_NORM)
            rate = self._learning_rate(step)
            self._update(rate)
            due = self._reporter.due(step)
            if due.log:
                loss = self._world.sum(total_loss.item()) / (step - logged)
                self._reporter.log(step, loss=loss, grad_norm=_number(norm), learning_rate=rate)
                total_loss.zero_()
                logged = step
            if due.save:
                self._save(step)
            stopped = due.stop
            if not stopped and self._reporter.stops_early(step):
                break
        return step, stopped

    def _learning_rate(self, step: int) -> float:
        total = self._plan.total_steps
        warmup = round(self._spec.warmup_fraction * total)
        return learning_rate(step, peak=self._spec.learning_rate, warmup=warmup, total=total)

    def _update(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _compute_gradients(self, step: int) -> torch.Tensor:
        """Compute a step's gradients; return this process's share of the loss."""
        self._root.model.train()
        # A pure function of the step, so that a resumed run draws the same dropout masks.
        seed = random.Random(f"{self._spec.seed}/{step}/{self._world.rank}").getrandbits(63)  # noqa: S311  # not cryptographic
        examples = longest_first(self._plan.step_examples(step))
        loss, results = self._micro.attempt(
            lambda size: self._attempt(examples, size, seed), self._optimizer.zero_grad
        )
        for result in results:
            self._reporter.trained.add(result)
        return loss

    def _attempt(
        self, examples: Sequence[Any], size: int, seed: int
    ) -> tuple[torch.Tensor, list[BatchLoss]]:
        torch.manual_seed(seed)
        device = self._root.model.device
        counts = self._objective.count(examples)
        total = torch.zeros((), device=device)
        results = []
        passes = self._world.micro_batches(examples, size)
        for number, (part, is_counted) in enumerate(passes, 1):
            batch = self._objective.collate(part)
            on_device = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            self._root.start_pass(is_last=number == len(passes))
            with self._precision:
                result = self._root(self._objective.compute_loss, on_device)
            loss = weigh(self._objective, result.losses, counts)
            torch.autograd.backward(loss if is_counted else loss * 0)
            if is_counted:
                total += loss.detach()
                results.append(result._replace(losses=result.losses.detach()))
        return total, results

    def _save(self, step: int) -> None:
        if not (self._world.is_leader or self._world.is_apart):
            self._fill(Path(self._world.broadcast("")))
            return
        metrics = self._reporter.checkpoint_metrics(step)
        target = write_checkpoint(
            self._run,
            step,
            self._fill,
            metrics=metrics,
            scheduled=self._plan.is_checkpoint(step),
            keep=self._spec.keep_checkpoints,
            keep_best=self._spec.result_checkpoint == "best",
        )
        self._reporter.checkpoint_saved(step, target.name, metrics)

    def _fill(self, directory: Path) -> None:
        if self._world.is_leader:
            if not self._world.is_apart:
                self._world.broadcast(str(directory))
            self._fill_more(directory)
        save_tensors(directory, self._weights, self._optimizer)


def _number(norm: torch.Tensor) -> float:
    """Return a norm's value; of sharded gradients, over the shards of all processes."""
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
