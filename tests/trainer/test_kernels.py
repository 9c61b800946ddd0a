"""Which kernels are put into which models; the kernels themselves need a GPU."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from training_backends.trainer import run
from training_backends.trainer.run import use_kernels

GPU = torch.device("cuda")
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
ALL = {"rope": True, "rms_norm": True, "swiglu": True}

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a stand-in of the package is asked to do; it has what 0.8.5 has of these names."""
    made: Calls = []
    stand_in = ModuleType("liger_kernel.transformers")
    for kind in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma"):
        name = f"apply_liger_kernel_to_{kind}"
        setattr(stand_in, name, lambda name=name, **asked: made.append((name, asked)))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    monkeypatch.setattr(run, "find_spec", lambda _: stand_in)
    return made


def small(kind: str, **changes: Any) -> Any:
    """Make a model of an architecture."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0, **changes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_norms_rotations_and_mlps_of_what_was_compared(calls: Calls, kind: str) -> None:
    """The losses stay the engine's."""
    model = small(kind)
    assert use_kernels(model, GPU, "auto") == ("rope", "rms_norm", "swiglu")
    assert calls == [(f"apply_liger_kernel_to_{kind}", {"model": model, **ALL, **LOSSES})]


def test_the_model_below_an_adapter_is_meant(calls: Calls) -> None:
    """An adapter has no layers of its own."""
    model = small("mistral")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert use_kernels(adapted, GPU, "auto")
    assert calls[0][1]["model"] is model


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_an_mlp_that_is_another_is_left_alone(calls: Calls, changes: dict[str, Any]) -> None:
    """The package would put SiLU into it without looking."""
    assert use_kernels(small("llama", **changes), GPU, "auto") == ("rope", "rms_norm")
    assert calls[0][1]["swiglu"] is False


@pytest.mark.parametrize(
    ("kind", "device", "wanted"),
    [("mistral", "cuda", "none"), ("mistral", "cpu", "auto"), ("mixtral", "cuda", "auto")],
)
def test_nothing_where_it_does_not_fit(calls: Calls, kind: str, device: str, wanted: str) -> None:
    """Switched off, without a GPU, or an architecture that was not compared."""
    assert use_kernels(small(kind), torch.device(device), wanted) == ()
    assert calls == []


def test_nothing_without_the_package(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is optional."""
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    assert use_kernels(small("mistral"), GPU, "auto") == ()
    assert calls == []
