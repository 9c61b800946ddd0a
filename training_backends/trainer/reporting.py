"""What a training run tells step by step: metrics and checkpoints."""

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training_backends.rundir.directory import Event, MetricsRow, RunDir
from training_backends.trainer.control import StopRequest
from training_backends.trainer.distributed import ALONE, Team
from training_backends.trainer.errors import EngineError
from training_backends.trainer.memory import peak_memory
from training_backends.trainer.objective import Means, Objective, Totals
from training_backends.trainer.plan import Plan
from training_backends.trainer.validation import Validation

__all__ = ["Reporter"]


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
                raise EngineError(
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
