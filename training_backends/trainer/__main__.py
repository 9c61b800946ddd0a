"""`python -m training_backends.trainer`: `train`, `ray`, `track`, `answer`, `merge` and others."""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from training_backends.trainer.admission import Admission, when_admitted
from training_backends.trainer.environment import importing, take_secrets

if TYPE_CHECKING:
    from argparse import Namespace

    from training_backends.core.run import Prompt

__all__ = ["main"]

_UTF_8: Final = ("utf-8", "replace")
"""Bytes that are not valid UTF-8 become "?"."""


def main(arguments: list[str] | None = None) -> int:
    """Run the given command; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) == 2 and given[0] == "train":
        # Handled without argparse and the other commands, to keep a queued process small.
        take_secrets()
        return when_admitted(Path(given[1]), _load_training)
    return _other(_parsed(given))


def _load_training() -> Callable[[Admission], int]:
    from training_backends.trainer.process import train_admitted  # noqa: PLC0415

    return train_admitted


def _parsed(arguments: list[str]) -> "Namespace":
    import argparse  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m training_backends.trainer")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a run directory")
    training.add_argument("run_dir", type=Path)
    working = commands.add_parser("work", help="train as one of several processes; see `launch`")
    working.add_argument("run_dir", type=Path)
    working.add_argument("parent", type=int, nargs="?", help="exit when this process has exited")
    working.add_argument("--stored", help="URL of the run, if each process has its own directory")
    on_ray = commands.add_parser("ray", help="train on the Ray cluster that runs this")
    on_ray.add_argument("run_dir", help="its path, or its URL in an object store")
    on_ray.add_argument("--scratch", help="directory of this node, for a run in an object store")
    on_ray.add_argument("--cpus", type=float, default=1.0, help="of each worker")
    on_ray.add_argument("--gpus", type=int, default=0, help="of each worker")
    on_ray.add_argument("--accelerator", help="Ray's name of the type of GPU")
    on_ray.add_argument("--max-failures", type=int, default=0)
    tracking = commands.add_parser("track", help="report a run to its trackers")
    tracking.add_argument("run_dir", type=Path)
    exporting = commands.add_parser("export", help="write a checkpoint of a run as a model")
    exporting.add_argument("run_dir", type=Path)
    exporting.add_argument("checkpoint", help="its name, such as step-120")
    exporting.add_argument("target", type=Path)
    sampling = commands.add_parser("sample", help="generate an answer to one prompt")
    sampling.add_argument("--messages", action="store_true", help="the prompt is JSON: messages")
    sampling.add_argument("model", help="tiny-mistral, a directory, or a model on the Hub")
    sampling.add_argument(
        "--prompt", help="the prompt, or a text to classify; default: standard input"
    )
    sampling.add_argument("--seed", type=int, default=0, help="seed of tiny-mistral's weights")
    sampling.add_argument("--max-tokens", type=int, default=64)
    answering = commands.add_parser("answer", help="answer prompts until there are no more")
    answering.add_argument("state", type=Path, help="file that announces where")
    answering.add_argument("model", help="tiny-mistral, a directory, or a model on the Hub")
    answering.add_argument("--idle", type=float, default=60.0, help="seconds without a prompt")
    merging = commands.add_parser("merge", help="save a model, merged with its adapter if any")
    merging.add_argument("model", help="tiny-mistral, a directory, or a model on the Hub")
    merging.add_argument("target", type=Path, help="directory to write")
    serving = commands.add_parser("serve", help="serve the model in the current directory")
    serving.add_argument("port", type=int, help="port on loopback")
    serving.add_argument("options", nargs="*", help="options of `transformers serve`, after --")
    return parser.parse_args(arguments)


def _other(given: "Namespace") -> int:
    take_secrets()
    if given.command == "train":
        return when_admitted(given.run_dir, _load_training)
    if given.command == "work":
        from training_backends.trainer.process import work  # noqa: PLC0415

        return int(work(given.run_dir, given.parent, given.stored))
    if given.command == "answer":
        return _answer(given.state, given.model, given.idle)
    if given.command == "track":
        from training_backends.trainer.tracking import track  # noqa: PLC0415

        sys.exit(track(given.run_dir))  # libraries of trackers send what is left at exit
    if given.command == "merge":
        return _merge(given.model, given.target)
    if given.command == "serve":
        return _serve(given.port, given.options)
    if given.command == "ray":
        from training_backends.trainer.ray import drive  # noqa: PLC0415

        sys.exit(int(drive(given.run_dir, given)))  # Ray ends its own processes at exit
    if given.command == "export":
        return _export(given.run_dir, given.checkpoint, given.target)
    prompt = sys.stdin.buffer.read() if given.prompt is None else given.prompt.encode(*_UTF_8)
    text = prompt.decode(*_UTF_8)
    asked = json.loads(text) if given.messages else text
    return _sample(given.model, asked, given.seed, given.max_tokens)


def _export(path: Path, checkpoint: str, target: Path) -> int:
    with importing():
        from training_backends.rundir.directory import RunDir, TrainerExitCode  # noqa: PLC0415
        from training_backends.tokens.encoders import TokenizerError  # noqa: PLC0415
        from training_backends.trainer.control import StopRequest  # noqa: PLC0415
        from training_backends.trainer.errors import TrainerError, exit_code_of  # noqa: PLC0415
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415

    run = RunDir(path)
    try:
        process = TrainingProcess(run, run.read_spec(), StopRequest(run.stop))
        process.export(run.checkpoints / checkpoint, target)
    except (TrainerError, TokenizerError) as error:
        print(error, file=sys.stderr)  # noqa: T201  # this is a command
        return int(exit_code_of(error))
    return int(TrainerExitCode.DONE)


def _fetch(model: str) -> int:
    """Fetch a model before torch is loaded; return the exit code, 0 if it was found."""
    from training_backends.trainer.errors import TrainerError, exit_code_of  # noqa: PLC0415
    from training_backends.trainer.model_files import fetch_model  # noqa: PLC0415

    try:
        fetch_model(model)
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201  # this is a command
        return int(exit_code_of(error))
    return 0


def _sample(model: str, prompt: "Prompt", seed: int, max_tokens: int) -> int:
    # Imported here: a queued `train` must not load torch or pydantic.
    if code := _fetch(model):
        return code
    with importing(model):
        from training_backends.trainer.answering import answer_once  # noqa: PLC0415

    return answer_once(model, prompt, seed=seed, max_tokens=max_tokens)


def _answer(state: Path, model: str, idle: float) -> int:
    if code := _fetch(model):
        return code
    with importing(model):
        from training_backends.trainer.answering import answer_until_idle  # noqa: PLC0415

    return answer_until_idle(state, model, idle)


def _merge(model: str, target: Path) -> int:
    if code := _fetch(model):
        return code
    with importing(model):
        from training_backends.rundir.directory import TrainerExitCode  # noqa: PLC0415
        from training_backends.tokens.encoders import TokenizerError  # noqa: PLC0415
        from training_backends.trainer.errors import TrainerError, exit_code_of  # noqa: PLC0415
        from training_backends.trainer.models import choose_device, load_model, save_result  # noqa: PLC0415

    try:
        loaded = load_model(model, seed=0, tuning=None, device=choose_device("cpu"))
        save_result(loaded, target, save_as="merged")
    except (TrainerError, TokenizerError) as error:
        print(error, file=sys.stderr)  # noqa: T201  # this is a command
        return int(exit_code_of(error))
    return int(TrainerExitCode.DONE)


def _serve(port: int, options: list[str]) -> int:
    """Run `transformers serve` on loopback until standard input is closed."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from transformers.cli.transformers import app  # noqa: PLC0415

    # The current directory, because a path may contain "@" or ":", which have a meaning there.
    app(["serve", ".", "--host", "127.0.0.1", "--port", str(port), *options])
    return 0


def _exit_with_parent() -> None:
    # Closed by the kernel as well, if the parent is killed. The descriptor itself: the buffered
    # reader's lock would stop the interpreter from exiting.
    while os.read(0, 1024):
        pass
    os._exit(0)


def _exit(code: int) -> NoReturn:
    """Exit without freeing what the kernel frees, which takes torch a second."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk is full, or the pipe is closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
