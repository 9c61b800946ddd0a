"""transformers' Trainer with our batches, loss and checkpoints."""

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
from training_backends.trainer.distributed import ALONE, Team, Update
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.memory import MicroBatch, peak_memory
from training_backends.trainer.models import save_model
from training_backends.trainer.objective import (
    Judged,
    Means,
    Objective,
    Totals,
    longest_first,
    weigh,
)

__all__ = ["EngineTrainer", "Plan", "Reporter", "Validation", "arguments_for", "precision_for"]


class Validation:
    """A fixed set of rows to measure a model on."""

    def __init__(
        self,
        model: Any,
        objective: Objective[Any],
        examples: list[Any],
        *,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        team: Team = ALONE,
    ) -> None:
        self._model = model
        self._objective = objective
        self._examples = examples
        self._team = team
        self._micro = micro
        self._precision = precision

    def measure(self) -> Means | None:
        """Return loss and accuracy, each over all that counts; None without rows.

        Uses no random numbers, so that a run is the same with and without it.
        """
        totals = Totals(self._objective, self._team)
        examples = self._team.share(longest_first(self._examples))
        done = 0
        with evaluating(self._model), self._precision:
            while done < len(examples):

                def work(size: int, first: int = done) -> int:
                    chunk = examples[first : first + size]
                    batch = self._objective.collate(chunk)
                    there = {key: value.to(self._model.device) for key, value in batch.items()}
                    totals.add(self._objective.judge(self._model, there))
                    return first + len(chunk)

                done = self._micro.attempt(work)
        return totals.take()


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


class Reporter(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Decides at each step what is due, and writes down what came of it."""

    def __init__(
        self,
        run: RunDir,
        *,
        plan: Plan,
        objective: Objective[Any],
        validation: Validation,
        stop: StopRequest,
        device: torch.device,
        team: Team = ALONE,
    ) -> None:
        self._run = run
        self._plan = plan
        self._validation = validation
        self._has_accuracy = objective.has_accuracy
        self._stop = stop
        self._team = team
        self._device = device
        self._losses = {row.step: row.train_loss for row, _ in run.read_metrics()}
        self._measured: dict[str, float] = {}
        self._since: tuple[float, int] | None = None  # seconds, tokens
        self.trained = Totals(objective, team)
        self.stopped = False

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Start the clock, if it stands since the row of metrics before."""
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
        """Ask the trainer for a log line, a checkpoint, the end."""
        del args, others
        step = state.global_step
        last = step >= self._plan.total_steps
        asked = not last and self._stop.requested
        saves = asked and self._stop.saves_checkpoint
        self.stopped, saves = self._team.tell((asked, saves))
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
        """Write the step's metrics, with the validation's where a checkpoint is due."""
        del args, control, others
        if not logs or "loss" not in logs:
            return  # the summary at the end, which says nothing new
        step, loss = state.global_step, float(logs["loss"])
        grad_norm = float(logs["grad_norm"]) if "grad_norm" in logs else None
        # Such gradients have made weights of their kind, though the loss is of before.
        for name, value in (("loss", loss), ("norm of the gradients", grad_norm or 0.0)):
            if not math.isfinite(value):
                raise TrainerError(
                    f"The {name} is {value} at step {step}: the training diverged. "
                    "Lower the learning rate.",
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
        # Asked for behind the loss, which waits for the GPU.
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
        """Return what a checkpoint at `step` is known by.

        `train_loss` is the step's own, as in its row of metrics; `mean_train_loss` is the mean
        over the steps since the checkpoint before.
        """
        first = self._plan.checkpoint_before(step)
        losses = [loss for at, loss in self._losses.items() if first < at <= step]
        found = {"train_loss": self._losses[step]} if step in self._losses else {}
        if losses:
            found["mean_train_loss"] = math.fsum(losses) / len(losses)
        return found | self._measured

    def checkpoint_saved(self, step: int, name: str, metrics: dict[str, float]) -> None:
        """Tell of a new checkpoint."""
        said = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        self._run.add_event(
            Event(
                name="checkpoint",
                message=f"checkpoint at step {step}: {said}",
                step=step,
                data={"path": f"checkpoints/{name}", "metrics": metrics},
            )
        )


def _staged(stage: str, means: Means | None) -> dict[str, float]:
    named = means.named if means else {}
    return _finite({f"{stage}_{name}": value for name, value in named.items()})


def _finite(measures: dict[str, float]) -> dict[str, float]:
    """Leave out what JSON has no number for; a loss that is none ends the run elsewhere."""
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def precision_for(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the context in which a model computes in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context


class _Rows:
    """A step's examples; a type that the Trainer's loaders hand on as it is."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples


class EngineTrainer(Trainer):  # type: ignore[misc]  # untyped library
    """Trains over a schedule that is already in order, as one long epoch.

    A batch of the Trainer's is a whole optimizer step. It is cut into micro-batches here, so
    that a step which ran out of memory can begin again in smaller ones. The Trainer knows of no
    other process; those of a team share each step's rows, see `team`.

    Args:
        fill: Writes what else a checkpoint needs into the directory that it is given.
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
        team: Team = ALONE,
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
        self._team = team

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The schedule has the order; resuming skips the batches that were seen.
        return SequentialSampler(train_dataset or self._plan.schedule)

    def _get_num_items_in_batch(self, batch_samples: Any, device: torch.device) -> None:
        del batch_samples, device  # counted where the step is cut up

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; in a team it has this process's part of the weights."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._team.size > 1:
            Update(self._team, self._trained()).divide(optimizer)
        return optimizer

    def _trained(self) -> list[torch.Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def training_step(self, model: Any, inputs: _Rows, num_items_in_batch: Any = None) -> Any:
        """Return the loss of a step, its gradients computed."""
        del num_items_in_batch
        model.train()
        if self._team.size > 1:
            # Nobody saves what the others drew, so it follows from the step.
            place = f"{self._spec.seed}/{self.state.global_step}/{self._team.rank}"
            torch.manual_seed(random.Random(place).getrandbits(63))  # noqa: S311  # no secret
        chance = _random_state()

        def undo() -> None:
            model.zero_grad()
            _set_random_state(chance)

        loss, judged = self._micro.attempt(
            lambda size: self._attempt_step(model, inputs.examples, size), undo
        )
        for each in judged:
            self._reporter.trained.add(each)
        if self._team.size > 1:
            self._add_up(loss)
        return loss

    def _add_up(self, loss: torch.Tensor) -> None:
        weights = self._trained()
        unused = [n for n, weight in enumerate(weights) if weight.grad is None]
        users = torch.ones(len(weights), device=loss.device)
        for n in unused:  # by this process's rows
            users[n] = 0
            weights[n].grad = torch.zeros_like(weights[n])
        self._team.add_up([loss, users, *(w.grad for w in weights if w.grad is not None)])
        for n in unused:
            if not users[n]:  # an optimizer would let such weights decay
                weights[n].grad = None

    def _attempt_step(
        self, model: Any, examples: Sequence[Any], size: int
    ) -> tuple[torch.Tensor, list[Judged]]:
        counts = self._objective.count(examples)
        examples = self._team.share(longest_first(examples))
        total = torch.zeros((), device=self.args.device)
        found = []
        for first in range(0, len(examples), size):
            batch = self._objective.collate(examples[first : first + size])
            there = {
                name: value.to(self.args.device, non_blocking=True) for name, value in batch.items()
            }
            with self._precision:
                judged = self._objective.judge(model, there)
            loss = weigh(self._objective, judged.losses, counts)
            self.accelerator.backward(loss)
            total += loss.detach()
            found.append(judged._replace(losses=judged.losses.detach()))
        return total, found

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nobody reads the count, and making it takes time at every step."""
        del inputs
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model, trial
        if not self._team.leads:
            self._fill_share()
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
        self._team.tell(str(directory))
        if problems := [problem for problem in self._team.gather("") if problem]:
            raise OSError(problems[0])
        self._save_rng_state(str(directory))
        self.state.log_history = []  # metrics.jsonl has it
        self.state.save_to_json(os.fspath(directory / "trainer_state.json"))
        self._fill_more(directory)

    def _fill_share(self) -> None:
        """Put what the optimizer holds here into the checkpoint that the leader writes."""
        directory = Path(self._team.tell(""))
        problem = ""
        try:
            torch.save(self.optimizer.state_dict(), directory / self._share_file)
        except (OSError, RuntimeError) as error:
            problem = str(error)
        self._team.gather(problem)

    @property
    def _share_file(self) -> str:
        return f"optimizer-{self._team.rank}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._team.leads:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        ours = torch.load(
            Path(checkpoint) / self._share_file, map_location=self.args.device, weights_only=True
        )
        self.optimizer.load_state_dict(ours)
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
    """Say in the Trainer's words what a spec asks for."""
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
        use_cache=True,  # goes into the result; in training nothing is cached
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are made behind the loader
    )
    # One GPU: more would be used as DataParallel, which is slower and not what was tested.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001  # no public way
    return arguments
