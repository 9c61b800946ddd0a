"""Ask a model one question, in a process of its own."""

import sys

import anyio

from training_backends.backends.local.hub import Handed, Hub
from training_backends.core.errors import BackendUnavailable
from training_backends.core.run import Reply

__all__ = ["ask_model", "sample_answer"]


async def ask_model(
    model: str, prompt: str, *, seed: int = 0, max_tokens: int = 64, handed: Handed | None = None
) -> Reply:
    """Return what a model says to `prompt`, always choosing the likeliest token.

    Args:
        model: `tiny-mistral`, a directory, or a model of the hub.
        seed: Makes the weights of an untrained `tiny-mistral`.
        handed: What it takes to fetch the model; default what the environment gives.

    Raises:
        BackendUnavailable: The model cannot be loaded; the message is the engine's.
    """
    command = [sys.executable, "-P", "-m", "training_backends.trainer", "sample", model]
    options = ["--seed", str(seed), "--max-tokens", str(max_tokens)]
    handed = handed or await Hub().handed(model)
    # Not as an argument, which everybody sees, and of which the system takes 128 KiB at most.
    given = handed.stdin + prompt.encode("utf-8", "replace")
    done = await anyio.run_process(
        [*command, *options], input=given, check=False, env=handed.environment
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise BackendUnavailable(f"The model {model} cannot be asked: {said}", backend="local")
    return Reply.model_validate_json(done.stdout)


async def sample_answer(model: str, prompt: str) -> str:
    """Return the answer of a model that answers; see `ask_model`."""
    return str((await ask_model(model, prompt)).answer)
