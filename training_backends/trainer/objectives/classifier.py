"""Classifiers with one or more targets, on the hidden state of the last token.

The model is a standard `…ForSequenceClassification` of transformers, so any server of those can
serve the result. Its outputs are the labels of all targets, in the order of `classifier.json`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification

from training_backends.core.config import ClassifierTarget
from training_backends.datasets.rows import TextRow
from training_backends.tokens.encoders import Encoder
from training_backends.trainer.data import EncodedRow
from training_backends.trainer.generate import evaluating
from training_backends.trainer.model_files import CLASSIFIER_FILE
from training_backends.trainer.objective import Batch, BatchLoss

__all__ = [
    "ClassifierObjective",
    "Labelled",
    "add_heads",
    "classify",
    "describe_classifier",
    "format_labels",
    "label_names",
]


class Labelled(NamedTuple):
    """An encoded row.

    Attributes:
        marks: 1 for each output that is correct, else 0.
        known: For each target, whether the row labels it.
    """

    ids: torch.Tensor
    marks: torch.Tensor
    known: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens in it."""
        return len(self.ids)


class ClassifierObjective:
    """Train a classifier.

    The loss of a `single_class` target is the cross entropy; that of a `multi_class` target is the
    binary cross entropy, averaged over its labels. A row is correct if its label, or its whole set
    of labels, is predicted.
    """

    has_accuracy = True

    def __init__(self, encoder: Encoder, targets: Sequence[ClassifierTarget]) -> None:
        self._encoder = encoder
        self._targets = tuple(targets)
        self._sizes = [len(target.labels) for target in targets]
        self.parts: tuple[str, ...] = tuple(target.name for target in targets)
        self.weights: tuple[float, ...] = tuple(target.weight for target in targets)

    def make_example(self, sequences: tuple[EncodedRow], labels: torch.Tensor) -> Labelled:
        """Return the text or conversation with its labels."""
        outputs = sum(self._sizes)
        return Labelled(sequences[0].ids, labels[:outputs].float(), labels[outputs:].bool())

    def collate(self, examples: Sequence[Labelled]) -> Batch:
        """Pad rows on the right to the longest."""
        width = max(example.length for example in examples)
        ids = torch.full((len(examples), width), self._encoder.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(examples), width), dtype=torch.int64)
        for index, example in enumerate(examples):
            ids[index, : example.length] = example.ids
            mask[index, : example.length] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "marks": torch.stack([example.marks for example in examples]),
            "known": torch.stack([example.known for example in examples]),
        }

    def count(self, examples: Sequence[Labelled]) -> list[int]:
        """Return how many rows label each target."""
        return [int(n) for n in torch.stack([e.known for e in examples]).sum(0)]

    def compute_loss(self, model: Any, batch: Batch) -> BatchLoss:
        """Return the loss and the correct predictions of each target."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        losses, correct = [], []
        for target, scores, marks, known in zip(
            self._targets,
            torch.split(logits, self._sizes, dim=1),
            torch.split(batch["marks"], self._sizes, dim=1),
            batch["known"].T,
            strict=True,
        ):
            loss, right = _target_loss(target, scores[known], marks[known])
            losses.append(loss)
            correct.append(right)
        return BatchLoss(torch.stack(losses), torch.stack(correct), batch["known"].sum(0), {})


def _is_multi(target: ClassifierTarget) -> bool:
    return target.loss_function == "multi_class"


def _target_loss(
    target: ClassifierTarget, logits: torch.Tensor, marks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_multi(target):
        losses = binary_cross_entropy_with_logits(logits, marks, reduction="none").mean(dim=1)
        right = ((logits > 0) == marks.bool()).all(dim=1)
    else:
        # Not F.cross_entropy: its mean over zero rows is NaN.
        losses = -(marks * logits.log_softmax(dim=1)).sum(dim=1)
        right = logits.argmax(dim=1) == marks.argmax(dim=1)
    return losses.sum(), right.sum()


def add_heads(causal: Any, targets: Sequence[ClassifierTarget]) -> Any:
    """Turn a causal model into a classifier: the same weights with new heads."""
    config = deepcopy(causal.config)
    config.num_labels = sum(len(target.labels) for target in targets)
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    return model


def label_names(targets: Sequence[ClassifierTarget]) -> dict[int, str]:
    """Name each output: the label, prefixed with its target if there are several."""
    several = len(targets) > 1
    names = (
        f"{target.name}/{label}" if several else label
        for target in targets
        for label in target.labels
    )
    return dict(enumerate(names))


def describe_classifier(targets: Sequence[ClassifierTarget], pad_id: int, directory: Path) -> None:
    """Write the targets of the model in `directory` to classifier.json."""
    described = {
        "targets": [
            target.model_dump() | {"loss_function": target.loss_function or "single_class"}
            for target in targets
        ],
        "pad_token_id": pad_id,
    }
    path = directory / CLASSIFIER_FILE
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")


def format_labels(found: Mapping[str, Mapping[str, float]]) -> str:
    """Format the result of `classify` as one line: the likeliest label of each target."""
    return ", ".join(
        f"{target}: {max(labels, key=labels.__getitem__)} ({max(labels.values()):.2f})"
        for target, labels in found.items()
    )


def classify(
    model: Any, encoder: Encoder, targets: Sequence[ClassifierTarget], text: str
) -> dict[str, dict[str, float]]:
    """Return the probability of each label, by target."""
    ids = torch.tensor([encoder.read(TextRow(text))], device=model.device)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()[0]
    return {name: dict(found) for name, found in _probabilities(targets, logits)}


def _probabilities(
    targets: Sequence[ClassifierTarget], logits: torch.Tensor
) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    sizes = [len(target.labels) for target in targets]
    for target, scores in zip(targets, torch.split(logits, sizes), strict=True):
        found = scores.sigmoid() if _is_multi(target) else scores.softmax(dim=0)
        yield target.name, zip(target.labels, found.tolist(), strict=True)
