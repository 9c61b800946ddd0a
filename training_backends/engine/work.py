"""The part of a training process that needs torch."""

import shutil
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from training_backends.core.config import TINY_MODEL
from training_backends.engine.checkpoints import newest_checkpoint
from training_backends.engine.data import LoadedFile, Sample, load_file
from training_backends.engine.encoding import Encoder
from training_backends.engine.errors import EngineError, Stopped
from training_backends.engine.models import (
    LoadedModel,
    choose_device,
    load_model,
    prepare_tuning,
    save_result,
)
from training_backends.engine.plan import Plan
from training_backends.engine.reporting import Reporter
from training_backends.engine.sampling import answer
from training_backends.engine.status import say_status
from training_backends.engine.stop import StopRequest
from training_backends.engine.threads import thread_count
from training_backends.engine.trainer import EngineTrainer, precision_for
from training_backends.engine.validation import Validation
from training_backends.rundir.directory import Event, ResultRecord, RunDir, RunSpec

__all__ = ["Work", "set_up_torch"]

_SHOWN_ROWS = 3


def set_up_torch(model: str) -> None:
    """Use the processors that this process may use, and keep libraries quiet."""
    torch.set_num_threads(thread_count(small=model == TINY_MODEL))
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()


class Work:
    """Load, train, save; `step` says how far it came."""

    def __init__(self, run: RunDir, spec: RunSpec, stop: StopRequest) -> None:
        self._run = run
        self._spec = spec
        self._stop = stop
        self.step = 0

    def run(self) -> ResultRecord | None:
        """Train to the end and return the result; None if it was stopped.

        Raises:
            Stopped: Before the first step.
            EngineError: The spec, the data or the model cannot be used.
        """
        spec = self._spec
        set_up_torch(spec.model)
        device = choose_device(spec.device)
        set_seed(spec.seed)
        loaded = load_model(spec.model, seed=spec.seed, tuning=spec.tuning, device=device)
        files = self._load_training(loaded.encoder)
        validating = self._load_validation(loaded.encoder)
        set_seed(spec.seed)  # before adapters are made: their weights are random
        model = prepare_tuning(loaded.model, spec.tuning, spec.model).to(device)
        loaded = LoadedModel(model, loaded.encoder)
        return self._train(loaded, Plan(spec, files), validating, device)

    def _train(
        self, loaded: LoadedModel, plan: Plan, validating: list[Sample], device: torch.device
    ) -> ResultRecord | None:
        spec, model, encoder = self._spec, loaded.model, loaded.encoder
        validation = Validation(
            model,
            validating,
            pad_id=encoder.pad_id,
            batch_size=spec.micro_batch_size or spec.batch_size,
            precision=precision_for(device),
        )
        reporter = Reporter(self._run, plan, validation, self._stop)
        start = newest_checkpoint(self._run)
        if start is None:
            self._sample(loaded, "before")
        if self._stop.requested:
            raise Stopped
        self._say_start(plan, start[1].step if start else 0, model)
        trainer = EngineTrainer(
            model,
            run=self._run,
            spec=spec,
            plan=plan,
            reporter=reporter,
            pad_id=encoder.pad_id,
            device=device,
        )
        trainer.train(resume_from_checkpoint=str(start[0]) if start else None)
        self.step = trainer.state.global_step
        if reporter.stopped:
            return None
        self._sample(loaded, "after")
        return self._save(loaded)

    def _say_start(self, plan: Plan, step: int, model: torch.nn.Module) -> None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = f"continues at step {step}" if step else "trains"
        say_status(
            self._run,
            "running",
            f"{head}: {plan.total_steps} steps, {trained:,} trained parameters",
            step=step,
            total_steps=plan.total_steps,
            trained_parameters=trained,
            rows=plan.order.epoch_size,
        )

    def _sample(self, loaded: LoadedModel, stage: str) -> None:
        prompt = self._spec.sample_prompt
        if prompt is None:
            return
        said = answer(loaded.model, loaded.encoder, prompt, self._spec.sample_max_tokens)
        data = {"stage": stage, "prompt": prompt, "answer": said}
        self._run.add_event(Event(name="sample", message=f"{stage}: {said}", data=data))

    def _save(self, loaded: LoadedModel) -> ResultRecord:
        temporary = self._run.path / ".result.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        record = save_result(loaded.model, loaded.encoder, self._spec.model, temporary)
        shutil.rmtree(self._run.result, ignore_errors=True)
        temporary.rename(self._run.result)
        return record.model_copy(update={"path": self._run.result.name})

    def _load_training(self, encoder: Encoder) -> list[list[Sample]]:
        files = [self._load(source.path, encoder) for source in self._spec.train]
        if not any(files):
            raise EngineError("The training files hold no row that can be trained on.")
        return files

    def _load_validation(self, encoder: Encoder) -> list[Sample]:
        return [
            sample
            for source in self._spec.validation
            for sample in self._load(source.path, encoder)
        ]

    def _load(self, path: Path, encoder: Encoder) -> list[Sample]:
        length = self._spec.seq_len
        loaded = load_file(path, encoder, length, should_stop=lambda: self._stop.requested)
        self._tell_of_rows(str(path), loaded)
        return loaded.samples

    def _tell_of_rows(self, name: str, loaded: LoadedFile) -> None:
        invalid, usable = len(loaded.invalid), len(loaded.samples) + loaded.untrained
        shown = "; ".join(f"line {line}: {why}" for line, why in loaded.invalid[:_SHOWN_ROWS])
        if invalid > self._spec.max_invalid_fraction * (invalid + usable):
            raise EngineError(f"{name}: {invalid} rows cannot be used: {shown}")
        if invalid:
            self._warn(f"{name}: {invalid} rows left out: {shown}", invalid=invalid)
        if loaded.untrained:
            count = loaded.untrained
            self._warn(f"{name}: {count} rows left out: nothing to learn in them", untrained=count)
        if loaded.truncated:
            length, count = self._spec.seq_len, loaded.truncated
            self._warn(f"{name}: {count} rows cut off at {length} tokens", truncated=count)

    def _warn(self, message: str, **data: int) -> None:
        self._run.add_event(Event(name="message", level="warning", message=message, data=data))
