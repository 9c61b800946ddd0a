"""Ask a model one question, greedily, so that the answer is always the same."""

from typing import Any

import torch

from training_backends.engine.encoding import Encoder

__all__ = ["answer"]


def answer(model: Any, encoder: Encoder, prompt: str, max_tokens: int) -> str:
    """Return what a model says to a user's message.

    Args:
        max_tokens: Longest answer.
    """
    # What is no Unicode, such as bytes of a terminal that were no UTF-8, becomes "?".
    ids = encoder.prompt(prompt.encode("utf-8", "replace").decode("utf-8"))
    start = torch.tensor([ids], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.eos_id,
        )
    model.train(training)
    said = [int(token) for token in out[0, len(ids) :]]
    return encoder.decode([token for token in said if token != encoder.eos_id])
