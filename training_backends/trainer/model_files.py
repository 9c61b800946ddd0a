"""Find the files of a model, without torch; fail fast if the Hub does not respond."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from training_backends.core.config import TINY_MODEL, ClassifierTarget
from training_backends.rundir.directory import ADAPTER_CONFIG, adapter_base
from training_backends.tokens.encoders import has_tokenizer
from training_backends.tokens.tokenizers import hub_failure
from training_backends.trainer.errors import TrainerError

__all__ = [
    "CLASSIFIER_FILE",
    "base_model_of",
    "fetch_model",
    "find_model",
    "find_tokenizer_of",
    "read_targets",
    "resolve_targets",
]

HUB_TIMEOUT: Final = 5.0
"""Seconds to wait for the Hub to confirm that it has a model."""

_FILES: Final = [
    *("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.model.v*"),
    "README.md",  # names the license
]
_DESCRIPTIONS: Final = ("config.json", ADAPTER_CONFIG)
_UNNEEDED: Final = ["consolidated*", "original/*", "onnx/*"]
CLASSIFIER_FILE: Final = "classifier.json"
"""Stored with the weights: `targets` as in the configuration, in output order."""


def find_model(name: str) -> Path:
    """Return the directory of a model, downloaded from the Hub if necessary.

    Raises:
        TrainerError: The model does not exist or cannot be fetched.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not any((local / f).is_file() for f in _DESCRIPTIONS):
            raise TrainerError(f"{local} is not a model directory: it has no config.json.")
        return local
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise TrainerError(f"Model directory not found: {local}.")
    return _fetched.get(name) or _from_hub(name)


_fetched: dict[str, Path] = {}
"""Models from the Hub that `fetch_model` found."""


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub import errors as hub  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    try:
        if HF_HUB_OFFLINE:
            return _cached(name) or _raise_offline(name)
        # Asked first, and once: snapshot_download retries for half a minute.
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_UNNEEDED))
    except TrainerError:
        raise
    except hub.GatedRepoError as error:
        raise TrainerError(
            f"{name!r} is a gated model. Accept its license on the Hub, then store a token with "
            "`training-backends credentials set huggingface`.",
            kind="auth",
        ) from error
    except (hub.HFValidationError, hub.RepositoryNotFoundError) as error:
        raise TrainerError(
            f"Model {name!r} not found: neither a local directory nor a model on the Hub. "
            f"Built-in model: {TINY_MODEL}."
        ) from error
    except Exception as error:  # the Hub client lets HTTP library errors through
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        return _cached(name) or _raise_unreachable(name, error)


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if any((found / each).is_file() for each in _DESCRIPTIONS) else None


def _raise_offline(name: str) -> NoReturn:
    raise TrainerError(
        f"The model {name!r} is not on this machine, and HF_HUB_OFFLINE is set. "
        f"Built-in model: {TINY_MODEL}."
    )


def _raise_unreachable(name: str, error: Exception) -> NoReturn:
    raise TrainerError(
        f"The model {name!r} is not on this machine, and the Hub cannot be reached: "
        f"{hub_failure(error)}",
        kind="provider",
        retryable=True,
    ) from error


def base_model_of(name: str, directory: Path) -> str:
    """Return the base model of the adapter in `directory`.

    Args:
        name: The adapter as named in the run.

    Raises:
        TrainerError: The adapter names none, or it is not on this machine.
    """
    try:
        base = adapter_base(directory)
    except ValueError as error:
        raise TrainerError(f"The adapter {name!r} cannot be read: {error}.") from error
    if "/" not in base and base != TINY_MODEL and not Path(base).is_dir():
        raise TrainerError(
            f"The base model {base!r} of the adapter {name!r} not found: an adapter that was "
            "copied from its run does not know where its base model is. Set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    return base


def fetch_model(name: str) -> None:
    """Download a model, and an adapter's base model, if necessary.

    From then on `find_model` returns what was found: the Hub may have another revision later.

    Raises:
        TrainerError: A model does not exist or cannot be fetched.
    """
    _fetched.pop(name, None)
    if name == TINY_MODEL:
        return
    directory = find_model(name)
    if not Path(name).expanduser().is_dir():
        _fetched[name] = directory
    if (directory / ADAPTER_CONFIG).is_file():
        fetch_model(base_model_of(name, directory))


def find_tokenizer_of(name: str, *, has_template: bool) -> tuple[str, Path | None]:
    """Return the model whose tokenizer encodes rows for a model, and its directory.

    That of an adapter may be its own, with a chat template of its own. The built-in model has no
    directory.

    Args:
        has_template: The run has a chat template, which is used with the base model's tokenizer.

    Raises:
        TrainerError: The model does not exist or cannot be fetched.
    """
    if name == TINY_MODEL:
        return name, None
    directory = find_model(name)
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    if is_adapter and (has_template or not has_tokenizer(directory)):
        return find_tokenizer_of(base_model_of(name, directory), has_template=has_template)
    return name, directory


def read_targets(directory: Path) -> tuple[ClassifierTarget, ...]:
    """Return the targets of the model in `directory`; empty if it is not a classifier.

    Raises:
        TrainerError: classifier.json cannot be read.
    """
    path = directory / CLASSIFIER_FILE
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["targets"]
        return tuple(ClassifierTarget.model_validate(target) for target in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} cannot be read: {error}") from error


def resolve_targets(
    name: str, directory: Path, requested: Sequence[ClassifierTarget], *, trains: bool
) -> Sequence[ClassifierTarget]:
    """Return a model's targets, checked against the requested ones if it is trained.

    Raises:
        TrainerError: It is a classifier with other targets.
    """
    existing = read_targets(directory)
    if not trains or not existing:
        return requested or existing
    if [(t.name, t.labels) for t in existing] != [(t.name, t.labels) for t in requested]:
        raise TrainerError(
            f"{name!r} is a classifier with the targets {', '.join(t.name for t in existing)}; "
            "it can only be trained further with the same targets and labels."
        )
    return requested
