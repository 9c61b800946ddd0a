"""transformers' Trainer with our batches, loss and checkpoints."""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from training_backends.rundir.directory import RunDir, RunSpec
from training_backends.trainer.checkpoint import write_checkpoint
from training_backends.trainer.distributed import ALONE, Team, Update
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.models import save_model
from training_backends.trainer.objective import Judged, Objective, longest_first, weigh
from training_backends.trainer.plan import Plan
from training_backends.trainer.reporting import Reporter

__all__ = ["EngineTrainer", "arguments_for", "precision_for"]


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
