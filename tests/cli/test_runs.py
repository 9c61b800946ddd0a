"""Real runs from the command line: each command is a process of its own."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.timeout(300)]

Run = Any


def test_a_run_is_launched_followed_seen_again_asked_and_downloaded(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    """Several processes share one run; the last one has its model."""
    asking = "--set=options.sample_prompt=3 plus 3?"
    launched = run("launch", config_file.name, asking, "--id", "mine", "--follow", "--json")
    assert (launched.code, launched.document["status"]) == (0, "completed")
    again = run("launch", config_file.name, asking, "--id", "mine", "--json")
    assert again.document["finished_at"] == launched.document["finished_at"]
    steps = [record["step"] for record in _records(run("logs", "mi", "--json"))]
    assert [step for step in steps if step] == sorted(step for step in steps if step)
    asked = run("generate", "mi", "3 plus 3?", "--json")
    samples = [each["fields"] for each in _records(run("logs", "mi", "--json"))]
    (after,) = [fields["answer"] for fields in samples if fields.get("stage") == "after"]
    assert (asked.code, asked.document) == (0, {"answer": after})
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


def test_three_who_follow_see_the_same_lines(run: Run, config_file: Path) -> None:
    """Each is a process of its own, and one comes when the run is long under way."""
    long = "--set=hyperparameters.training_steps=150"
    assert run("launch", config_file.name, "--id=mine", long).code == 0
    with ThreadPoolExecutor() as pool:
        following = [pool.submit(run, "logs", "mine", "--follow", "--json") for _ in range(2)]
        assert _records(run("logs", "mine", "--json")), "something has happened by now"
        following.append(pool.submit(run, "logs", "mine", "--follow", "--json"))
        seen = [each.result() for each in following]
    assert [each.code for each in seen] == [0, 0, 0]
    assert seen[0].out == seen[1].out == seen[2].out == run("logs", "mine", "--json").out
    assert [record["cursor"] for record in _records(seen[0])] == [
        str(number + 1) for number in range(len(_records(seen[0])))
    ]


def _records(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]
