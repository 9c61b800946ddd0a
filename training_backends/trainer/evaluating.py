"""Ask a model that is being trained, without training it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradients off for the block; afterwards the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
