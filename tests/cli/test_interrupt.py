"""Ctrl-C on a terminal: heard at once, with the run's id, and nothing started."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import read_until
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.e2e


def test_ctrl_c_at_the_price_ends_the_launch(config_file: Path) -> None:
    """Exit code 130 without a second key, one JSON document, and a job that was not started."""
    config_file.write_text(config_file.read_text().replace("  batch_size: 2\n", ""))
    terminal, theirs = pty.openpty()
    options = ["--backend", "mistral", "--id", "mine", "--json"]
    with ScriptedProvider() as provider:
        process = subprocess.Popen(
            [sys.executable, "-m", "training_backends", "launch", config_file.name, *options],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=config_file.parent,
            env={
                **os.environ,
                "MISTRAL_API_KEY": "test-key",
                "TRAINING_BACKENDS_MISTRAL__BASE_URL": provider.base_url,
            },
            start_new_session=True,
        )
        os.close(theirs)
        try:
            said = read_until(terminal, "[y/N]")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
            os.close(terminal)
        assert {job.status for job in provider.jobs.values()} == {"VALIDATED"}
    error = json.loads(out)["error"]
    assert "$2.50" in said
    assert (process.returncode, error["exit_code"], error["run_id"]) == (130, 130, "mine")
    assert "launch run.yaml --id mine --backend mistral" in error["hint"]
    assert "stop mine" in error["hint"]


def test_ctrl_c_ends_a_command_that_asks_nobody() -> None:
    """Exit code 130, said to people and to programs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "training_backends", "data", "inspect", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        # More than a pipe holds: once it is taken, the command is at work.
        for _ in range(64):
            process.stdin.write(b'{"text": "some"}\n' * 4096)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, json.loads(out)["error"]["exit_code"]) == (130, 130)
    assert b"Interrupted" in errors
