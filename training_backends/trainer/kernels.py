"""Kernels of liger-kernel in the place of a model's own norms, rotations and MLPs."""

import logging
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

import torch

__all__ = ["use_kernels"]

_APPLY: Final[Mapping[str, str]] = MappingProxyType(
    {kind: f"apply_liger_kernel_to_{kind}" for kind in ("llama", "mistral", "qwen2", "qwen3")}
)
"""Architectures whose logits and gradients were compared. Mixtral is none of them: its experts
cannot be adapted any more behind liger-kernel 0.8."""
_SILU: Final = frozenset({"silu", "swish"})


def use_kernels(model: Any, device: torch.device, wanted: str) -> tuple[str, ...]:
    """Have a model compute with these kernels and return their names; none where they do not fit.

    The last layer and the loss stay ours (`head.py`), which needs no logits of all tokens either.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = _APPLY.get(causal.config.model_type)
    if wanted == "none" or device.type != "cuda" or not name or not find_spec("liger_kernel"):
        return ()
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # tells of kernels for other chips
    # Theirs knows this one activation, whatever the model has.
    plain = causal.config.hidden_act in _SILU and not getattr(causal.config, "mlp_bias", False)
    chosen = {"rope": True, "rms_norm": True, "swiglu": plain}
    apply = getattr(import_module("liger_kernel.transformers"), name)
    apply(model=causal, cross_entropy=False, fused_linear_cross_entropy=False, **chosen)
    return tuple(kernel for kernel, used in chosen.items() if used)
