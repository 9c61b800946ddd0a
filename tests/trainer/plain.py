"""Training written out as plainly as can be, in float64, a row at a time.

What the engine is held against: no batches, no padding, no masks, no Trainer.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, MistralForCausalLM

from training_backends.datasets.rows import byte_encode, parse_row
from training_backends.rundir.directory import RunSpec
from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer
from training_backends.trainer.data import Order
from training_backends.trainer.models import make_tiny_model

Losses = Callable[[Any, Sequence[bytes]], torch.Tensor]


def batches(spec: RunSpec) -> Iterator[list[bytes]]:
    """Yield the lines of each step."""
    (source,) = spec.train
    lines = source.local_path.read_bytes().splitlines()
    order = Order((len(lines),), (1.0,), spec.seed)
    for step in range(spec.training_steps or 0):
        first = step * spec.batch_size
        yield [lines[order.row(first + place)] for place in range(spec.batch_size)]


def train_plainly(model: Any, spec: RunSpec, loss_of: Losses) -> list[float]:
    """Return the loss of each step, with AdamW, a linear warm-up and a cosine decay."""
    return train_on(model, spec, loss_of, batches(spec))


def train_on(
    model: Any, spec: RunSpec, loss_of: Losses, steps: Iterator[list[bytes]]
) -> list[float]:
    """Return the loss of each step over the lines that are given."""
    model = model.double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate)
    total = spec.training_steps or 0
    warm = round(spec.warmup_fraction * total)
    losses = []
    for step, lines in enumerate(steps):
        share = (step - warm) / (total - warm)
        scale = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * scale
        loss = loss_of(model, lines)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def nats(model: Any, ids: list[int], trained: list[bool]) -> torch.Tensor:
    """Return the loss of each token that counts."""
    said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [n for n in range(1, len(ids)) if trained[n]]
    return -torch.stack([said[n - 1, ids[n]] for n in places])


def answer_loss(model: Any, lines: Sequence[bytes]) -> torch.Tensor:
    """Return the mean loss over the assistants' tokens of chats."""
    return torch.cat([nats(model, *byte_encode(parse_row(line))) for line in lines]).mean()


def log_probability(model: Any, ids: list[int], trained: list[bool]) -> torch.Tensor:
    """Return how likely the tokens that count are."""
    return -nats(model, ids, trained).sum()


def preference_loss(
    model: Any,
    reference: Any,
    pairs: Sequence[tuple[tuple[list[int], list[bool]], tuple[list[int], list[bool]]]],
    beta: float,
) -> torch.Tensor:
    """Return the mean loss of DPO, as its paper has it."""
    losses = []
    for better, worse in pairs:
        with torch.no_grad():
            before = log_probability(reference, *better) - log_probability(reference, *worse)
        now = log_probability(model, *better) - log_probability(model, *worse)
        losses.append(-logsigmoid(beta * (now - before)))
    return torch.stack(losses).mean()


def save_tiny(directory: Path) -> Path:
    """Save a model with a tokenizer, much smaller than tiny-mistral, as a base to train on."""
    config = make_tiny_model(7).config
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    MistralForCausalLM(config).save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory


def save_fp8(directory: Path) -> dict[str, torch.Tensor]:
    """Save a small model in 8 bits, as DeepSeek and Mistral do; return its exact weights."""
    save_tiny(directory)
    path, size = directory / "model.safetensors", 32
    stored, exact = {}, {}
    for name, weight in load_file(path).items():
        if "proj" not in name:
            stored[name] = weight.to(torch.bfloat16)
            exact[name] = stored[name].float()
            continue
        rows, columns = (number // size for number in weight.shape)
        blocks = weight.reshape(rows, size, columns, size)
        scales = blocks.abs().amax((1, 3)) / 448
        quantized = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        exact[name] = (quantized.float() * scales[:, None, :, None]).reshape(weight.shape)
        stored[name] = quantized.reshape(weight.shape)
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, path, metadata={"format": "pt"})
    described = {"quant_method": "fp8", "weight_block_size": [size, size]}
    config = json.loads((directory / "config.json").read_bytes())
    config |= {"dtype": "bfloat16", "quantization_config": described}
    (directory / "config.json").write_text(json.dumps(config))
    return exact


_TEXT: Final = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
_GROUPED: Final = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS: Final = {
    **_TEXT,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "v_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_TOWER: Final = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PIXTRAL: Final = {**_TOWER, "model_type": "pixtral", "head_dim": 16}
_QWEN_TOWER: Final = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
}
_OF_TODAY: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]]] = {
    "mistral3": ("mistral3", {**_GROUPED, "model_type": "ministral3"}, _PIXTRAL),
    "mistral3, experts": ("mistral3", {**_EXPERTS, "model_type": "mistral4"}, _PIXTRAL),
    "mistral4": ("mistral4", _EXPERTS, None),
    "gemma3": (
        "gemma3",
        {**_GROUPED, "model_type": "gemma3_text"},
        {**_TOWER, "model_type": "siglip_vision_model"},
    ),
    "qwen3_vl": ("qwen3_vl", {**_GROUPED, "model_type": "qwen3_vl_text"}, _QWEN_TOWER),
}
MODELS_OF_TODAY: Final = tuple(_OF_TODAY)
"""Architectures that are no plain language models, most with a vision tower."""


def save_of_today(directory: Path, name: str) -> Path:
    """Save a small random model of an architecture of today, in bfloat16."""
    kind, text, tower = _OF_TODAY[name]
    parts = {"text_config": text, "vision_config": tower} if tower else text
    images = {"image_token_index": 10} if kind in {"mistral3", "gemma3"} else {}
    config = CONFIG_MAPPING[kind](**parts, **images)
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory
