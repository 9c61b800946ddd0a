"""Answer prompts with one loaded model, until none has come for a while."""

import hmac
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from training_backends.core.files import write_atomic
from training_backends.core.run import Prompt
from training_backends.tokens.encoders import TokenizerError
from training_backends.trainer.errors import TrainerError, exit_code_of
from training_backends.trainer.generate import answer
from training_backends.trainer.models import choose_device, load_model
from training_backends.trainer.objectives.classifier import classify
from training_backends.trainer.run import set_up_torch

__all__ = ["answer_once", "answer_until_idle"]

_LOOK_AGAIN: Final = 0.2
"""Seconds between two checks whether to end."""
_READ_WITHIN: Final = 10.0
_LONGEST: Final = 2**26

Answer = Callable[[Prompt, int], dict[str, Any]]


def _load(model: str, seed: int) -> Answer:
    """Load a model and return what answers with it, or classifies.

    Raises:
        TrainerError: It cannot be loaded.
        TokenizerError: Its tokenizer cannot.
    """
    set_up_torch(model)
    device = choose_device("auto")
    loaded = load_model(model, seed=seed, tuning=None, device=device)
    model_here = loaded.model.to(device)

    def respond(prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        if loaded.targets:
            if not isinstance(prompt, str):
                raise TypeError("a classifier takes a text, not a conversation")
            return {"labels": classify(model_here, loaded.encoder, loaded.targets, prompt)}
        return {"answer": answer(model_here, loaded.encoder, prompt, max_tokens)}

    return respond


def answer_once(model: str, prompt: Prompt, *, seed: int, max_tokens: int) -> int:
    """Print the answer to one prompt; return the exit code."""
    try:
        respond = _load(model, seed)
    except (TrainerError, TokenizerError) as error:
        print(error, file=sys.stderr)  # noqa: T201  # this is a command
        return int(exit_code_of(error))
    print(json.dumps(respond(prompt, max_tokens)))  # noqa: T201
    return 0


def answer_until_idle(state: Path, model: str, idle: float) -> int:
    """Answer prompts on loopback; return the exit code.

    Ends when it has been idle, and when its state file is removed or replaced.

    Args:
        state: File in which port and key are announced, once the model is loaded.
        idle: Seconds.
    """
    try:
        respond = _load(model, seed=0)
    except (TrainerError, TokenizerError) as error:
        print(error, file=sys.stderr)  # noqa: T201  # this is a command
        return int(exit_code_of(error))
    key = secrets.token_urlsafe(32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announced = {"model": model, "port": listener.getsockname()[1], "key": key}
        text = json.dumps(announced | {"pid": os.getpid()})
        write_atomic(state, text, private=True)
        listener.settimeout(_LOOK_AGAIN)
        used_at = time.monotonic()
        while _reads(state) == text and time.monotonic() - used_at < idle:
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.settimeout(_READ_WITHIN)
                    _exchange(connection, respond, key)
                used_at = time.monotonic()
        if _reads(state) == text:
            state.unlink(missing_ok=True)
    return 0


def _reads(state: Path) -> str | None:
    try:
        return state.read_text()
    except OSError:
        return None


def _exchange(connection: socket.socket, respond: Answer, key: str) -> None:
    """Answer one request, which is a line; others than those of the key's owner get nothing."""
    with connection.makefile("rwb") as stream:
        try:
            asked = json.loads(stream.readline(_LONGEST))
            given, prompt, max_tokens = asked["key"], asked["prompt"], asked["max_tokens"]
            if not hmac.compare_digest(given.encode(), key.encode()):
                return
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        try:
            reply = respond(prompt, max_tokens)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        stream.write(json.dumps(reply).encode() + b"\n")
