"""Load and save models."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
)

from training_backends.core.config import TINY_MODEL, TINY_POSITIONS, ClassifierTarget, Tuning
from training_backends.core.errors import first_line
from training_backends.datasets.rows import BYTE_VOCABULARY_SIZE, Control
from training_backends.rundir.directory import ADAPTER_CONFIG, DEQUANTIZED, ResultRecord
from training_backends.tokens.encoders import Encoder, encoder_for, has_tokenizer
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.generate import end_ids
from training_backends.trainer.model_files import (
    base_model_of,
    find_model,
    read_targets,
    resolve_targets,
)
from training_backends.trainer.objectives.classifier import (
    add_heads,
    describe_classifier,
    label_names,
)

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "LoadedModel",
    "choose_device",
    "choose_dtype",
    "count_experts",
    "dequantized",
    "is_in_four_bits",
    "load_model",
    "make_tiny_model",
    "prepare_tuning",
    "save_model",
    "save_result",
]

_INSTALL: Final = "pip install 'training-backends[qlora]'"


def _four_bit_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the transformers options that load a model in 4-bit NF4 with double quantization.

    Embeddings and the output layer stay in `dtype`.

    Raises:
        TrainerError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise TrainerError(f"qlora requires bitsandbytes: {_INSTALL}; or use lora.")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantized, "device_map": {"": device}}


def is_in_four_bits(model: Any) -> bool:
    """Return whether a model, or the base model of an adapter, is loaded in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _compute_dtype(model: Any) -> torch.dtype:
    """Return the compute dtype of a 4-bit model."""
    dtype: torch.dtype = model.config.quantization_config.bnb_4bit_compute_dtype
    return dtype


def _keep_as_loaded(model: Any) -> None:
    """Keep a 4-bit model's weight layout fixed.

    On CPUs with AVX-512 BF16, a bitsandbytes 0.50 layer repacks its weights when it is first used
    in evaluation mode. This rounds their scales to bfloat16, and the repacked path has no gradient:
    after the first validation, training would silently continue without those gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def count_experts(model: Any) -> int:
    """Count the weights of fused expert layers, which are not quantized."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 2 and p.is_floating_point())


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """Return a 4-bit model dequantized to `dtype`; other models unchanged."""
    if not is_in_four_bits(model):
        return model
    restored = model.dequantize(dtype)
    _forget_conversions(restored)
    return restored


def _is_adapted(model: Any) -> bool:
    """Return whether a model has an adapter. A model has none before peft is loaded."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _apply_same_adapter(base: Any, model: "PeftModel") -> "PeftModel":
    """Apply a model's adapter to another base model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: PLC0415

    (config,) = model.peft_config.values()
    adapted = type(model)(base, config)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model))
    return adapted


_PROCESSORS: Final = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""How an image-text model prepares images."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for fine-tuning or generation, and its encoder.

    Attributes:
        base: Name of the model, or of an adapter's base model.
        targets: Its targets, if it is a classifier.
        directory: Local directory of the base model's files; None for the built-in model.
        dtype: Precision in which the base model is stored; None if its files do not name it.
    """

    model: Any
    encoder: Encoder
    base: str
    targets: tuple[ClassifierTarget, ...] = ()
    directory: Path | None = None
    dtype: torch.dtype | None = None


def choose_device(requested: str) -> torch.device:
    """Return the device to train on.

    Raises:
        TrainerError: A GPU was requested and none is available.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise TrainerError("device is cuda, but torch finds no GPU on this machine.")
    return torch.device(requested)


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; auto is bfloat16 on GPUs that support it."""
    if requested == "auto":
        halves = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if halves else torch.float32
    return torch.bfloat16 if requested == "bfloat16" else torch.float32


def make_tiny_model(seed: int) -> MistralForCausalLM:
    """Return `tiny-mistral`, untrained: about 1 M parameters, deterministic for a given seed."""
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


def load_model(
    name: str,
    *,
    seed: int,
    tuning: Tuning | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    targets: Sequence[ClassifierTarget] = (),
    chat_template: str | None = None,
    is_empty: bool = False,
) -> LoadedModel:
    """Load a model: the built-in one, a directory, or one from the Hub.

    Args:
        seed: Seeds the built-in model's weights and a classifier's new heads.
        tuning: Decides the precision; None for inference.
        device: Where the model will run.
        dtype: Compute dtype; None picks one for the device.
        attention: Attention implementation in transformers.
        targets: Make it a classifier with these targets.
        chat_template: Jinja template that replaces the model's own.
        is_empty: Load no weights (but those of the built-in model): its tensors are on the meta
            device, to be received from another process.

    Raises:
        TrainerError: The model does not exist or cannot be fetched, or its chats cannot be
            encoded exactly.
    """
    dtype = dtype or choose_dtype("auto", device)
    directory = None
    if name == TINY_MODEL:
        model: Any = make_tiny_model(seed)
        model = add_heads(model, targets) if targets else model
        encoder = encoder_for(name, None, chat_template=chat_template)
    else:
        directory = find_model(name)
        targets = resolve_targets(name, directory, targets, trains=tuning is not None)
        if (directory / ADAPTER_CONFIG).is_file():
            base = load_model(
                base_model_of(name, directory),
                seed=seed,
                tuning=tuning,
                device=device,
                dtype=dtype,
                attention=attention,
                targets=targets,
                chat_template=chat_template,
                is_empty=is_empty,
            )
            return _load_adapter(base, name, directory, tuning, chat_template)
        encoder = encoder_for(name, directory, chat_template=chat_template)
        model = _load_weights(
            name,
            directory,
            tuning,
            device=device,
            dtype=dtype,
            targets=targets,
            is_empty=is_empty,
        )
    if attention != "auto":
        _set_attention(model, name, attention)
    if targets:
        _name_outputs(model, targets, encoder.pad_id)
    elif generation := getattr(model, "generation_config", None):
        # Any program that generates with the result stops where its answers end.
        ends = sorted(end_ids(model, encoder))
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    stored = _stored_dtype(directory) if directory else None
    return LoadedModel(model, encoder, name, tuple(targets), directory, stored)


def _set_attention(model: Any, name: str, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise TrainerError(
            f"{name!r} cannot use the attention {attention!r}: {first_line(error)}"
        ) from error


def _name_outputs(model: Any, targets: Sequence[ClassifierTarget], pad_id: int) -> None:
    model.config.id2label = label_names(targets)
    model.config.label2id = {name: n for n, name in model.config.id2label.items()}
    # transformers finds the last token as the last one that is not padding.
    model.config.get_text_config().pad_token_id = pad_id


def _load_adapter(
    base: LoadedModel,
    name: str,
    directory: Path,
    tuning: Tuning | None,
    chat_template: str | None,
) -> LoadedModel:
    """Apply an adapter to its base model; full fine-tuning trains the two merged."""
    if base.targets and not read_targets(directory):
        raise TrainerError(
            f"The adapter {name!r} is that of a language model, and a classifier cannot start from "
            "it. Merge it into its base model first (options.result: merged)."
        )
    from peft import PeftModel  # noqa: PLC0415

    trains_adapter = tuning is not None and tuning.kind != "full"
    try:
        model = PeftModel.from_pretrained(base.model, directory, is_trainable=trains_adapter)
    except (RuntimeError, ValueError) as error:
        raise TrainerError(
            f"The adapter {name!r} does not fit {base.base!r}: {first_line(error)}"
        ) from error
    if tuning is not None and not trains_adapter:
        model = model.merge_and_unload()
    else:  # peft looks there, or on the Hub, when it saves the adapter
        (config,) = model.peft_config.values()
        config.base_model_name_or_path = str(base.directory)
    if chat_template is not None:  # the base model was loaded with it
        return replace(base, model=model)
    # Its tokenizer may have a chat template of its own.
    encoder = encoder_for(name, directory) if has_tokenizer(directory) else base.encoder
    return replace(base, model=model, encoder=encoder)


def _load_weights(
    name: str,
    directory: Path,
    tuning: Tuning | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    targets: Sequence[ClassifierTarget],
    is_empty: bool,
) -> Any:
    # Trained weights need full precision; frozen ones only the compute dtype.
    trained_fully = tuning is not None and tuning.kind == "full"
    options: dict[str, Any] = {"dtype": torch.float32 if trained_fully else dtype}
    if tuning is not None and tuning.kind == "qlora":
        options |= _four_bit_options(device, dtype)
    elif is_empty:
        options["device_map"] = "meta"
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("encoder-decoder models are not supported")  # noqa: TRY301
        loader: Any = AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            loader = AutoModelForImageTextToText
        is_dequantized = _dequantize(config)
        if targets:
            loader = AutoModelForSequenceClassification
            config.num_labels = sum(len(target.labels) for target in targets)
        model = loader.from_pretrained(directory, config=config, local_files_only=True, **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        kind = "classifier" if targets else "model"
        raise TrainerError(f"{name!r} cannot be loaded as a {kind}: {first_line(error)}") from error
    if is_in_four_bits(model):
        if trained_fully:
            raise TrainerError(
                f"{name!r} is stored in 4 bits, which full fine-tuning does not support. Use qlora."
            )
        _keep_as_loaded(model)
    if is_dequantized:
        _forget_conversions(model)
        model = model.to(options["dtype"])  # transformers 5.23 keeps that of each stored tensor
    return model


def _dequantize(config: Any) -> bool:
    """Have a model dequantized when it is loaded; return whether that is supported."""
    quantized = getattr(config, "quantization_config", None)
    if not isinstance(quantized, dict) or quantized.get("quant_method") not in DEQUANTIZED:
        return False
    config.quantization_config = {**quantized, "dequantize": True}
    return True


def _forget_conversions(model: Any) -> None:
    """Save the weights as they are.

    On saving, transformers 5.23 reverts conversions made on loading, and cannot revert this one.
    """
    model._weight_conversions = None  # noqa: SLF001  # no public API


def prepare_tuning(model: Any, tuning: Tuning, name: str, *, classifies: bool = False) -> Any:
    """Make the weights that `tuning` selects trainable; set the seed before.

    Args:
        classifies: The model is a classifier, whose heads are always trained.

    Raises:
        TrainerError: The model has no such modules.
    """
    outside = _outside_text(model)
    if tuning.kind == "full":
        for each, parameter in model.named_parameters():
            parameter.requires_grad = not (outside and re.match(outside, each))
        return model
    if name == TINY_MODEL:
        raise TrainerError(f"{TINY_MODEL} has random weights and only supports full fine-tuning.")
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  # full fine-tuning needs none

    adapted = model if _is_adapted(model) else None
    try:
        adapted = adapted or get_peft_model(
            model,
            LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha if tuning.alpha is not None else 2 * tuning.rank,
                lora_dropout=tuning.dropout,
                target_modules=list(tuning.target_modules or ()) or "all-linear",
                exclude_modules=f"{outside}.*" if outside else None,
                task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise TrainerError(f"LoRA cannot be added to {name!r}: {first_line(error)}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _outside_text(model: Any) -> str | None:
    """Return the pattern of the modules that precede an image-text model's language model.

    Those are the vision tower and what projects its output; None for a language model.
    """
    if _is_adapted(model) or model.config.get_text_config() is model.config:
        return None
    text = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is text), "")
    parent, _, leaf = path.rpartition(".")
    heads = [name for name in ("lm_head", "score") if hasattr(model.get_submodule(parent), name)]
    spared = "|".join(re.escape(name) for name in (leaf, *heads))
    prefix = re.escape(f"{parent}.") if parent else ""
    return rf"{prefix}(?!(?:{spared})(?:\.|$))"


def save_model(model: Any, name: str, directory: Path) -> None:
    """Write a model's weights, or only its adapter's, without local paths.

    Args:
        name: The base model as named in the run.
    """
    # transformers compiles the renamings of all architectures to look for those of one; the
    # built-in model has none.
    model.save_pretrained(directory, save_original_format=name != TINY_MODEL)
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    if generation := getattr(model, "generation_config", None):
        generation.save_pretrained(directory)  # peft saves none
    # peft stores the base model's local path here, and again in a model card.
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads(path.read_text(encoding="utf-8"))
    local = Path(name).expanduser()
    config["base_model_name_or_path"] = local.name if local.is_dir() else name
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_result(loaded: LoadedModel, directory: Path, *, save_as: str = "adapter") -> ResultRecord:
    """Write the trained model and its tokenizer into an empty directory.

    A full model is written in the precision of its base.

    Args:
        save_as: How to save an adapter: `adapter`, `merged` into its base model (which leaves no
            adapter in memory), or `both`.
    """
    model = loaded.model
    adapter = None
    if _is_adapted(model) and save_as != "adapter":
        if save_as == "both":
            adapter = directory / "adapter"
            _save_all(model, loaded, adapter)
        model = _merge(loaded)
    is_adapter = _is_adapted(model)
    if not is_adapter:
        _round_weights(model, loaded.dtype)
    _save_all(model, loaded, directory)
    return ResultRecord(
        path=directory.name,
        format="adapter" if is_adapter else "full",
        base_model=loaded.base,
        adapter=f"{directory.name}/{adapter.name}" if adapter else None,
    )


def _stored_dtype(directory: Path) -> torch.dtype | None:
    """Return the precision in which a model's files say that its weights are stored."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    for part in (config, config.get("text_config") or {}):
        found = getattr(torch, str(part.get("dtype") or part.get("torch_dtype")), None)
        if isinstance(found, torch.dtype):
            return found
    return None


def _round_weights(model: Any, dtype: torch.dtype | None) -> None:
    """Round trained weights to a half precision, except those that need more."""
    if dtype not in {torch.bfloat16, torch.float16}:
        return
    exact = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and exact.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    for part in (model.config, *(getattr(model.config, key) for key in model.config.sub_configs)):
        if part is not None:  # saved with the model, whose own precision transformers updates
            part.dtype = dtype


def _merge(loaded: LoadedModel) -> Any:
    model = loaded.model
    if is_in_four_bits(model):
        # Merging into 4-bit weights would round the adapter away, so the original base model is
        # loaded: on the CPU, as the GPU may lack the memory, and from the local files, as the Hub
        # may have a newer revision or be unreachable.
        cpu, dtype = torch.device("cpu"), _compute_dtype(model)
        base = load_model(
            str(loaded.directory),
            seed=0,
            tuning=None,
            device=cpu,
            dtype=dtype,
            targets=loaded.targets,
        )
        model = _apply_same_adapter(dequantized(base.model, dtype), model)
    return model.merge_and_unload()


def _save_all(model: Any, loaded: LoadedModel, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_model(model, loaded.base, directory)
    loaded.encoder.save(directory)
    if loaded.directory is not None and not _is_adapted(model):
        for name in _PROCESSORS:
            if (loaded.directory / name).is_file():
                shutil.copy(loaded.directory / name, directory / name)
    if loaded.targets:
        describe_classifier(loaded.targets, loaded.encoder.pad_id, directory)
