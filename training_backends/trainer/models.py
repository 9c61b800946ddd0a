"""Find, load and save models; a hub that does not answer is said at once."""

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from training_backends.core.config import TINY_MODEL, ClassifierTarget, Tuning
from training_backends.core.errors import first_line
from training_backends.rundir.directory import ResultRecord, RunDir
from training_backends.tokens.encoders import Encoder, encoder_for
from training_backends.tokens.tokenizers import hub_failure
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.objectives.classifier import (
    add_heads,
    describe_classifier,
    label_names,
    read_targets,
)
from training_backends.trainer.tiny_model import make_tiny_model

__all__ = [
    "LoadedModel",
    "adapt_alike",
    "choose_device",
    "choose_dtype",
    "compute_dtype",
    "count_experts",
    "find_model",
    "in_four_bits",
    "in_full",
    "is_in_four_bits",
    "keep_as_loaded",
    "load_model",
    "prepare_tuning",
    "save_model",
    "save_result",
]

_INSTALL: Final = "pip install 'training-backends[qlora]'"


def in_four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what makes transformers load a model so: NF4, its scales quantized as well.

    Embeddings and the last layer stay in `dtype`.

    Raises:
        TrainerError: The package for it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise TrainerError(f"qlora needs the package bitsandbytes: {_INSTALL}; or take lora.")
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


HUB_TIMEOUT: Final = 5.0
"""Seconds to wait for the hub to say whether it has a model."""

_FILES: Final = [
    *("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.model.v*"),
    "README.md",  # says the licence
]
_UNNEEDED: Final = ["consolidated*", "original/*", "onnx/*"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for tuning or sampling, and its encoder.

    Attributes:
        targets: What it decides, if it is a classifier.
        directory: Where its files lie on this machine; None for the built-in model.
    """

    model: Any
    encoder: Encoder
    targets: tuple[ClassifierTarget, ...] = ()
    directory: Path | None = None


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        TrainerError: A GPU was asked for and there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainerError("A GPU was asked for (device: cuda), but torch finds none here.")
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return what to compute in: auto takes bfloat16 on a GPU that has it."""
    if wanted == "auto":
        halves = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if halves else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def load_model(
    name: str,
    *,
    seed: int,
    tuning: Tuning | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    targets: Sequence[ClassifierTarget] = (),
) -> LoadedModel:
    """Load the model `name`: the built-in one, a directory, or one of the hub.

    Args:
        seed: Makes the weights of the built-in model, and a classifier's new heads.
        tuning: Decides the precision; None for sampling only.
        device: Where it will run.
        dtype: What it will compute in; None for what fits the device.
        attention: Implementation of it in transformers.
        targets: Make a classifier of it that decides these.

    Raises:
        TrainerError: There is no such model, it cannot be fetched, or its chats cannot be
            encoded exactly.
    """
    dtype = dtype or choose_dtype("auto", device)
    directory = None
    if name == TINY_MODEL:
        model: Any = make_tiny_model(seed)
        model = add_heads(model, targets) if targets else model
        encoder = encoder_for(name, None)
    else:
        directory = find_model(name)
        if (directory / "adapter_config.json").is_file():
            return _load_adapter(name, directory, device)
        encoder = encoder_for(name, directory)
        targets = _settled_targets(name, directory, tuning, targets)
        model = _load_weights(name, directory, tuning, device=device, dtype=dtype, targets=targets)
    if attention != "auto":
        _set_attention(model, name, attention)
    if targets:
        _name_outputs(model, targets, encoder.pad_id)
    return LoadedModel(model, encoder, tuple(targets), directory)


def _settled_targets(
    name: str, directory: Path, tuning: Tuning | None, wanted: Sequence[ClassifierTarget]
) -> Sequence[ClassifierTarget]:
    """Return what a model decides, where that fits what is wanted of it."""
    there = read_targets(directory)
    if tuning is None or not there:
        return wanted or there
    if [(t.name, t.labels) for t in there] != [(t.name, t.labels) for t in wanted]:
        raise TrainerError(
            f"{name!r} is a classifier of its own targets ({', '.join(t.name for t in there)}), "
            "and can be trained on for the same targets and labels only."
        )
    return wanted


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
    # The last token is found as the last that is no padding.
    model.config.get_text_config().pad_token_id = pad_id


def _load_adapter(name: str, directory: Path, device: torch.device) -> LoadedModel:
    base_name, targets = _base_of(directory), read_targets(directory)
    base = load_model(base_name, seed=0, tuning=None, device=device, targets=targets)
    try:
        model = PeftModel.from_pretrained(base.model, directory)
    except (RuntimeError, ValueError) as error:
        raise TrainerError(
            f"The adapter {name!r} does not fit {base_name!r}: {first_line(error)}"
        ) from error
    return LoadedModel(model, base.encoder, targets, directory)


def _base_of(directory: Path) -> str:
    # The adapter itself names no path of this machine; the run that it belongs to does.
    record = RunDir(directory.parent).read_exit()
    if record and record.result and record.result.path == directory.name:
        return record.result.base_model
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config["base_model_name_or_path"])


def find_model(name: str) -> Path:
    """Return the directory of a model, fetched from the hub where that is needed.

    Raises:
        TrainerError: There is no such model, or it cannot be fetched.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not any((local / f).is_file() for f in ("config.json", "adapter_config.json")):
            raise TrainerError(f"{local} is no model: it holds no config.json.")
        return local
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise TrainerError(f"There is no model directory {local}.")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub import errors as hub  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    try:
        if HF_HUB_OFFLINE:
            return _cached(name) or _refuse_offline(name)
        # Asked first, and once: the download itself retries for half a minute.
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_UNNEEDED))
    except TrainerError:
        raise
    except hub.GatedRepoError as error:
        raise TrainerError(
            f"The hub gives {name!r} only to who accepted its terms: accept them there, then store "
            "your token with `training-backends credentials set huggingface`.",
            kind="auth",
        ) from error
    except (hub.HFValidationError, hub.RepositoryNotFoundError) as error:
        raise TrainerError(
            f"There is no model {name!r}: no directory here, none on the hub. "
            f"Built in: {TINY_MODEL}."
        ) from error
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        return _cached(name) or _refuse_unreachable(name, error)


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if (found / "config.json").is_file() else None


def _refuse_offline(name: str) -> NoReturn:
    raise TrainerError(
        f"The model {name!r} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. "
        f"Built in: {TINY_MODEL}."
    )


def _refuse_unreachable(name: str, error: Exception) -> NoReturn:
    raise TrainerError(
        f"The model {name!r} is not on this machine, and the hub that would have it cannot be "
        f"reached: {hub_failure(error)}",
        kind="provider",
        retryable=True,
    ) from error


def _load_weights(
    name: str,
    directory: Path,
    tuning: Tuning | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    targets: Sequence[ClassifierTarget],
) -> Any:
    # Weights that are trained need full precision; frozen ones need no more than computing.
    trained_fully = tuning is not None and tuning.kind == "full"
    options: dict[str, Any] = {"dtype": torch.float32 if trained_fully else dtype}
    if tuning is not None and tuning.kind == "qlora":
        options |= in_four_bits(device, dtype)
    loader = AutoModelForSequenceClassification if targets else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if targets:
            config.num_labels = sum(len(target.labels) for target in targets)
        model = loader.from_pretrained(directory, config=config, local_files_only=True, **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        kind = "classifier" if targets else "model"
        raise TrainerError(f"{name!r} cannot be loaded as a {kind}: {first_line(error)}") from error
    if is_in_four_bits(model):
        if trained_fully:
            raise TrainerError(
                f"{name!r} is stored in 4 bits, which cannot be trained themselves: take qlora."
            )
        keep_as_loaded(model)
    return model


def prepare_tuning(model: Any, tuning: Tuning, name: str, *, classifies: bool = False) -> Any:
    """Make the weights that `tuning` names trainable; the seed must be set before.

    Args:
        classifies: The model is a classifier; its heads are trained in any case.

    Raises:
        TrainerError: The model has no such modules.
    """
    if tuning.kind == "full":
        return model
    if name == TINY_MODEL:
        raise TrainerError(f"{TINY_MODEL} starts from random weights, so it is tuned fully only.")
    modules = list(tuning.target_modules) if tuning.target_modules else "all-linear"
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha if tuning.alpha is not None else 2 * tuning.rank,
        lora_dropout=tuning.dropout,
        target_modules=modules,
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise TrainerError(f"LoRA cannot be added to {name!r}: {first_line(error)}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_model(model: Any, name: str, directory: Path) -> None:
    """Write a model's weights, or only its adapter's; no path of this machine goes along.

    Args:
        name: The base model as the run names it.
    """
    model.save_pretrained(directory)
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    # peft writes where the base model lies here, and a card that repeats it.
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads(path.read_text(encoding="utf-8"))
    local = Path(name).expanduser()
    config["base_model_name_or_path"] = local.name if local.is_dir() else name
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_result(
    loaded: LoadedModel, name: str, directory: Path, *, wanted: str = "adapter"
) -> ResultRecord:
    """Write the finished model and its tokenizer into an empty directory.

    Args:
        name: The base model as the run names it.
        wanted: What to make of an adapter: `adapter`, `merged` into its base (the model in
            memory then is no adapter any more), or `both`.
    """
    model = loaded.model
    adapter = None
    if isinstance(model, PeftModel) and wanted != "adapter":
        if wanted == "both":
            adapter = directory / "adapter"
            _save_all(model, loaded, name, adapter)
        model = _merge(loaded)
    _save_all(model, loaded, name, directory)
    return ResultRecord(
        path=directory.name,
        format="adapter" if isinstance(model, PeftModel) else "full",
        base_model=name,
        adapter=f"{directory.name}/{adapter.name}" if adapter else None,
    )


def _merge(loaded: LoadedModel) -> Any:
    model = loaded.model
    if is_in_four_bits(model):
        # Four bits would round what was learnt: the base that they were made from is loaded.
        # It stays out of a GPU, which may have no room for it. The hub is not asked for it again,
        # which may have another by now, or not answer.
        here, dtype = torch.device("cpu"), compute_dtype(model)
        base = load_model(
            str(loaded.directory),
            seed=0,
            tuning=None,
            device=here,
            dtype=dtype,
            targets=loaded.targets,
        )
        model = adapt_alike(in_full(base.model, dtype), model)
    return model.merge_and_unload()


def _save_all(model: Any, loaded: LoadedModel, name: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_model(model, name, directory)
    loaded.encoder.save(directory)
    if loaded.targets:
        describe_classifier(loaded.targets, loaded.encoder.pad_id, directory)
