"""Real runs from the command line: each command is a process of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.timeout(300)]

Run = Any


def test_a_run_is_launched_followed_seen_again_and_downloaded(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    """Four processes share one run; the last one has its model."""
    launched = run("launch", config_file.name, "--id", "mine", "--follow", "--json")
    assert (launched.code, launched.document["status"]) == (0, "completed")
    again = run("launch", config_file.name, "--id", "mine", "--json")
    assert again.document["finished_at"] == launched.document["finished_at"]
    steps = [record["step"] for record in _records(run("logs", "mi", "--json"))]
    assert [step for step in steps if step] == sorted(step for step in steps if step)
    assert run("download", "mine", "out").code == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert run("download", "mine", "out").code != 0


def test_a_running_run_is_stopped_by_another_process(run: Run, config_file: Path) -> None:
    """`stop` asks, `wait` tells when it is over: exit code 11."""
    many = "--set=hyperparameters.training_steps=100000"
    assert run("launch", config_file.name, "--id=long", many).code == 0
    conflict = run("launch", config_file.name, "--id=long")
    timed_out = run("wait", "long", "--timeout", "0.1")
    stopped = run("stop", "long", "--json").document
    waited = run("wait", "long", "--timeout", "60", "--json")
    assert conflict.code == 6
    assert timed_out.code == 124
    assert stopped["status"] in {"stopping", "cancelled"}
    assert (waited.code, waited.document[0]["status"]) == (11, "cancelled")
    assert run("download", "long", "out").code == 9


def _records(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]
