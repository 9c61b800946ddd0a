"""A base that is held in four bits (NF4), by bitsandbytes."""

from importlib.util import find_spec
from typing import Any, Final

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BitsAndBytesConfig

from training_backends.trainer.errors import EngineError

__all__ = [
    "adapt_alike",
    "compute_dtype",
    "count_experts",
    "in_four_bits",
    "in_full",
    "is_in_four_bits",
    "keep_as_loaded",
]

_INSTALL: Final = "pip install 'training-backends[qlora]'"


def in_four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what makes transformers load a model so: NF4, its scales quantized as well.

    Embeddings and the last layer stay in `dtype`.

    Raises:
        EngineError: The package for it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise EngineError(f"qlora needs the package bitsandbytes: {_INSTALL}; or take lora.")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantized, "device_map": {"": device}}


def is_in_four_bits(model: Any) -> bool:
    """Tell whether a model, or the base of an adapter, is held in four bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def compute_dtype(model: Any) -> torch.dtype:
    """Return what a model in four bits computes in."""
    dtype: torch.dtype = model.config.quantization_config.bnb_4bit_compute_dtype
    return dtype


def keep_as_loaded(model: Any) -> None:
    """Have a model in four bits keep its weights as they are, whatever it is asked.

    On a processor that multiplies bfloat16 (AVX-512 BF16) a layer of bitsandbytes 0.50 lays its
    weights out anew when it is first used for evaluation. It rounds their scales to bfloat16 as
    it does so, and what it then calculates with has no gradient: training behind the first
    validation would go on without those gradients, and say nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def count_experts(model: Any) -> int:
    """Count the weights of layers that hold several experts in one: those are not quantized."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 2 and p.is_floating_point())


def in_full(model: Any, dtype: torch.dtype) -> Any:
    """Return a model with all its weights in `dtype`, if only its four bits are there."""
    if not is_in_four_bits(model):
        return model
    whole = model.dequantize(dtype)
    # transformers 5.23 would undo on saving what it did on loading, and cannot undo this.
    whole._weight_conversions = None  # noqa: SLF001  # no public way
    return whole


def adapt_alike(base: Any, model: PeftModel) -> PeftModel:
    """Put the adapter of a model on another base."""
    (config,) = model.peft_config.values()
    adapted = type(model)(base, config)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model))
    return adapted
