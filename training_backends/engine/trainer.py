"""transformers' Trainer with our batches, loss and checkpoints."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from training_backends.engine.checkpoints import write_checkpoint
from training_backends.engine.data import Batch, collate
from training_backends.engine.loss import predict
from training_backends.engine.models import save_model
from training_backends.engine.plan import Plan
from training_backends.engine.reporting import Reporter
from training_backends.rundir.directory import RunDir, RunSpec

__all__ = ["EngineTrainer", "precision_for"]


def precision_for(device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which a model computes: bf16 where the GPU has it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        context: AbstractContextManager[None] = torch.autocast("cuda", dtype=torch.bfloat16)
        return context
    return nullcontext()


class EngineTrainer(Trainer):  # type: ignore[misc]  # untyped library
    """Trains over a schedule that is already in order, as one long epoch."""

    def __init__(
        self,
        model: Any,
        *,
        run: RunDir,
        spec: RunSpec,
        plan: Plan,
        reporter: Reporter,
        pad_id: int,
        device: torch.device,
    ) -> None:
        super().__init__(
            model=model,
            args=_arguments(run, spec, plan, device),
            train_dataset=plan.schedule,
            data_collator=lambda samples: collate(samples, pad_id),
            callbacks=[reporter],
        )
        self.remove_callback(PrinterCallback)
        # Ours divides by the labelled tokens of the whole step, whatever the model's does.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._run = run
        self._plan = plan
        self._reporter = reporter
        self._spec = spec
        self._precision = precision_for(device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The schedule has the order; resuming skips the batches that were seen.
        return SequentialSampler(train_dataset or self._plan.schedule)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: FBT001, FBT002  # the Trainer's own signature
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over the tokens of the step that count."""
        with self._precision:
            found = predict(model, inputs)
        loss = found.loss / (found.tokens if num_items_in_batch is None else num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: nobody reads the count, and making it takes time at every step."""
        del inputs
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model, trial
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
        self._save_rng_state(str(directory))
        self.state.log_history = []  # metrics.jsonl has it
        self.state.save_to_json(os.fspath(directory / "trainer_state.json"))


def _arguments(run: RunDir, spec: RunSpec, plan: Plan, device: torch.device) -> TrainingArguments:
    micro = spec.micro_batch_size or spec.batch_size
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=plan.total_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=spec.batch_size // micro,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=round(spec.warmup_fraction * plan.total_steps),
        lr_scheduler_type="cosine",
        seed=spec.seed,
        use_cpu=device.type == "cpu",
        activation_checkpointing=device.type == "cuda",  # a GPU has more speed than memory
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cache=True,  # goes into the result; in training nothing is cached
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    # One GPU: more would be used as DataParallel, which is slower and not what was tested.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001  # no public way
    return arguments
