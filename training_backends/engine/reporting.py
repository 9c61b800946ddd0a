"""What a training run tells step by step: metrics and checkpoints."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training_backends.engine.errors import EngineError
from training_backends.engine.plan import Plan
from training_backends.engine.stop import StopRequest
from training_backends.engine.validation import Validation
from training_backends.rundir.directory import Event, MetricsRow, RunDir

__all__ = ["Reporter"]


class Reporter(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Decides at each step what is due, and writes down what came of it."""

    def __init__(self, run: RunDir, plan: Plan, validation: Validation, stop: StopRequest) -> None:
        self._run = run
        self._plan = plan
        self._validation = validation
        self._stop = stop
        self._losses = {row.step: row.train_loss for row, _ in run.read_metrics()}
        self._measured: dict[str, float] = {}
        self.stopped = False

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
        self.stopped = not last and self._stop.requested
        control.should_save = self._plan.is_checkpoint(step) or (
            self.stopped and self._stop.saves_checkpoint
        )
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
        if not math.isfinite(loss):
            raise EngineError(
                f"The loss is {loss} at step {step}: the training diverged. "
                "Lower the learning rate.",
                kind="internal",
            )
        measured = self._validation.measure() if self._plan.is_checkpoint(step) else {}
        self._losses[step] = loss
        self._run.add_metrics(
            MetricsRow(
                step=step,
                total_steps=self._plan.total_steps,
                epoch=self._plan.epoch(step),
                train_loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
                tokens=self._plan.tokens(step),
                **measured,
            )
        )
        self._measured = measured

    def checkpoint_metrics(self, step: int) -> dict[str, float]:
        """Return what a checkpoint at `step` is known by: losses since the one before."""
        first = self._plan.checkpoint_before(step)
        losses = [loss for at, loss in self._losses.items() if first < at <= step]
        mean = {"train_loss": math.fsum(losses) / len(losses)} if losses else {}
        return mean | self._measured

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
