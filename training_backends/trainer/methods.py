"""The training methods by name."""

from typing import Any

from training_backends.rundir.directory import RunSpec
from training_backends.tokens.encoders import Encoder
from training_backends.trainer.errors import EngineError
from training_backends.trainer.objective import Objective
from training_backends.trainer.objectives.classifier import ClassifierObjective
from training_backends.trainer.objectives.preference import PreferenceObjective
from training_backends.trainer.objectives.tokens import TokenObjective

__all__ = ["make_objective"]


def make_objective(spec: RunSpec, encoder: Encoder) -> Objective[Any]:
    """Make what a spec's method learns.

    Raises:
        EngineError: The spec lacks something, or the model's tokenizer does.
    """
    if spec.method == "classifier":
        if not spec.classifier_targets:
            raise EngineError("A classifier needs classifier_targets.")
        return ClassifierObjective(encoder, spec.seq_len, spec.classifier_targets)
    if spec.method == "dpo":
        return PreferenceObjective(
            encoder, spec.seq_len, beta=spec.dpo_beta, label_smoothing=spec.dpo_label_smoothing
        )
    return TokenObjective(
        encoder,
        spec.seq_len,
        fim_ratio=spec.fim_ratio or 0.0,
        seed=spec.seed,
        flat=spec.attention == "flash_attention_2",
    )
