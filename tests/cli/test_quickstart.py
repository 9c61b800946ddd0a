"""The quickstart on this machine, and the commands that it prints."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import needs_torch
from tests.forking import Program

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("forked"),
]

SAMPLES = Path(__file__).parents[2] / "training_backends" / "samples"
CONFIG = """\
backend: local
model: tiny-mistral
data:
  train: data/train.jsonl
hyperparameters:
  training_steps: 2
  seq_len: 128
"""


def test_every_command_that_the_quickstart_prints_works(tmp_path: Path, program: Program) -> None:
    """They are run as printed, one after the other; `list` shows the quickstart's run."""
    needs_torch()
    data = tmp_path / "quickstart" / "data" / "train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join((SAMPLES / "train.jsonl").read_text().splitlines(keepends=True)[:20]))
    (tmp_path / "quickstart" / "run.yaml").write_text(CONFIG)
    words = "python -m training_backends"
    python = str(program.python)
    _, shown = pasted(f"{words} quickstart", python, tmp_path)
    commands = [line.strip() for line in shown.splitlines() if words in line]
    assert len(commands) == 7
    outputs = [pasted(line, python, tmp_path)[0] for line in commands]
    assert outputs[0].splitlines()[1].split()[1:3] == ["completed", "2/2"], "list"
    assert "train_loss" in outputs[1], "metrics"
    assert "ready to launch" in outputs[3], "validate"
    assert outputs[5].startswith("tb-"), "keys create"


def pasted(line: str, python: str, directory: Path) -> tuple[str, str]:
    """Run a line in a shell, a server until it is up, and return what it prints."""
    line = line.replace("python", python)
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec env {line}"],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if " serve " in line:
            assert process.stderr is not None
            assert "Serving the Mistral API" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, f"{line}: {errors}"
    return out, errors
