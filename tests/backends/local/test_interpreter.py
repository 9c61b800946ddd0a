"""Training in another Python environment: what it must have, and how that is found out."""

import json
import os
import sys
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.backends.local.conftest import is_over, until_state
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.interpreter import Interpreter
from training_backends.backends.local.process import Hub, ask_model
from training_backends.backends.local.settings import LocalSettings
from training_backends.backends.local.spec import build_spec
from training_backends.core.errors import BackendNotInstalled, BackendUnavailable, ConfigError
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.gateway.inference import can_serve
from training_backends.rundir.directory import CheckpointState, RunDir
from training_backends.testing.journal import MemoryJournal

LIBRARIES = ("torch", "transformers", "peft", "accelerate")
OURS = version("training-backends")


class Environment:
    """A virtual environment with empty packages of given names and versions."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, symlinks=True)
        self.python = directory / "bin" / "python"
        (self._site,) = directory.glob("lib/python3*/site-packages")

    def install(self, name: str, number: str, code: str = "") -> None:
        """Install a package, or another version of it."""
        for old in self._site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            old.rename(self._site / f"{name.replace('-', '_')}-{number}.dist-info")
        info = self._site / f"{name.replace('-', '_')}-{number}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        module = self._site / name.replace("-", "_")
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(code)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment that has all that the trainer needs."""
    made = Environment(tmp_path / "env")
    for name in LIBRARIES:
        made.install(name, "1.2")
    made.install("training-backends", OURS)
    return made


def why_not(interpreter: Interpreter) -> BackendNotInstalled:
    """Return why an interpreter cannot train."""
    with pytest.raises(BackendNotInstalled) as raised:
        interpreter.require()
    assert raised.value.hint is not None or "local.python" in raised.value.message
    return raised.value


def test_an_environment_with_everything_can_train(environment: Environment) -> None:
    """Its versions are shown, and its packages are those that count."""
    found = Interpreter(environment.python)
    assert found.describe() == (
        f"trains with {environment.python}: torch 1.2, transformers 1.2, peft 1.2, accelerate 1.2"
    )
    assert found.has("torch")
    assert not found.has("bitsandbytes")
    package = found.transformers()
    assert package is not None
    assert package.is_relative_to(environment.python.parent.parent)
    assert found.command("train")[0] == str(environment.python)


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    """A bare environment has nothing."""
    made = Environment(tmp_path / "env")
    error = why_not(Interpreter(made.python))
    assert f"{made.python} (local.python) lacks training-backends, torch, " in error.message
    command = f"{made.python} -m pip install 'training-backends[local]=={OURS}'"
    assert error.install == error.hint == command
    assert not Interpreter(made.python).has("torch")
    assert Interpreter(made.python).transformers() is None


def test_another_version_of_this_package_is_rejected(environment: Environment) -> None:
    """Both read and write the run directory."""
    environment.install("training-backends", "0.0.1")
    error = why_not(Interpreter(environment.python))
    assert f"has training-backends 0.0.1, but this is {OURS}" in error.message


def test_a_library_that_cannot_be_imported_is_named(environment: Environment) -> None:
    """With its error, in a line."""
    environment.install("torch", "2.0", "raise OSError('libcudart.so.12 is missing\\nand more')")
    error = why_not(Interpreter(environment.python))
    assert error.message.endswith("cannot import torch: OSError: libcudart.so.12 is missing")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file or directory"),
        ("#!/bin/sh\necho hello\n", "it is not a Python interpreter"),
        ("#!/bin/sh\necho 'Unknown option: -P' >&2\nexit 2\n", "Unknown option: -P"),
        ("#!/nowhere\n", "No such file or directory"),
    ],
)
def test_a_program_that_is_no_python_is_rejected(
    tmp_path: Path, content: str | None, said: str
) -> None:
    """The setting and its value are named."""
    program = tmp_path / "python"
    if content is not None:
        program.write_text(content)
        program.chmod(0o755)
    error = why_not(Interpreter(program))
    assert str(program) in error.message
    assert said in error.message


def test_an_environment_is_asked_once_until_it_changes(
    environment: Environment, tmp_path: Path
) -> None:
    """Each command is a process, and importing torch takes seconds."""
    cache = tmp_path / "home" / "cache.json"
    Interpreter(environment.python, cache).require()
    kept = json.loads(cache.read_text())
    kept["report"]["versions"]["torch"] = "from the cache"
    cache.write_text(json.dumps(kept))
    assert "torch from the cache" in Interpreter(environment.python, cache).describe()
    environment.install("torch", "3.0")
    assert "torch 3.0" in Interpreter(environment.python, cache).describe()
    cache.write_text("{")
    assert "torch 3.0" in Interpreter(environment.python, cache).describe()


def test_a_failure_is_not_kept(environment: Environment, tmp_path: Path) -> None:
    """A repair that changes no package is noticed."""
    cache = tmp_path / "cache.json"
    environment.install("peft", "1.2", "raise ImportError('broken')")
    why_not(Interpreter(environment.python, cache))
    assert not cache.exists()


def test_its_process_gets_none_of_this_environment_s_variables(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would have it load packages of this one."""
    monkeypatch.setenv("PYTHONPATH", "/here")
    monkeypatch.setenv("VIRTUAL_ENV", "/here")
    assert Interpreter().variables(os.environ)["PYTHONPATH"] == "/here"
    found = Interpreter(environment.python).variables(os.environ)
    assert not found.keys() & {"PYTHONPATH", "VIRTUAL_ENV"}
    assert found["PATH"] == os.environ["PATH"]


@pytest.mark.anyio
async def test_health_shows_the_environment(environment: Environment, tmp_path: Path) -> None:
    """And what is wrong with one that was chosen, which is never optional."""
    found = await LocalBackend(tmp_path, interpreter=Interpreter(environment.python)).health()
    assert found.ok
    assert f"trains with {environment.python}: torch 1.2" in found.message
    broken = await LocalBackend(tmp_path, interpreter=Interpreter(tmp_path / "no")).health()
    assert (broken.ok, broken.configured) == (False, True)
    assert "local.python" in broken.message


@pytest.mark.anyio
@pytest.mark.engine
@pytest.mark.timeout(300)
async def test_a_small_core_trains_in_another_environment(
    home: Path,
    make_run: Callable[..., TrainingRun],
    inspected: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the training libraries in its own."""
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    assert Interpreter().missing() == [*LIBRARIES]
    interpreter = Interpreter(Path(sys.executable), home / "cache.json")
    settings = LocalSettings(python=Path(sys.executable))
    backend = LocalBackend(home, hub=Hub(settings, None, interpreter), interpreter=interpreter)
    run = make_run(hyperparameters={"training_steps": 1, "batch_size": 1})
    assert (await backend.validate(run.config, inspected(run))).ok
    assert (await backend.health()).ok
    await backend.launch(run, MemoryJournal(run))
    state = await until_state(backend, run, is_over)
    assert state.status is TrainingStatus.COMPLETED


@pytest.mark.anyio
async def test_answers_come_from_the_other_environment(tmp_path: Path) -> None:
    """Its interpreter runs the trainer's `sample`."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ncat >/dev/null\necho "{\\"answer\\": \\"$*\\"}"\n')
    program.chmod(0o755)
    reply = await ask_model("tiny-mistral", "why?", interpreter=Interpreter(program))
    assert str(reply.answer).startswith("-P -m training_backends.trainer sample tiny-mistral ")


@pytest.mark.anyio
async def test_a_checkpoint_is_written_as_a_model_by_the_other_environment(
    tmp_path: Path, make_run: Callable[..., TrainingRun]
) -> None:
    """Its directory is checked here; what fails there is reported."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ncat >/dev/null\nmkdir "$7"\n')
    program.chmod(0o755)
    backend = LocalBackend(tmp_path, interpreter=Interpreter(program))
    run = make_run()
    directory = RunDir(tmp_path / "runs" / run.id)
    directory.write_spec(build_spec(run.id, run.config, tmp_path))
    checkpoint = directory.checkpoints / "step-4"
    checkpoint.mkdir(parents=True)
    state = CheckpointState(step=4, files={})
    (checkpoint / "state.json").write_text(state.model_dump_json())
    found = await backend.download_checkpoint(run, "4", tmp_path / "model")
    assert found.is_dir()
    with pytest.raises(ConfigError, match="Checkpoint '5' cannot be used"):
        await backend.download_checkpoint(run, "5", tmp_path / "other")
    (found / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        await backend.download_checkpoint(run, "step-4", found)
    program.write_text("#!/bin/sh\ncat >/dev/null\necho 'no such thing' >&2\nexit 4\n")
    with pytest.raises(BackendUnavailable, match="Cannot write step-4 as a model: no such thing"):
        await backend.download_checkpoint(run, "4", tmp_path / "other")


def test_an_environment_with_the_packages_of_serving_can_serve(environment: Environment) -> None:
    """A gateway runs the inference servers of trained models in it."""
    assert not can_serve(Interpreter(environment.python))
    for name in ("fastapi", "uvicorn", "openai"):
        environment.install(name, "1.2")
    assert can_serve(Interpreter(environment.python))
