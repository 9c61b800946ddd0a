"""Map models to tokenizers, and find their files on this machine.

Nothing is downloaded: without a local tokenizer there is no count.
"""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha1, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.files import digest_of
from training_backends.tokens.counts import Uncountable
from training_backends.tokens.images import ImageConfig
from training_backends.tokens.text_counters import shipped, tekken_facts

__all__ = [
    "SHIPPED",
    "Tokenizer",
    "TokenizerSettings",
    "find_tokenizer",
    "has_template",
    "hub_failure",
    "hub_snapshot",
    "mistral_file",
    "tokenizer_of",
]

Json = dict[str, Any]
Kind = Literal["bytes", "tekken", "sentencepiece", "tiktoken", "template"]

SHIPPED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "v1": "tokenizer.model.v1",
        "v2": "mistral_instruct_tokenizer_240216.model.v2",
        "v3": "mistral_instruct_tokenizer_240323.model.v3",
        "v7": "mistral_instruct_tokenizer_241114.model.v7",
        "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
        "v3-tekken": "tekken_240718.json",
        "v3-tekken-m1": "tekken_240911.json",
    }
)
"""Tokenizer files in the wheel of mistral-common 1.13, by the names used here."""

_COMMON: Final[Mapping[str, str]] = MappingProxyType(
    {
        "codestral-2405": "v3",
        "codestral-mamba-2407": "v3",
        "ministral-8b-2410": "v3-tekken",
        "mistral-large-2402": "v2",
        "mistral-large-2407": "v3",
        "mistral-large-2411": "v7",
        "mistral-medium-2312": "v1",
        "mistral-small-2312": "v2",
        "mistral-small-2402": "v2",
        "mistral-tiny-2312": "v2",
        "mistral-tiny-2407": "v3",
        "open-mistral-nemo-2407": "v3-tekken",
        "open-mixtral-8x22b-2404": "v3",
        "pixtral-12b-2409": "v3-tekken-m1",
        "pixtral-large-2411": "v7m1",
    }
)
"""Hosted models: `MODEL_NAME_TO_TOKENIZER_CLS` of mistral-common 1.13.1."""

_HOSTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ministral-3b-2410": "v3-tekken",
        "ministral-3b-latest": "v3-tekken",
        "ministral-8b-latest": "v3-tekken",
        "open-mistral-7b": "v3",
        "open-mistral-nemo": "v3-tekken",
    }
)
"""Aliases of the hosted models: docs.mistral.ai, guides/tokenization (2025-03)."""

_WEIGHTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mistralai/Codestral-22B-v0.1": "v3",
        "mistralai/Mamba-Codestral-7B-v0.1": "v3",
        "mistralai/Mathstral-7B-v0.1": "v3",
        "mistralai/Ministral-8B-Instruct-2410": "v3-tekken",
        "mistralai/Mistral-7B-Instruct-v0.1": "v1",
        "mistralai/Mistral-7B-Instruct-v0.2": "v1",
        "mistralai/Mistral-7B-Instruct-v0.3": "v3",
        "mistralai/Mistral-7B-v0.1": "v1",
        "mistralai/Mistral-7B-v0.3": "v3",
        "mistralai/Mistral-Large-Instruct-2407": "v3",
        "mistralai/Mistral-Large-Instruct-2411": "v7",
        "mistralai/Mistral-Nemo-Base-2407": "v3-tekken",
        "mistralai/Mistral-Nemo-Instruct-2407": "v3-tekken",
        "mistralai/Mixtral-8x22B-Instruct-v0.1": "v3",
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "v1",
        "mistralai/Mixtral-8x7B-v0.1": "v1",
        "mistralai/Pixtral-12B-2409": "v3-tekken-m1",
        "mistralai/Pixtral-Large-Instruct-2411": "v7m1",
    }
)
"""Open weights: docs.mistral.ai, cookbook/concept-deep-dive-tokenization-templates (2025)."""

_TABLE: Final = {**_COMMON, **_HOSTED, **_WEIGHTS}

_AMBIGUOUS: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(
        (
            "codestral-latest",
            "mistral-large-latest",
            "mistral-medium-latest",
            "mistral-small-latest",
            "pixtral-large-latest",
        ),
        "has referred to models with different tokenizers; use a dated model name",
    )
    # mistral-common 1.13.1 says tekken, the cookbook sentencepiece v3.
    | {"mistral-small-2409": "has two tokenizers according to Mistral's own sources"}
)

_FIRST_IMAGES: Final = ImageConfig(16, 1024)
"""Image settings of "m1" in file names: `MultiModalVersion` of mistral-common 1.13."""

_CONNECTION_ERRORS: Final = frozenset({"ConnectError", "ConnectTimeout", "ReadTimeout"})
"""Exceptions of httpx, by name, because only `http` imports it."""

_OPENAI_ENCODINGS: Final = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer on this machine.

    Attributes:
        version: Mistral's tokenizer version, which determines the layout of conversations.
        path: The tokenizer file or the model directory.
        images: Image settings; None without image support.
        chat_template: Jinja template that replaces the one in the directory.
    """

    name: str
    kind: Kind
    version: str = ""
    path: Path | None = None
    images: ImageConfig | None = None
    chat_template: str | None = None

    def fingerprint(self) -> str:
        """Return a digest of everything that affects counts: files and package versions."""
        parts = [self.kind, self.version, self.name if self.path is None else ""]
        # v7 and v7m1 have the same content and differ only in this.
        parts += [str(self.images), str(self.chat_template)]
        paths = [self.path] if self.path else []
        if self.path and self.path.is_dir():
            suffixes = (".jinja", ".json", ".model", ".txt")
            paths = sorted(each for each in self.path.iterdir() if each.suffix in suffixes)
        parts += [digest_of(path).sha256 for path in paths]
        for package in _packages(self.kind):
            with suppress(PackageNotFoundError):
                parts.append(f"{package} {version(package)}")
        return sha256("\n".join(parts).encode()).hexdigest()


def _packages(kind: Kind) -> tuple[str, ...]:
    if kind in ("tekken", "sentencepiece"):
        return ("mistral-common",)
    return {"template": ("jinja2", "tokenizers"), "tiktoken": ("tiktoken",)}.get(kind, ())


def tokenizer_of(model: str) -> str | None:
    """Return the name of the tokenizer of `model`, or None if it is unknown.

    The tokenizer itself may not be available on this machine.
    """
    if model == TINY_MODEL:
        return "bytes"
    if name := _TABLE.get(_base_of(model)):
        return name
    if name := _openai_encoding(_base_of(model)):
        return name
    directory = Path(model).expanduser()
    return directory.name if directory.is_dir() else None


def _base_of(model: str) -> str:
    """Return the base model of a hosted fine-tuned model, "ft:BASE:…"."""
    return model.split(":")[1] if model.startswith("ft:") and model.count(":") > 1 else model


def find_tokenizer(model: str, *, chat_template: str | None = None) -> Tokenizer:
    """Return the tokenizer of a model.

    Args:
        chat_template: Jinja template that replaces the one in its directory.

    Raises:
        Uncountable: The tokenizer is unknown or not on this machine.
    """
    found = _find(model)
    return replace(found, chat_template=chat_template) if found.kind == "template" else found


def _find(model: str) -> Tokenizer:
    if model == TINY_MODEL:
        return Tokenizer("bytes", "bytes")
    base = _base_of(model)
    if name := _TABLE.get(base):
        return mistral_file(shipped(SHIPPED[name]), name)
    if base in _AMBIGUOUS:
        raise Uncountable(f"{base!r} {_AMBIGUOUS[base]}")
    directory = Path(model).expanduser()
    if directory.is_dir():
        return _in_directory(directory)
    if name := _openai_encoding(base):
        return _openai(name)
    if model.count("/") == 1 and (cached := hub_snapshot(model)):
        return _in_directory(cached, model)
    raise Uncountable(f"no tokenizer is known for {model!r}")


def mistral_file(path: Path, name: str | None = None) -> Tokenizer:
    """Return the tokenizer of a Mistral file: tekken.json or tokenizer.model.v3."""
    if path.suffix == ".json":
        found, images = tekken_facts(path)
        return Tokenizer(name or path.name, "tekken", found, path, images)
    ending = path.name.rpartition(".")[2]  # "v3", or "v7m1" with image support
    found, _, reads = ("v1", "", "") if ending == "model" else ending.partition("m")
    images = _FIRST_IMAGES if reads else None
    return Tokenizer(name or path.name, "sentencepiece", found, path, images)


def _in_directory(directory: Path, name: str | None = None) -> Tokenizer:
    # The same order as in the trainer.
    named = [directory / "tekken.json", *sorted(directory.glob("tokenizer.model.v*"))]
    if found := next((path for path in named if path.is_file()), None):
        return mistral_file(found, name)
    if any((directory / each).is_file() for each in ("tokenizer.json", "tokenizer_config.json")):
        return Tokenizer(name or directory.name, "template", path=directory)
    raise Uncountable(f"no tokenizer found in {directory}")


def hub_failure(error: Exception) -> str:
    """Return a one-line reason why the Hugging Face Hub could not be reached.

    Only connection errors are quoted. Others may contain input, such as a proxy URL with its
    password.
    """
    name = type(error).__name__
    if not isinstance(error, OSError) and name not in _CONNECTION_ERRORS:
        return name
    return str(error).strip().partition("\n")[0][:300] or name


def hub_snapshot(model: str) -> Path | None:
    """Return the local cache directory of a Hub model, or None."""
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import (  # noqa: PLC0415
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        return None
    with suppress(LocalEntryNotFoundError, HFValidationError):
        return Path(snapshot_download(model, local_files_only=True))
    return None


def _openai_encoding(model: str) -> str | None:
    try:
        from tiktoken.model import encoding_name_for_model  # noqa: PLC0415
    except ImportError:
        return None
    with suppress(KeyError):
        return encoding_name_for_model(model)
    return None


def _openai(name: str) -> Tokenizer:
    """Return an encoding that tiktoken has cached; tiktoken itself would download it."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    # The encoding of the gpt-oss models has the vocabulary of o200k_base.
    url = _OPENAI_ENCODINGS.format("o200k_base" if name == "o200k_harmony" else name)
    path = cache / sha1(url.encode(), usedforsecurity=False).hexdigest()
    if not path.is_file():
        fetch = f"python -c 'import tiktoken; tiktoken.get_encoding(\"{name}\")'"
        raise Uncountable(
            f"the encoding {name} is not cached on this machine; download it once: {fetch}"
        )
    return Tokenizer(name, "tiktoken", path=path)


class TokenizerSettings(NamedTuple):
    """What the files of a tokenizer say about its control tokens and chat templates.

    Attributes:
        named: Control tokens by name, such as `eos_token`.
        special: All control tokens.
        templates: Chat templates by name; the one of a model with only one is `default`.
        declared: Tokens that tokenizer_config.json adds to those in tokenizer.json.
    """

    named: Mapping[str, str]
    special: frozenset[str]
    templates: Mapping[str, str]
    declared: frozenset[str]

    @classmethod
    def read(cls, directory: Path) -> "TokenizerSettings":
        """Read the files of a model directory; those that are missing or invalid are skipped."""
        settings = _object(directory / "tokenizer_config.json")
        older = _object(directory / "special_tokens_map.json")
        named = {
            key: text
            for key, value in {**older, **settings}.items()
            if key.endswith("_token") and (text := _token_text(value))
        }
        listed = _object(directory / "tokenizer.json", _Added).get("added_tokens") or []
        decoder = settings.get("added_tokens_decoder")
        declared = [*decoder.values()] if isinstance(decoder, dict) else []
        special = {
            _token_text(token)
            for token in [*listed, *declared]
            if isinstance(token, dict) and token.get("special")
        }
        known = {_token_text(token) for token in listed}
        return cls(
            named,
            frozenset({*named.values(), *special} - {""}),
            _templates(directory, settings),
            frozenset({*map(_token_text, declared), *named.values()} - known - {""}),
        )


class _Added(msgspec.Struct):
    """The added tokens of tokenizer.json, which has up to a million others."""

    added_tokens: list[Json] = []


def _object(path: Path, kind: type = dict) -> Json:
    try:
        found: Any = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError):
        return {}
    return msgspec.structs.asdict(found) if isinstance(found, msgspec.Struct) else found


def _token_text(value: object) -> str:
    """Return the text of a token, which may be an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _templates(directory: Path, settings: Json) -> dict[str, str]:
    """Read the chat templates; files take precedence, as in transformers."""
    found: dict[str, str] = {}
    given = settings.get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        found |= {each["name"]: each["template"] for each in given if isinstance(each, dict)}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    file = directory / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    return found


def has_template(directory: Path) -> bool:
    """Return whether a model directory has a chat template."""
    return bool(_templates(directory, _object(directory / "tokenizer_config.json")))
