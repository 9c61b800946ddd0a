"""Make sure that rows packed into one sequence do not see each other."""

from typing import Any, Final

import torch

from training_backends.trainer.errors import EngineError
from training_backends.trainer.evaluating import evaluating

__all__ = ["require_separate_rows"]

_FIRST: Final = ([1, 2, 3, 4], [5, 6, 7, 8])
_SECOND: Final = [3, 1, 2]
_ROUNDING: Final = 0.1
"""Share of the difference between a row behind one text and behind another that may remain:
experts compute in groups of tokens, so that their rounding depends on the other row."""


def require_separate_rows(model: Any, name: str) -> None:
    """Try on the model itself whether a row depends on the one packed before it.

    transformers keeps packed rows apart in the attention of most architectures. One that
    carries a state from token to token would learn from the wrong row, and nothing would say
    so.

    Raises:
        EngineError: It does.
    """
    first, second = range(len(_FIRST[0])), range(len(_SECOND))
    with evaluating(model):
        packed = _difference(model, [*first, *second])
        joined = _difference(model, [*range(len(first) + len(second))])
    if packed > _ROUNDING * joined:
        raise EngineError(
            f"The architecture of {name!r} does not keep packed rows apart: each would learn from "
            "the one before it. Leave options.packing out."
        )


def _difference(model: Any, positions: list[int]) -> float:
    """Return how much the second row's logits change with the first row."""
    one, other = (
        model(
            input_ids=torch.tensor([first + _SECOND], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
        ).logits[:, -len(_SECOND) :]
        for first in _FIRST
    )
    return float((one - other).abs().max())
