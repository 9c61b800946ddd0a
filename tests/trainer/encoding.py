"""Rows as training examples, without a run directory."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from training_backends.tokens.encoders import Encoded
from training_backends.tokens.examples import ExampleReader
from training_backends.trainer.data import EncodedRow, make_row
from training_backends.trainer.objective import Objective

__all__ = ["examples_of", "row_of"]


def row_of(encoded: Encoded) -> EncodedRow:
    """Return an encoded sequence as tensors."""
    return make_row(torch.tensor(encoded.ids, dtype=torch.int32), torch.tensor(encoded.trained))


def examples_of(
    objective: Objective[Any],
    reader: ExampleReader,
    row: Mapping[str, Any],
    place: str = "file/1",
) -> tuple[list[Any], bool]:
    """Return the examples of a row, and whether one was truncated."""
    found = reader.read(json.dumps(row).encode(), place)
    examples = [
        objective.make_example(
            tuple(map(row_of, each.sequences)), torch.tensor([*each.labels], dtype=torch.uint8)
        )
        for each in found.examples
    ]
    return examples, found.truncated
