"""Classifiers: a head over the last token's hidden state, for one or more targets.

The model is transformers' own `…ForSequenceClassification`, so whatever serves those serves
the result. Its outputs are the labels of all targets, in the order of `classifier.json`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification

from training_backends.core.config import ClassifierTarget
from training_backends.datasets.rows import ClassifierRow, TextRow, parse_any_row
from training_backends.tokens.encoders import Encoder, UnusableRow
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.objective import Batch, Judged, Reading

__all__ = [
    "CLASSIFIER_FILE",
    "ClassifierObjective",
    "Labelled",
    "add_heads",
    "classify",
    "describe_classifier",
    "label_names",
    "read_targets",
    "say_labels",
]

CLASSIFIER_FILE: Final = "classifier.json"
"""Beside the weights: `targets` as in the configuration, in the order of the outputs."""


class Labelled(NamedTuple):
    """One row.

    Attributes:
        marks: 1 for each output that is right, 0 for the others.
        known: For each target, whether the row says anything of it.
    """

    ids: torch.Tensor
    marks: torch.Tensor
    known: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens in it."""
        return len(self.ids)


class ClassifierObjective:
    """Learn the labels of rows.

    A target with one label a row (`single_class`) has the cross entropy as its loss; one with
    any number of them (`multi_class`) the binary cross entropy, mean over its labels. A row
    counts as right where the one label, or the whole set of labels, is.
    """

    has_accuracy = True

    def __init__(self, encoder: Encoder, seq_len: int, targets: Sequence[ClassifierTarget]) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._targets = tuple(targets)
        self._sizes = [len(target.labels) for target in targets]
        self._places = [{label: n for n, label in enumerate(t.labels)} for t in targets]
        self.parts = tuple(target.name for target in targets)
        self.weights = tuple(target.weight for target in targets)

    def read(self, line: bytes, place: str) -> Reading:
        """Encode a text or a conversation with its labels."""
        del place
        row = parse_any_row(line)
        if not isinstance(row, ClassifierRow) or not row.labels:
            raise UnusableRow("the row has no `labels`")
        unknown = row.labels.keys() - {*self.parts}
        if unknown:
            raise UnusableRow(f"{min(unknown)!r} is not one of classifier_targets")
        marks, known = torch.zeros(sum(self._sizes)), torch.zeros(len(self._sizes))
        start = 0
        for index, target in enumerate(self._targets):
            if target.name in row.labels:
                known[index] = 1
                for label in self._labels(target, row.labels[target.name]):
                    marks[start + self._place(index, label)] = 1
            start += self._sizes[index]
        ids = self._encoder.read(row.content)
        if not ids:
            raise UnusableRow("there is nothing to read")
        tokens = torch.tensor(ids[: self._seq_len], dtype=torch.int32)
        return Reading(Labelled(tokens, marks, known.bool()), len(ids) > self._seq_len)

    def _labels(self, target: ClassifierTarget, given: str | list[str]) -> list[str]:
        labels = [given] if isinstance(given, str) else given
        if not _is_multi(target) and len(labels) != 1:
            raise UnusableRow(f"{target.name!r} takes one label, the row gives {len(labels)}")
        return labels

    def _place(self, index: int, label: str) -> int:
        if label not in self._places[index]:
            raise UnusableRow(f"{label[:40]!r} is not a label of {self.parts[index]!r}")
        return self._places[index][label]

    def collate(self, examples: Sequence[Labelled]) -> Batch:
        """Pad rows on the right to the longest of them."""
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
        """Return how many rows say something of each target."""
        return [int(n) for n in torch.stack([e.known for e in examples]).sum(0)]

    def judge(self, model: Any, batch: Batch) -> Judged:
        """Return loss and right answers of each target."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        losses, correct = [], []
        for target, said, marks, known in zip(
            self._targets,
            torch.split(logits, self._sizes, dim=1),
            torch.split(batch["marks"], self._sizes, dim=1),
            batch["known"].T,
            strict=True,
        ):
            loss, right = _judge(target, said[known], marks[known])
            losses.append(loss)
            correct.append(right)
        return Judged(torch.stack(losses), torch.stack(correct), batch["known"].sum(0), {})


def _is_multi(target: ClassifierTarget) -> bool:
    return target.loss_function == "multi_class"


def _judge(
    target: ClassifierTarget, logits: torch.Tensor, marks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_multi(target):
        losses = binary_cross_entropy_with_logits(logits, marks, reduction="none").mean(dim=1)
        right = ((logits > 0) == marks.bool()).all(dim=1)
    else:
        # Written out, because of no rows at all the library makes a loss that is no number.
        losses = -(marks * logits.log_softmax(dim=1)).sum(dim=1)
        right = logits.argmax(dim=1) == marks.argmax(dim=1)
    return losses.sum(), right.sum()


def add_heads(causal: Any, targets: Sequence[ClassifierTarget]) -> Any:
    """Make a classifier of a causal model: the same weights, with new heads."""
    config = deepcopy(causal.config)
    config.num_labels = sum(len(target.labels) for target in targets)
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    return model


def label_names(targets: Sequence[ClassifierTarget]) -> dict[int, str]:
    """Name each output: the label alone, or with its target where there are several."""
    several = len(targets) > 1
    names = (
        f"{target.name}/{label}" if several else label
        for target in targets
        for label in target.labels
    )
    return dict(enumerate(names))


def describe_classifier(targets: Sequence[ClassifierTarget], pad_id: int, directory: Path) -> None:
    """Write what the outputs of the model in `directory` mean."""
    described = {
        "targets": [
            target.model_dump() | {"loss_function": target.loss_function or "single_class"}
            for target in targets
        ],
        "pad_token_id": pad_id,
    }
    path = directory / CLASSIFIER_FILE
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")


def read_targets(directory: Path) -> tuple[ClassifierTarget, ...]:
    """Return what the model in `directory` decides; nothing if it is no classifier.

    Raises:
        TrainerError: The file that says so cannot be read.
    """
    path = directory / CLASSIFIER_FILE
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["targets"]
        return tuple(ClassifierTarget.model_validate(target) for target in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} cannot be read: {error}") from error


def say_labels(found: Mapping[str, Mapping[str, float]]) -> str:
    """Put what `classify` found into a line: of each target the likeliest label."""
    return ", ".join(
        f"{target}: {max(labels, key=labels.__getitem__)} ({max(labels.values()):.2f})"
        for target, labels in found.items()
    )


def classify(
    model: Any, encoder: Encoder, targets: Sequence[ClassifierTarget], text: str
) -> dict[str, dict[str, float]]:
    """Return for each target the probability of each of its labels."""
    ids = torch.tensor([encoder.read(TextRow(text))], device=model.device)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()[0]
    return {name: dict(found) for name, found in _probabilities(targets, logits)}


def _probabilities(
    targets: Sequence[ClassifierTarget], logits: torch.Tensor
) -> Iterator[tuple[str, Iterator[tuple[str, float]]]]:
    sizes = [len(target.labels) for target in targets]
    for target, said in zip(targets, torch.split(logits, sizes), strict=True):
        found = said.sigmoid() if _is_multi(target) else said.softmax(dim=0)
        yield target.name, zip(target.labels, found.tolist(), strict=True)
