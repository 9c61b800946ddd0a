"""`tiny-mistral`: a small Mistral-architecture model generated from a seed."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from training_backends.core.config import TINY_POSITIONS
from training_backends.datasets.rows import BYTE_VOCABULARY_SIZE, Control

__all__ = ["make_tiny_model"]


def make_tiny_model(seed: int) -> MistralForCausalLM:
    """Return the untrained model, about 1 M parameters; deterministic for a given seed."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=BYTE_VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_POSITIONS,
        sliding_window=None,
        bos_token_id=int(Control.BOS),
        eos_token_id=int(Control.EOS),
        pad_token_id=int(Control.PAD),
    )
    return MistralForCausalLM(config)
