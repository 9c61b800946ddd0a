"""Find, load and save models; a hub that does not answer is said at once."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from training_backends.core.config import TINY_MODEL, Tuning
from training_backends.engine.encoding import Encoder, encoder_for
from training_backends.engine.errors import EngineError
from training_backends.engine.tiny import make_tiny_model
from training_backends.rundir.directory import ResultRecord, RunDir

__all__ = [
    "LoadedModel",
    "choose_device",
    "find_model",
    "load_model",
    "prepare_tuning",
    "save_model",
    "save_result",
]

HUB_TIMEOUT: Final = 5.0
"""Seconds to wait for the hub to say whether it has a model."""

_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.model.v*"]
_UNNEEDED: Final = ["consolidated*", "original/*", "onnx/*"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for tuning or sampling, and its encoder."""

    model: Any
    encoder: Encoder


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        EngineError: A GPU was asked for and there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EngineError("A GPU was asked for (device: cuda), but torch finds none here.")
    return torch.device(wanted)


def load_model(name: str, *, seed: int, tuning: Tuning | None, device: torch.device) -> LoadedModel:
    """Load the model `name`: the built-in one, a directory, or one of the hub.

    Args:
        seed: Makes the weights of the built-in model.
        tuning: Decides the precision; None for sampling only.
        device: Where it will run.

    Raises:
        EngineError: There is no such model, it cannot be fetched, or its chats cannot be
            encoded exactly.
    """
    if name == TINY_MODEL:
        return LoadedModel(make_tiny_model(seed), encoder_for(name, None))
    directory = find_model(name)
    if (directory / "adapter_config.json").is_file():
        return _load_adapter(name, directory, device)
    encoder = encoder_for(name, directory)
    return LoadedModel(_load_weights(name, directory, tuning, device), encoder)


def _load_adapter(name: str, directory: Path, device: torch.device) -> LoadedModel:
    base_name = _base_of(directory)
    base = load_model(base_name, seed=0, tuning=None, device=device)
    try:
        return LoadedModel(PeftModel.from_pretrained(base.model, directory), base.encoder)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"The adapter {name!r} does not fit {base_name!r}: {error}") from error


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
        EngineError: There is no such model, or it cannot be fetched.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not any((local / f).is_file() for f in ("config.json", "adapter_config.json")):
            raise EngineError(f"{local} is no model: it holds no config.json.")
        return local
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise EngineError(f"There is no model directory {local}.")
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
    except EngineError:
        raise
    except hub.GatedRepoError as error:
        raise EngineError(
            f"The hub gives {name!r} only to who accepted its terms: accept them there, then "
            "`hf auth login`.",
            kind="auth",
        ) from error
    except (hub.HFValidationError, hub.RepositoryNotFoundError) as error:
        raise EngineError(
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
    raise EngineError(
        f"The model {name!r} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. "
        f"Built in: {TINY_MODEL}."
    )


def _refuse_unreachable(name: str, error: Exception) -> NoReturn:
    raise EngineError(
        f"The model {name!r} is not on this machine, and the hub that would have it cannot be "
        f"reached: {error}",
        kind="provider",
        retryable=True,
    ) from error


def _load_weights(name: str, directory: Path, tuning: Tuning | None, device: torch.device) -> Any:
    # Weights that are trained need full precision; frozen ones save memory on a GPU.
    trained_fully = tuning is not None and tuning.kind == "full"
    halves = device.type == "cuda" and not trained_fully and torch.cuda.is_bf16_supported()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.bfloat16 if halves else torch.float32,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"The model {name!r} cannot be loaded: {error}") from error


def prepare_tuning(model: Any, tuning: Tuning, name: str) -> Any:
    """Make the weights that `tuning` names trainable; the seed must be set before.

    Raises:
        EngineError: The model has no such modules, or the kind is not offered.
    """
    if tuning.kind == "full":
        return model
    if name == TINY_MODEL:
        raise EngineError(f"{TINY_MODEL} starts from random weights, so it is tuned fully only.")
    if tuning.kind != "lora":
        raise EngineError(f"tuning {tuning.kind!r} is not offered here; take lora or full.")
    modules = list(tuning.target_modules) if tuning.target_modules else "all-linear"
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha if tuning.alpha is not None else 2 * tuning.rank,
        lora_dropout=tuning.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise EngineError(f"LoRA cannot be added to {name!r}: {error}") from error
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


def save_result(model: Any, encoder: Encoder, name: str, directory: Path) -> ResultRecord:
    """Write the finished model and its tokenizer into an empty directory."""
    directory.mkdir(parents=True)
    save_model(model, name, directory)
    encoder.save(directory)
    adapter = isinstance(model, PeftModel)
    return ResultRecord(
        path=directory.name, format="adapter" if adapter else "full", base_model=name
    )
