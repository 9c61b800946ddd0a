"""Ask a model one question, in a process of its own."""

import json
import subprocess
import sys

import anyio
import anyio.to_thread

from training_backends.backends.local.process import child_environment
from training_backends.core.errors import BackendUnavailable

__all__ = ["sample_answer"]


async def sample_answer(model: str, prompt: str, *, seed: int = 0, max_tokens: int = 64) -> str:
    """Return what a model answers to `prompt`, always choosing the likeliest token.

    Args:
        model: `tiny-mistral`, a directory, or a model of the hub.
        seed: Makes the weights of an untrained `tiny-mistral`.

    Raises:
        BackendUnavailable: The model cannot be loaded; the message is the engine's.
    """
    command = [sys.executable, "-m", "training_backends.engine", "sample", model]
    options = ["--prompt", prompt, "--seed", str(seed), "--max-tokens", str(max_tokens)]
    done = await anyio.run_process(
        [*command, *options],
        check=False,
        stderr=subprocess.PIPE,
        env=await anyio.to_thread.run_sync(child_environment, model),
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise BackendUnavailable(f"The model {model} cannot be asked: {said}", backend="local")
    answer = json.loads(done.stdout)["answer"]
    return str(answer)
