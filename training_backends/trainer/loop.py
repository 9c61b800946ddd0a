"""transformers' Trainer with this package's batches, loss and checkpoints."""

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from training_backends.rundir.directory import Event, MetricsRow, RunDir, RunSpec
from training_backends.trainer.checkpoint import write_checkpoint
from training_backends.trainer.control import StopRequest
from training_backends.trainer.data import Order, PackedSchedule, Schedule
from training_backends.trainer.distributed import SINGLE_PROCESS, ProcessGroup, ShardedUpdate
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.memory import MicroBatch, peak_memory
from training_backends.trainer.models import save_model
from training_backends.trainer.objective import (
    BatchLoss,
    Means,
    Objective,
    Totals,
    longest_first,
    weigh,
)

__all__ = ["Plan", "Reporter", "ScheduleTrainer", "Validation", "arguments_for", "precision_for"]


class Validation:
    """The validation rows, and how to measure a model on them."""

    def __init__(
        self,
        model: Any,
        objective: Objective[Any],
        examples: list[Any],
        *,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._model = model
        self._objective = objective
        self._examples = examples
        self._group = group
        self._micro = micro
        self._precision = precision

    def measure(self) -> Means | None:
        """Return the mean loss and accuracy; None without validation rows.

        Draws no random numbers, so that validation does not change the run.
        """
        totals = Totals(self._objective, self._group)
        examples = self._group.shard(longest_first(self._examples))
        done = 0
        with evaluating(self._model), self._precision:
            while done < len(examples):

                def work(size: int, first: int = done) -> int:
                    chunk = examples[first : first + size]
                    batch = self._objective.collate(chunk)
                    on_device = {key: value.to(self._model.device) for key, value in batch.items()}
                    totals.add(self._objective.compute_loss(self._model, on_device))
                    return first + len(chunk)

                done = self._micro.attempt(work)
        return totals.take()


_LOGGED_STEPS = 2000
"""Longer runs log every n-th step, for about this many rows of metrics."""
_FEWEST_BETWEEN = 10
"""Minimum steps between two checkpoints, as with hosted services."""


class Plan:
    """The length of a run, and when it logs and saves; the same in every process.

    Attributes:
        examples: The rows of all files.
    """

    def __init__(self, spec: RunSpec, files: list[list[Any]]) -> None:
        rows = tuple(len(examples) for examples in files)
        weights = tuple(source.weight for source in spec.train)
        self._batch_size = spec.batch_size
        self.examples: list[Any] = list(chain.from_iterable(files))
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


class Reporter(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Tells the Trainer what is due after each step, and writes metrics and events."""

    def __init__(
        self,
        run: RunDir,
        *,
        plan: Plan,
        objective: Objective[Any],
        validation: Validation,
        stop: StopRequest,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._run = run
        self._plan = plan
        self._validation = validation
        self._has_accuracy = objective.has_accuracy
        self._stop = stop
        self._group = group
        self._device = device
        self._losses = {row.step: row.train_loss for row, _ in run.read_metrics()}
        self._measured: dict[str, float] = {}
        self._since: tuple[float, int] | None = None  # seconds, tokens
        self.trained = Totals(objective, group)
        self.stopped = False

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Restart the clock after a row of metrics was written."""
        del args, control, others
        if self._since is None:
            self._since = time.perf_counter(), self._plan.tokens(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Tell the Trainer whether to log, save or stop."""
        del args, others
        step = state.global_step
        last = step >= self._plan.total_steps
        stop_requested = not last and self._stop.requested
        saves = stop_requested and self._stop.saves_checkpoint
        self.stopped, saves = self._group.broadcast((stop_requested, saves))
        control.should_save = self._plan.is_checkpoint(step) or saves
        control.should_log = self._plan.is_logged(step) or control.should_save
        control.should_training_stop = last or self.stopped

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        """Write the step's metrics, including validation metrics at checkpoints."""
        del args, control, others
        if not logs or "loss" not in logs:
            return  # the Trainer's final summary
        step, loss = state.global_step, float(logs["loss"])
        grad_norm = float(logs["grad_norm"]) if "grad_norm" in logs else None
        # The loss is from before the update, which infinite gradients have already ruined.
        for name, value in (("loss", loss), ("gradient norm", grad_norm or 0.0)):
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
                learning_rate=float(logs["learning_rate"]),
                grad_norm=grad_norm,
                tokens=self._plan.tokens(step),
                tokens_per_second=speed,
                memory_bytes=peak_memory(self._device),
                more=more,
                **measured,
            )
        )
        self._measured = measured

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


class _Rows:
    """A step's examples, in a type that the Trainer's data loader passes through unchanged."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples


class ScheduleTrainer(Trainer):  # type: ignore[misc]  # untyped library
    """Trains over an already ordered schedule, as a single long epoch.

    One batch of the Trainer is one optimizer step. It is split into micro-batches here, so that a
    step that ran out of memory can be retried with smaller ones. The Trainer itself is not aware
    of other processes; in a distributed run they share each step's rows, see `distributed`.

    Args:
        fill: Writes the additional checkpoint files into the given directory.
    """

    def __init__(
        self,
        model: Any,
        *,
        run: RunDir,
        spec: RunSpec,
        plan: Plan,
        objective: Objective[Any],
        reporter: Reporter,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        arguments: TrainingArguments,
        fill: Callable[[Path], None],
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=plan.schedule,
            data_collator=_Rows,
            callbacks=[reporter],
        )
        self.remove_callback(PrinterCallback)
        self._run = run
        self._plan = plan
        self._objective = objective
        self._reporter = reporter
        self._spec = spec
        self._micro = micro
        self._precision = precision
        self._fill_more = fill
        self._group = group

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The schedule is already ordered; resuming skips the batches already trained on.
        return SequentialSampler(train_dataset or self._plan.schedule)

    def _get_num_items_in_batch(self, batch_samples: Any, device: torch.device) -> None:
        del batch_samples, device  # counted in `_attempt_step`

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; in a distributed run, for this process's shard of the weights."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._group.size > 1:
            ShardedUpdate(self._group, self._trained()).shard(optimizer)
        return optimizer

    def _trained(self) -> list[torch.Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def training_step(self, model: Any, inputs: _Rows, num_items_in_batch: Any = None) -> Any:
        """Compute a step's loss and gradients; return the loss."""
        del num_items_in_batch
        model.train()
        if self._group.size > 1:
            # Checkpoints store only the leader's random state: derive it from the step instead.
            place = f"{self._spec.seed}/{self.state.global_step}/{self._group.rank}"
            torch.manual_seed(random.Random(place).getrandbits(63))  # noqa: S311  # not cryptographic
        rng_state = _random_state()

        def undo() -> None:
            model.zero_grad()
            _set_random_state(rng_state)

        loss, result = self._micro.attempt(
            lambda size: self._attempt_step(model, inputs.examples, size), undo
        )
        for each in result:
            self._reporter.trained.add(each)
        if self._group.size > 1:
            self._sum_gradients(loss)
        return loss

    def _sum_gradients(self, loss: torch.Tensor) -> None:
        weights = self._trained()
        unused = [n for n, weight in enumerate(weights) if weight.grad is None]
        users = torch.ones(len(weights), device=loss.device)
        for n in unused:  # in this process
            users[n] = 0
            weights[n].grad = torch.zeros_like(weights[n])
        self._group.all_reduce([loss, users, *(w.grad for w in weights if w.grad is not None)])
        for n in unused:
            if not users[n]:  # otherwise weight decay would still apply
                weights[n].grad = None

    def _attempt_step(
        self, model: Any, examples: Sequence[Any], size: int
    ) -> tuple[torch.Tensor, list[BatchLoss]]:
        counts = self._objective.count(examples)
        examples = self._group.shard(longest_first(examples))
        total = torch.zeros((), device=self.args.device)
        found = []
        for first in range(0, len(examples), size):
            batch = self._objective.collate(examples[first : first + size])
            on_device = {
                name: value.to(self.args.device, non_blocking=True) for name, value in batch.items()
            }
            with self._precision:
                result = self._objective.compute_loss(model, on_device)
            loss = weigh(self._objective, result.losses, counts)
            self.accelerator.backward(loss)
            total += loss.detach()
            found.append(result._replace(losses=result.losses.detach()))
        return total, found

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the count is unused and expensive to compute at every step."""
        del inputs
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model, trial
        if not self._group.is_leader:
            self._fill_shard()
            return
        step = self.state.global_step
        metrics = self._reporter.checkpoint_metrics(step)
        target = write_checkpoint(
            self._run,
            step,
            self._fill,
            metrics=metrics,
            scheduled=self._plan.is_checkpoint(step),
            keep=self._spec.keep_checkpoints,
        )
        self._reporter.checkpoint_saved(step, target.name, metrics)

    def _fill(self, directory: Path) -> None:
        save_model(self.model, self._spec.model, directory)
        self._save_optimizer_and_scheduler(str(directory))
        self._group.broadcast(str(directory))
        if problems := [problem for problem in self._group.all_gather("") if problem]:
            raise OSError(problems[0])
        self._save_rng_state(str(directory))
        self.state.log_history = []  # stored in metrics.jsonl
        self.state.save_to_json(os.fspath(directory / "trainer_state.json"))
        self._fill_more(directory)

    def _fill_shard(self) -> None:
        """Add this process's optimizer state to the checkpoint that the leader writes."""
        directory = Path(self._group.broadcast(""))
        problem = ""
        try:
            torch.save(self.optimizer.state_dict(), directory / self._shard_file)
        except (OSError, RuntimeError) as error:
            problem = str(error)
        self._group.all_gather(problem)

    @property
    def _shard_file(self) -> str:
        return f"optimizer-{self._group.rank}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._group.is_leader:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        shard_state = torch.load(
            Path(checkpoint) / self._shard_file, map_location=self.args.device, weights_only=True
        )
        self.optimizer.load_state_dict(shard_state)
        scheduler = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, *torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def arguments_for(
    run: RunDir, spec: RunSpec, plan: Plan, device: torch.device, *, checkpointing: bool
) -> TrainingArguments:
    """Translate a spec into TrainingArguments."""
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=plan.total_steps,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=round(spec.warmup_fraction * plan.total_steps),
        lr_scheduler_type="cosine",
        seed=spec.seed,
        use_cpu=device.type == "cpu",
        activation_checkpointing=checkpointing,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cache=True,  # stored in the result's config; not used in training
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are built after the loader
    )
    # With more GPUs the Trainer would use DataParallel, which is slower and untested here.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001  # no public way
    return arguments
