"""Check a model's files, or the Hub, for problems before a run is queued.

Reads files without torch. Anything uncertain is a warning, or left to the trainer.
"""

import ast
import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import msgspec
from anyio import to_thread

from training_backends.backends.local.interpreter import THIS_INTERPRETER, Interpreter
from training_backends.backends.local.process import Hub
from training_backends.backends.local.settings import LocalOptions
from training_backends.backends.local.spec import has_gpu, resolved_values
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import DataFile, Dataset
from training_backends.core.errors import ConfigError, DatasetError, Issue
from training_backends.datasets.open_file import STDIN, opened
from training_backends.datasets.scan_part import BOM, MAX_LINE_BYTES, lines_up_to
from training_backends.http.urls import is_loopback
from training_backends.rundir.directory import DEQUANTIZED
from training_backends.tokens.encoders import (
    TokenizerError,
    UnusableRow,
    encoder_for,
    has_tokenizer,
)
from training_backends.tokens.examples import ExampleReader
from training_backends.tokens.tokenizers import (
    find_tokenizer,
    has_template,
    hub_failure,
    hub_snapshot,
)

__all__ = [
    "amd_memory",
    "files_issues",
    "find_directory",
    "hub_issues",
    "trainable_types",
    "unusable_severity",
]

_HUB_TIMEOUT: Final = 5.0
"""Seconds; the same as in the trainer."""
_CHECKED_ROWS: Final = 100
"""Rows rendered per file, from its beginning."""
_SMALL_VOCABULARY: Final = 300
"""A byte-level vocabulary, such as that of `tiny-mistral`, encodes any text."""
_MOST_HEADER: Final = 100_000_000
"""Bytes; the limit of the safetensors format."""
_GIB: Final = 2**30
_BYTES_FULL: Final = 16
"""Bytes per weight in full fine-tuning: weight, gradient and AdamW's two moments in float32."""
_BYTES_QUANTIZED: Final = 0.6
"""Bytes per weight of a 4-bit base model, including quantization constants."""
_QUANTIZERS: Final[Mapping[object, str]] = MappingProxyType(
    {
        "aqlm": "aqlm",
        "awq": "gptqmodel",
        "compressed-tensors": "compressed_tensors",
        "eetq": "eetq",
        "gptq": "gptqmodel",
        "hqq": "hqq",
        "quark": "quark",
        "torchao": "torchao",
    }
)
"""Packages with which transformers loads quantized models."""
_DRM: Final = Path("/sys/class/drm")
_LEAST_VRAM: Final = 4 * _GIB
"""Less is what a processor with graphics reserves, which does not limit what it can use."""
_SMI: Final = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def find_directory(model: str) -> Path | None:
    """Return the local directory of a model's files, including the Hub cache."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    found = hub_snapshot(model) if model.count("/") == 1 else None
    return found if found and (found / "config.json").is_file() else None


# The hub


class _Found(NamedTuple):
    """What the Hub reports about a model; None if it does not."""

    model_type: str | None
    weights: int | None
    quantization: object = None


async def hub_issues(
    config: TrainingConfig, hub: Hub, interpreter: Interpreter | None = THIS_INTERPRETER
) -> list[Issue]:
    """Look up a model on the Hub; if the Hub cannot be asked, return a warning.

    Args:
        interpreter: See `files_issues`.
    """
    try:
        child_env = await hub.child_environment(config.base_model)
    except ConfigError as error:
        return [Issue(code="hub_not_asked", message=error.message, field="model", fix=error.hint)]
    if child_env.is_offline:
        message = (
            f"{config.base_model!r} is not on this machine, and offline mode is set "
            "(`local.offline` or HF_HUB_OFFLINE)"
        )
        fix = "download it first"
        return [Issue(code="model_not_here", message=message, field="model", fix=fix)]
    token = child_env.token.get_secret_value() if child_env.token else None
    endpoint = child_env.variables.get("HF_ENDPOINT")
    found = await to_thread.run_sync(_ask, config.base_model, endpoint, token)
    if isinstance(found, Issue):
        return [found]
    if interpreter is None:
        return []
    issues = [
        *_architecture_issues(config, found.model_type, None, interpreter),
        *_quantization_issues(config, found.quantization, interpreter),
    ]
    if found.weights and _has_countable_weights(found.quantization):
        issues += await to_thread.run_sync(lambda: [*_memory_issues(config, found.weights or 0)])
    return issues


def _ask(model: str, endpoint: str | None, token: str | None) -> _Found | Issue:
    try:
        from huggingface_hub import HfApi, errors  # noqa: PLC0415
    except ImportError:
        return _not_asked(model, "huggingface_hub is not installed")
    # Without a stored token, huggingface_hub uses its own login, as it does in the trainer; but
    # never over plain HTTP.
    is_private = endpoint is None or endpoint.startswith("https:") or is_loopback(endpoint)
    api = HfApi(endpoint=endpoint, token=token or (None if is_private else False))
    try:
        info = api.model_info(model, timeout=_HUB_TIMEOUT)
        if getattr(info, "gated", False):
            api.auth_check(model)
    except errors.GatedRepoError:
        return Issue(
            code="gated_model",
            message=f"{model!r} is a gated model",
            field="model",
            fix="accept its license on the Hub, then store a token with "
            "`training-backends credentials set huggingface`",
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return Issue(
            code="unknown_model",
            message=f"model {model!r} not found: neither a local directory nor a model on the Hub",
            field="model",
            fix="check the name; for a private model, store a token with "
            "`training-backends credentials set huggingface`",
        )
    except Exception as error:  # the Hub client lets HTTP library errors through
        return _not_asked(model, hub_failure(error))
    described: Mapping[str, Any] = info.config or {}
    model_type = described.get("model_type")
    weights = getattr(info.safetensors, "total", None)
    model_type = model_type if isinstance(model_type, str) else None
    return _Found(model_type, weights, described.get("quantization_config"))


def _not_asked(model: str, why: str) -> Issue:
    return Issue(
        code="hub_not_asked",
        message=f"{model!r} is not on this machine, and could not be looked up on the Hub: {why}",
        field="model",
        fix="if it is not on the Hub, the run will fail when it starts",
        severity="warning",
    )


# The model's files


def files_issues(
    config: TrainingConfig,
    dataset: Dataset,
    directory: Path,
    interpreter: Interpreter | None = THIS_INTERPRETER,
) -> Iterator[Issue]:
    """Yield problems in a model's files; blocks while it reads them and some rows.

    Args:
        interpreter: Python environment that trains; None: one that is not on this machine.
    """
    described = _read_object(directory / "config.json")
    if isinstance(described, str):
        yield _model_issue("model_files", f"config.json {described}")
        return
    model_type = described.get("model_type")
    if described.get("is_encoder_decoder"):
        yield _model_issue(
            "unsupported_architecture",
            f"model type {model_type!r} is not supported: it is an encoder-decoder model",
            "use another model",
        )
        return
    if interpreter is not None:
        architectures = described.get("architectures")
        yield from _architecture_issues(config, model_type, architectures, interpreter)
        yield from _quantization_issues(config, described.get("quantization_config"), interpreter)
    is_cached = directory != Path(config.base_model).expanduser()
    weights = _count_weights(directory, described)
    if isinstance(weights, str):
        if not is_cached:  # the trainer downloads missing files
            yield _model_issue("model_files", weights)
    elif weights and interpreter and _has_countable_weights(described.get("quantization_config")):
        yield from _memory_issues(config, weights)
    if config.method != "classifier" and not _encodes_bytes(described):
        yield from _row_issues(config, dataset, directory)


def unusable_severity(
    config: TrainingConfig, issues: Sequence[Issue]
) -> Literal["error", "warning"] | None:
    """Return the severity of rows without a token count; None if those are not significant."""
    directory = find_directory(config.base_model)
    described = _read_object(directory / "config.json") if directory else ""
    known = any(issue.code == "unusable_row" for issue in issues)
    if known or config.method == "classifier" or isinstance(described, str):
        return None
    return None if _encodes_bytes(described) else _severity(config)


def _severity(config: TrainingConfig) -> Literal["error", "warning"]:
    tolerated = LocalOptions.model_validate(config.options).max_invalid_fraction
    return "warning" if tolerated else "error"


def _encodes_bytes(described: Mapping[str, Any]) -> bool:
    size = {**described, **(described.get("text_config") or {})}.get("vocab_size")
    return isinstance(size, int) and size < _SMALL_VOCABULARY


def _model_issue(code: str, message: str, fix: str | None = None) -> Issue:
    return Issue(code=code, message=message, field="model", fix=fix)


def _read_object(path: Path) -> dict[str, Any] | str:
    """Read a JSON object, or return why that failed."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return "is not valid JSON"
    return found if isinstance(found, dict) else "is not a JSON object"


def _architecture_issues(
    config: TrainingConfig, model_type: object, architectures: object, interpreter: Interpreter
) -> Iterator[Issue]:
    classifies = config.method == "classifier"
    package = interpreter.transformers()
    known = trainable_types(package, classifies=classifies) if package else None
    if not isinstance(model_type, str) or known is None or model_type in known:
        return
    named = f" ({architectures[0]})" if isinstance(architectures, list) and architectures else ""
    kind = "sequence classifier" if classifies else "language model"
    yield _model_issue(
        "unsupported_architecture",
        f"model type {model_type!r}{named} is not supported: the installed version of "
        f"transformers has no {kind} for it",
        "use another model, or a version of transformers that supports it",
    )


@lru_cache
def trainable_types(package: Path, *, classifies: bool) -> frozenset[str] | None:
    """Return the `model_type`s that transformers can load; None if unknown.

    Its tables are parsed as text, because importing them loads torch.

    Args:
        package: Directory of the transformers package.
    """
    auto = package / "models" / "auto"
    tasks = ("SEQUENCE_CLASSIFICATION",) if classifies else ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
    heads: dict[str, str] = {}
    for task in tasks:
        heads |= _table(auto / "modeling_auto.py", f"MODEL_FOR_{task}_MAPPING_NAMES")
    configs = _table(auto / "auto_mappings.py", "CONFIG_MAPPING_NAMES")
    configs |= _table(auto / "configuration_auto.py", "CONFIG_MAPPING_NAMES")
    if not heads or not configs:
        return None
    # Types that share a configuration class are interchangeable.
    classes = {configs[name] for name in heads.keys() & configs.keys()}
    return frozenset(heads) | {name for name, each in configs.items() if each in classes}


def _table(path: Path, name: str) -> dict[str, str]:
    """Return the string pairs in the literal that a module assigns to a name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    for statement in tree.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(statement, ast.Assign) or not isinstance(target, ast.Name):
            continue
        if target.id == name:
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                    key, value = (getattr(each, "value", None) for each in node.elts)
                    if isinstance(key, str):
                        found[key] = value if isinstance(value, str) else ""
    return found


def _quantization_issues(
    config: TrainingConfig, described: object, interpreter: Interpreter
) -> Iterator[Issue]:
    if not isinstance(described, dict):
        return
    method = described.get("quant_method", "bitsandbytes")
    kind = config.tuning.kind if config.tuning else None
    package = _QUANTIZERS.get(method)
    if method in DEQUANTIZED:
        if kind == "qlora":
            yield _model_issue(
                "quantized_model",
                f"the model is quantized ({method}), so it cannot be quantized to 4 bits",
                "use tuning: lora, which dequantizes it to bfloat16, or the unquantized model",
            )
    elif kind == "full":
        yield _model_issue(
            "quantized_model",
            f"the model is quantized ({method}), which full fine-tuning does not support",
            "use tuning: qlora or lora, or the unquantized model",
        )
    elif method == "bitsandbytes" and not interpreter.has("bitsandbytes"):
        yield _model_issue(
            "quantized_model",
            "the model is quantized, and bitsandbytes is not installed",
            "pip install 'training-backends[qlora]'",
        )
    elif package and interpreter.is_this and not interpreter.has(package):
        yield _model_issue(
            "quantized_model",
            f"the model is quantized with {method}, which requires the package {package}",
            "use the unquantized model, or one quantized with fp8, mxfp4 or bitsandbytes",
        )
    elif method != "bitsandbytes":
        yield Issue(
            code="quantized_model",
            message=f"the model is quantized with {method}, which requires that method's package "
            "and may not be trainable",
            field="model",
            fix="use the unquantized model",
            severity="warning",
        )


def _has_countable_weights(quantization: object) -> bool:
    """Return whether each stored value is a weight; with most methods it holds several."""
    return not isinstance(quantization, dict) or quantization.get("quant_method") == "fp8"


# Weights and memory


def _count_weights(directory: Path, described: Mapping[str, Any]) -> int | str | None:
    """Count the weights from the files' headers, or return what is wrong with them."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = _read_object(index)
        names = listed if isinstance(listed, str) else listed.get("weight_map")
        if not isinstance(names, dict):
            return f"{index.name} {names}" if isinstance(names, str) else f"{index.name} is damaged"
        files = sorted({directory / str(name) for name in names.values()})
    elif (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    elif any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin")):
        return _described_weights(described)
    else:
        return "the directory has no weights (*.safetensors)"
    total = 0
    for path in files:
        found = _read_header(path)
        if isinstance(found, str):
            return f"{path.name} {found}"
        total += found
    return total


def _read_header(path: Path) -> int | str:
    """Count the weights in a safetensors header, or return what is wrong with it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                return "is damaged: it has no safetensors header"
            header = json.loads(file.read(length))
        tensors = [each for name, each in header.items() if name != "__metadata__"]
        end = max((each["data_offsets"][1] for each in tensors), default=0)
        weights = sum(math.prod(each["shape"]) for each in tensors)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return "is damaged: its header cannot be read"
    if 8 + length + end != size:
        return f"is damaged: it has {size:,} bytes, expected {8 + length + end:,}"
    return int(weights)


def _described_weights(described: Mapping[str, Any]) -> int | None:
    """Count a plain transformer's weights from its configuration; None if it is not one."""
    described = {**described, **(described.get("text_config") or {})}
    try:
        width, layers = int(described["hidden_size"]), int(described["num_hidden_layers"])
        heads = int(described["num_attention_heads"])
        shared = int(described.get("num_key_value_heads") or heads)
        inner, words = int(described["intermediate_size"]), int(described["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None
    head = int(described.get("head_dim") or width // max(1, heads))
    tables = 1 if described.get("tie_word_embeddings") else 2
    attention = 2 * width * head * (heads + shared)
    return tables * words * width + layers * (attention + 3 * width * inner)


def _memory_issues(config: TrainingConfig, weights: int) -> Iterator[Issue]:
    options = LocalOptions.model_validate(config.options)
    gpus = [] if options.device == "cpu" else _gpu_memory()
    if not gpus and options.device != "cpu" and has_gpu():
        return  # a GPU of unknown memory
    available = max(gpus) if gpus else _machine_memory()
    if available is None:
        return
    kind = config.tuning.kind if config.tuning else "lora"
    where = "the GPU has" if gpus else "this machine has"
    if gpus and options.num_processes > 1 and options.sharding != "zero2" and kind != "qlora":
        available *= options.num_processes  # zero3 divides the weights
        where = f"{options.num_processes} GPUs have"
    halves = options.dtype == "bfloat16" or (bool(gpus) and options.dtype == "auto")
    if kind == "full":
        least, needed = 4.0 * weights, float(_BYTES_FULL * weights)
    elif kind == "qlora":
        least = needed = _BYTES_QUANTIZED * weights
    else:
        least = needed = (2.0 if halves else 4.0) * weights
    if needed <= available:
        return
    fixes = {"full": "lora or qlora", "lora": "qlora"}
    other = f"use tuning: {fixes[kind]}, or a smaller model" if kind in fixes else ""
    beside = "" if kind == "full" else ", plus activations"
    yield Issue(
        code="memory",
        message=f"{weights / 1e9:.1f} billion weights take {least / _GIB:.1f} GiB, and training "
        f"({kind}) takes at least {needed / _GIB:.1f} GiB{beside}; {where} "
        f"{available / _GIB:.1f} GiB",
        field="model",
        fix=other or "use a smaller model",
        severity="error" if least > available else "warning",
    )


def _machine_memory() -> int | None:
    """Return the memory of this machine or container, in bytes."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" means no limit
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
            found.append(int(text))
    return min(found, default=None)


@lru_cache(maxsize=1)
def _gpu_memory() -> tuple[int, ...]:
    """Return the memory of each GPU, in bytes; () if there is none or it is unknown."""
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
        lines = done.stdout.split() if done.returncode == 0 else []
        return tuple(int(line) * 2**20 for line in lines)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return amd_memory(_DRM)


def amd_memory(drm: Path) -> tuple[int, ...]:
    """Return the memory of each AMD GPU, as the kernel's driver reports it, in bytes."""
    found = []
    for path in sorted(drm.glob("card*/device/mem_info_vram_total")):
        with suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")))
    return tuple(size for size in found if size >= _LEAST_VRAM)


# Tokenizer and rows


def _row_issues(config: TrainingConfig, dataset: Dataset, directory: Path) -> Iterator[Issue]:
    """Encode the first rows of each file as the trainer does, without torch."""
    is_cached = directory != Path(config.base_model).expanduser()
    if not has_tokenizer(directory):
        if not is_cached:  # the trainer downloads missing files
            yield _model_issue("model_files", f"no tokenizer found in {directory}")
        return
    files = [file for file in dataset.files if file.sample_type in {"instruct", "preference"}]
    template = config.chat_template.read() if config.chat_template else None
    is_mistral = find_tokenizer(str(directory)).kind != "template"
    if files and not (is_mistral or template or has_template(directory)):
        yield _model_issue(
            "no_chat_template",
            "the tokenizer has no chat template, which conversations require",
            "use the instruct version of the model, set chat_template, or use rows with `text`",
        )
        return
    try:
        encoder = encoder_for(config.base_model, directory, chat_template=template)
    except TokenizerError as error:
        if not isinstance(error.__cause__, ImportError):
            field = "model" if template is None else "chat_template"
            yield Issue(code="model_files", message=str(error), field=field)
        return
    reader = ExampleReader(encoder, int(resolved_values(config)["seq_len"]))
    for file in files:
        if found := _first_unusable(reader, file):
            line, reason = found
            yield Issue(
                code="unusable_row",
                message=f"not supported by the model: {reason}",
                path=str(file.path),
                line=line,
                fix="change or remove the row, or use another model",
                severity=_severity(config),
            )


def _first_unusable(reader: ExampleReader, file: DataFile) -> tuple[int, str] | None:
    """Return the first checked row that the trainer will reject, and why."""
    for number, line in _first_lines(file):
        # Invalid rows were reported by the inspection.
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            try:
                if file.sample_type == "preference":
                    reader.pair(line)
                else:
                    reader.supervised(line, "")
            except (TokenizerError, UnusableRow) as error:
                return number, str(error)
    return None


def _first_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    if file.path == STDIN:
        return  # cannot be read twice
    read = 0
    with suppress(DatasetError, OSError), opened(file.path) as source:
        for number, line in enumerate(lines_up_to(source.lines, MAX_LINE_BYTES), 1):
            content = line.removeprefix(BOM) if number == 1 else line
            if not content.strip():
                continue
            yield number, content
            read += 1
            if read == _CHECKED_ROWS:
                return
