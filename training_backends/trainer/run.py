"""The part of a training process that needs torch: load, train, save."""

import json
import logging
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from training_backends.core.config import TINY_MODEL
from training_backends.rundir.checkpoints import damage_of, find_best, step_of
from training_backends.rundir.directory import Event, ResultRecord, RunDir, RunSpec
from training_backends.tokens.encoders import Encoder
from training_backends.trainer.checkpoint import load_tensors, newest_checkpoint, trained_weights
from training_backends.trainer.control import EarlyStopping, StopRequest, report_status
from training_backends.trainer.data import Examples
from training_backends.trainer.encode import data_directories
from training_backends.trainer.environment import thread_count
from training_backends.trainer.errors import Stopped, TrainerError
from training_backends.trainer.generate import answer, evaluating
from training_backends.trainer.loop import (
    Plan,
    Reporter,
    TrainingLoop,
    Validation,
    precision_for,
)
from training_backends.trainer.memory import MicroBatch, what_would_fit
from training_backends.trainer.model_card import DataFacts, write_card
from training_backends.trainer.models import (
    LoadedModel,
    choose_device,
    choose_dtype,
    count_experts,
    load_model,
    prepare_tuning,
    save_result,
)
from training_backends.trainer.objective import Objective
from training_backends.trainer.objectives.classifier import (
    ClassifierObjective,
    classify,
    format_labels,
)
from training_backends.trainer.objectives.preference import (
    PairExamples,
    PreferenceObjective,
    References,
)
from training_backends.trainer.objectives.tokens import TokenObjective
from training_backends.trainer.sharding import RootModule, choose_sharding, shard
from training_backends.trainer.world import ALONE, World

__all__ = [
    "TrainingProcess",
    "require_separate_rows",
    "set_up_torch",
    "use_kernels",
]

_APPLY: Final[Mapping[str, str]] = MappingProxyType(
    {kind: f"apply_liger_kernel_to_{kind}" for kind in ("llama", "mistral", "qwen2", "qwen3")}
)
"""Architectures whose logits and gradients were verified. Not Mixtral: with liger-kernel 0.8,
its experts can no longer take adapters.
"""
_SILU: Final = frozenset({"silu", "swish"})


def use_kernels(model: Any, device: torch.device, requested: str) -> tuple[str, ...]:
    """Patch a model with liger-kernel's kernels; return their names, () if none apply.

    The output layer and the loss stay those of `objectives.tokens`, which do not materialize all
    logits either.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = _APPLY.get(causal.config.model_type)
    if requested == "none" or device.type != "cuda" or not name or not find_spec("liger_kernel"):
        return ()
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # logs about kernels for other chips
    # Liger's SwiGLU supports only this activation, and does not check.
    plain = causal.config.hidden_act in _SILU and not getattr(causal.config, "mlp_bias", False)
    chosen = {"rope": True, "rms_norm": True, "swiglu": plain}
    apply = getattr(import_module("liger_kernel.transformers"), name)
    apply(model=causal, cross_entropy=False, fused_linear_cross_entropy=False, **chosen)
    return tuple(kernel for kernel, used in chosen.items() if used)


_FIRST: Final = ([1, 2, 3, 4], [5, 6, 7, 8])
_SECOND: Final = [3, 1, 2]
_ROUNDING: Final = 0.1
"""Tolerated dependence on the first row, relative to rows that do attend to each other: experts
compute in groups of tokens, so their rounding depends on the other row.
"""


def require_separate_rows(model: Any, name: str) -> None:
    """Check on the model itself that a packed row does not depend on the row before it.

    transformers isolates packed rows in the attention of most architectures. A model that carries
    state from token to token would silently train on mixed rows.

    Raises:
        TrainerError: Packed rows are not isolated.
    """
    first, second = range(len(_FIRST[0])), range(len(_SECOND))
    with evaluating(model):
        isolated = _difference(model, [*first, *second])
        joined = _difference(model, [*range(len(first) + len(second))])
    if isolated > _ROUNDING * joined:
        raise TrainerError(
            f"The architecture of {name!r} does not support packing: a packed row would depend on "
            "the one before it. Remove options.packing."
        )


def _difference(model: Any, positions: list[int]) -> float:
    """Return how much the second row's logits depend on the first row."""
    one, other = (
        model(
            input_ids=torch.tensor([first + _SECOND], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
        ).logits[:, -len(_SECOND) :]
        for first in _FIRST
    )
    return float((one - other).abs().max())


def _make_objective(spec: RunSpec, encoder: Encoder) -> Objective[Any]:
    """Create the objective for a spec's method."""
    if spec.method == "classifier":
        return ClassifierObjective(encoder, spec.classifier_targets)
    if spec.method == "dpo":
        return PreferenceObjective(
            encoder, beta=spec.dpo_beta, label_smoothing=spec.dpo_label_smoothing
        )
    return TokenObjective(encoder, flat=spec.attention == "flash_attention_2")


_ROLES: Final = ("training", "validation")
_STATE: Final = "engine.json"
"""In a checkpoint: the micro-batch size that fitted, and hashes of the data files."""


def set_up_torch(model: str, processes: int = 1) -> None:
    """Set the number of threads, and silence the libraries."""
    torch.set_num_threads(thread_count(small=model == TINY_MODEL, processes=processes))
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()


def _seed(seed: int) -> None:
    """Seed what models draw from, as `transformers.set_seed` does, whose module loads peft."""
    random.seed(seed)
    np.random.seed(seed)  # the generator that libraries share
    torch.manual_seed(seed)


class TrainingProcess:
    """Loads, trains and saves; `step` is the last completed step.

    Args:
        on_halved: Called in a process of several that ran out of memory, with the number of rows
            that may fit; raises an exception to start all of them again.
        fetch_shares: Brings what other processes have written to the checkpoint of a step, if
            they have directories of their own; returns what is wrong with it.
    """

    def __init__(
        self,
        run: RunDir,
        spec: RunSpec,
        stop: StopRequest,
        world: World = ALONE,
        *,
        max_rows: int | None = None,
        on_halved: Callable[[int], None] | None = None,
        fetch_shares: Callable[[int], str | None] = lambda _: None,
    ) -> None:
        self._run = run
        self._spec = spec
        self._stop = stop
        self._world = world
        self._max_rows = max_rows
        self._on_halved = on_halved or self._warn_of_halving
        self._fetch_shares = fetch_shares
        self._data: list[DataFacts] = []
        self.step = 0

    def run(self) -> ResultRecord | None:
        """Train to the end; return the result, or None if stopped or if another process leads.

        Raises:
            Stopped: Stopped before the first step.
            TrainerError: The spec, the data or the model cannot be used.
        """
        set_up_torch(self._spec.model, self._world.size)
        device = choose_device(self._spec.device)
        loaded = self._load_model(device)
        objective = _make_objective(self._spec, loaded.encoder)
        training, validating = self._load(objective)
        loaded, root = self._prepare(loaded, device)
        plan = Plan(self._spec, training, training.rows)
        if self._spec.packing:
            root(require_separate_rows, self._spec.model)
        return self._train(loaded, root, objective, plan, validating)

    def _load_model(self, device: torch.device) -> LoadedModel:
        spec = self._spec
        _seed(spec.seed)  # for the random weights of new heads
        return load_model(
            spec.model,
            seed=spec.seed,
            tuning=spec.tuning,
            device=device,
            dtype=choose_dtype(spec.dtype, device),
            attention=spec.attention,
            targets=spec.classifier_targets,
            chat_template=spec.chat_template_text,
            is_empty=self._transfers(device) and not self._world.is_leader,
        )

    def _transfers(self, device: torch.device) -> bool:
        """Return whether the leader alone loads weights, and the others receive theirs from it.

        Not 4-bit ones, which are not divided; nor complete ones on a CPU, where all processes map
        the same files into memory.
        """
        spec = self._spec
        if self._world.size == 1 or spec.tuning.kind == "qlora":
            return False
        is_divided = spec.tuning.kind == "full" or spec.sharding == "zero3"
        return is_divided or device.type == "cuda"

    def _prepare(self, loaded: LoadedModel, device: torch.device) -> tuple[LoadedModel, RootModule]:
        """Add adapters, move the model to its device, and divide it among the processes."""
        spec, dtype = self._spec, choose_dtype(self._spec.dtype, device)
        model = self._adapted(loaded)
        sharding = self._world.broadcast(
            choose_sharding(spec.sharding, model, self._world, device, dtype)
        )
        # A 4-bit model is already on its device; zero3 moves one block at a time.
        is_placed = spec.tuning.kind == "qlora" or sharding == "zero3"
        transfers = self._transfers(device)
        if not is_placed and (self._world.is_leader or not transfers):
            model = model.to(device)
        if left := count_experts(model) if spec.tuning.kind == "qlora" else 0:
            self._warn(f"{left:,} expert weights are not quantized to 4 bits")
        if self._computes_twice(device):
            model.activation_checkpointing_enable()
        model.config.use_cache = True  # stored in the result; training does not use the cache
        if used := use_kernels(model, device, spec.kernels):
            self._report(f"Using liger-kernel: {', '.join(used)}")
        if sharding != "none":
            self._report(f"Training in {self._world.size} processes with {sharding}")
        root = shard(model, sharding, self._world, device, dtype, transfers=transfers)
        return replace(loaded, model=model), root

    def _adapted(self, loaded: LoadedModel) -> Any:
        spec = self._spec
        _seed(spec.seed)  # for the random weights of new adapters
        classifies = spec.method == "classifier"
        return prepare_tuning(loaded.model, spec.tuning, spec.model, classifies=classifies)

    def _report(self, message: str) -> None:
        self._run.add_event(Event(name="message", message=message))

    def _computes_twice(self, device: torch.device) -> bool:
        requested = self._spec.gradient_checkpointing
        # Memory is scarce on a GPU.
        return device.type == "cuda" if requested is None else requested

    def _train(
        self,
        loaded: LoadedModel,
        root: RootModule,
        objective: Objective[Any],
        plan: Plan,
        validating: Examples,
    ) -> ResultRecord | None:
        spec, model, world = self._spec, loaded.model, self._world
        device: torch.device = model.device
        precision = self._precision(device)
        start = world.broadcast(newest_checkpoint(self._run) if world.is_leader else None)
        if start is not None:  # the leader's path
            start = start._replace(path=self._run.checkpoints / start.path.name)
        before = json.loads((start.path / _STATE).read_bytes()) if start else {}
        self._compare(before)
        micro = self._micro_batch(model, before)
        validation = Validation(
            root, objective, validating, micro=micro, precision=precision, world=world
        )
        reporter = Reporter(
            self._run,
            plan=plan,
            objective=objective,
            validation=validation,
            stop=self._stop,
            device=device,
            world=world,
            early=(early := EarlyStopping(spec.early_stopping_patience, before.get("early"))),
        )
        if start is None:
            self._sample(loaded, root, "before")
        if self._stop.requested:
            raise Stopped
        references = None
        if isinstance(objective, PreferenceObjective):
            pairs = {"train": plan.examples, "valid": validating}
            references = References(**cast("dict[str, PairExamples]", pairs))
            if start:
                references.load(start.path)
            else:
                self._ask_reference(references, objective, root, micro)
        self._report_start(plan, start.state.step if start else 0, root)
        loop = TrainingLoop(
            root,
            run=self._run,
            spec=spec,
            plan=plan,
            objective=objective,
            reporter=reporter,
            micro=micro,
            precision=precision,
            fill=partial(_fill, micro, references, self._hashes(), early),
            world=world,
        )
        self.step, stopped = loop.train(start)
        best = None
        if not stopped:
            best = world.broadcast(self._best() if world.is_leader else None)
            if best is not None and root.sharding == "none":
                self._load_weights(loaded.model, best)
            self._sample(loaded, root, "after")
        world.leave()
        if stopped or not world.is_leader:
            return None
        return self._save(self._complete(loaded, root, device, best), self._run.result, best)

    def _best(self) -> int | None:
        """Return the step of the lowest validation loss if that becomes the result."""
        best = find_best(self._run) if self._spec.result_checkpoint == "best" else None
        if best is None or best.state.step == self.step:
            return None
        if reason := damage_of(best.path):
            self._warn(f"The best checkpoint, {best.path.name}, is damaged: {reason}")
            return None
        loss = best.state.metrics["valid_loss"]
        self._report(
            f"The result is the checkpoint at step {best.state.step}: validation loss {loss:.4f}"
        )
        return best.state.step

    def _load_weights(self, model: Any, step: int) -> None:
        load_tensors(self._run.checkpoints / f"step-{step}", trained_weights(model), alone=True)

    def _complete(
        self, loaded: LoadedModel, root: RootModule, device: torch.device, best: int | None
    ) -> LoadedModel:
        """Return the trained model; if it is sharded, from a checkpoint, in one piece."""
        if root.sharding == "none":
            return loaded
        fresh = self._load_model(device)
        model = self._adapted(fresh)
        step = best or self.step
        if reason := self._fetch_shares(step):
            raise TrainerError(
                f"Checkpoint step-{step} is damaged: {reason}", kind="internal", retryable=True
            )
        self._load_weights(model, step)
        return replace(fresh, model=model)

    def _ask_reference(
        self,
        references: References,
        objective: PreferenceObjective,
        root: RootModule,
        micro: MicroBatch,
    ) -> None:
        references.compute(
            objective,
            root,
            micro,
            self._precision(root.model.device),
            world=self._world,
            should_stop=lambda: self._stop.requested,
        )

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        if self._world.size > 1:  # the sharded weights are gathered in this dtype
            return nullcontext()
        return precision_for(device, choose_dtype(self._spec.dtype, device))

    def _micro_batch(self, model: Any, before: Mapping[str, Any]) -> MicroBatch:
        spec, device = self._spec, model.device
        # The size that fitted before: results depend on it in the last digits.
        size = int(before.get("micro_batch_size", spec.micro_batch_size or spec.batch_size))
        share = -(-spec.batch_size // self._world.size)
        return MicroBatch(
            min(size, share, self._max_rows or size),
            on_halved=self._on_halved,
            explain=lambda: what_would_fit(
                spec, model, device, checkpointing=self._computes_twice(device)
            ),
        )

    def _warn_of_halving(self, size: int) -> None:
        self._warn(f"Out of memory: retrying with {size} rows at a time", micro_batch_size=size)

    def _hashes(self) -> list[str]:
        return [each.sha256 for each in self._data]

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Compare the data with that of the checkpoint, and across processes."""
        if any(other != self._data for other in self._world.all_gather(self._data)):
            raise TrainerError(
                "A data file changed while the processes were reading it, so they have different "
                "rows. Resume without changing the data.",
                kind="internal",
                retryable=True,
            )
        if before.get("data", self._hashes()) != self._hashes():
            self._warn("The data has changed since the checkpoint was saved")

    def _report_start(self, plan: Plan, step: int, root: RootModule) -> None:
        trained = sum(weight.numel() for weight in root.weights.values())
        head = f"Resuming at step {step}" if step else "Training"
        report_status(
            self._run,
            "running",
            f"{head}: {plan.total_steps} steps, {trained:,} trainable parameters",
            step=step,
            total_steps=plan.total_steps,
            trained_parameters=trained,
            rows=plan.order.epoch_size,
        )

    def _sample(self, loaded: LoadedModel, root: RootModule, stage: str) -> None:
        prompt = self._spec.sample_prompt
        if prompt is None:
            return
        if loaded.targets:
            text = format_labels(root(classify, loaded.encoder, loaded.targets, prompt))
        else:
            text = root(answer, loaded.encoder, prompt, self._spec.sample_max_tokens)
        data = {"stage": stage, "prompt": prompt, "answer": text}
        self._run.add_event(Event(name="sample", message=f"{stage}: {text}", data=data))

    def export(self, checkpoint: Path, target: Path) -> ResultRecord:
        """Write the model as it was at a checkpoint to `target`, atomically; on the CPU.

        Raises:
            TrainerError: The model cannot be loaded, or the checkpoint does not fit it.
        """
        set_up_torch(self._spec.model)
        device = torch.device("cpu")  # a GPU may be in use
        loaded, _ = self._prepare(self._load_model(device), device)
        load_tensors(checkpoint, trained_weights(loaded.model), alone=True)
        return self._save(loaded, target, step_of(checkpoint))

    def _save(self, loaded: LoadedModel, target: Path, step: int | None = None) -> ResultRecord:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        record = save_result(loaded, temporary, save_as=self._spec.result)
        record = record.model_copy(update={"step": step})
        write_card(temporary, run=self._run, spec=self._spec, record=record, data=self._data)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        adapter = record.adapter and f"{target.name}/{Path(record.adapter).name}"
        return record.model_copy(update={"path": target.name, "adapter": adapter})

    def _load(self, objective: Objective[Any]) -> tuple[Examples, Examples]:
        """Return the examples for training and for validation."""
        make = PairExamples if isinstance(objective, PreferenceObjective) else Examples
        found = []
        for role, paths in zip(_ROLES, data_directories(self._run, self._spec), strict=True):
            examples = make(paths, objective.make_example)
            self._data += [
                DataFacts(each.name, role, each.counts.examples, each.size, each.sha256)
                for each in examples.manifests
            ]
            found.append(examples)
        return found[0], found[1]

    def _warn(self, message: str, **data: int) -> None:
        self._run.add_event(Event(name="message", level="warning", message=message, data=data))


def _fill(
    micro: MicroBatch,
    references: References | None,
    data: list[str],
    early: EarlyStopping,
    directory: Path,
) -> None:
    """Write the checkpoint files other than the weights and the optimizer's state."""
    state = json.dumps({"micro_batch_size": micro.size, "data": data, "early": early.state})
    (directory / _STATE).write_text(state, encoding="ascii")
    if references:
        references.save(directory)
