"""Generate answers with greedy decoding, which is deterministic."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch

from training_backends.core.run import Prompt
from training_backends.datasets.rows import ChatRow, Message
from training_backends.tokens.encoders import Encoder

__all__ = ["answer", "end_ids", "evaluating"]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Disable dropout and gradients for the block, then restore the previous mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer(model: Any, encoder: Encoder, prompt: Prompt, max_tokens: int) -> str:
    """Return the model's answer to a user message or a conversation.

    Args:
        max_tokens: Maximum length of the answer.
    """
    if isinstance(prompt, str):
        row = ChatRow([Message("user", prompt)])
    else:
        row = ChatRow([Message(said["role"], said["content"]) for said in prompt])
    ids, ends = encoder.prompt(row), end_ids(model, encoder)
    start = torch.tensor([ids], device=model.device)
    with evaluating(model):
        out = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=encoder.pad_id,
            eos_token_id=[*ends],
        )
    generated = [int(token) for token in out[0, len(ids) :]]
    return encoder.decode([*takewhile(lambda token: token not in ends, generated)])


def end_ids(model: Any, encoder: Encoder) -> frozenset[int]:
    """Return the tokens that end an answer: the model's own, and those that are trained."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    return frozenset(encoder.end_ids) | {*(own if isinstance(own, list) else [own])} - {None}
