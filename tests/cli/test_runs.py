"""Real runs from the command line, each trained in a process of its own."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Done, Run
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("forked"),
]


@contextmanager
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the process that answers stay for the block, and end with it."""
    state = tmp_path / "home" / "generate" / "state.json"
    monkeypatch.setenv("TRAINING_BACKENDS_LOCAL__GENERATE_IDLE", "60")
    try:
        yield
        pid = json.loads(state.read_text())["pid"]
    finally:
        state.unlink(missing_ok=True)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_run_is_launched_followed_by_three_asked_and_downloaded(
    run: Run,
    run_process: Run,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All see the same lines, one of them comes later; a fourth has the model.

    Of three prompts only the first loads it.
    """
    words = ["--set=options.sample_prompt=3 plus 3?", "--set=hyperparameters.training_steps=60"]
    launch = ("launch", config_file.name, *words, "--id", "mine")
    logs = ("logs", "mine", "--json")
    with ThreadPoolExecutor() as pool:
        launching = pool.submit(run_process, *launch, "--follow", "--json")
        wait_until(lambda: run(*logs).code == 0)
        following = [pool.submit(run_process, *logs, "--follow") for _ in range(2)]
        wait_until(lambda: any(record["step"] for record in _records(run(*logs))))
        following.append(pool.submit(run_process, *logs, "--follow"))
        launched = launching.result()
        seen = [each.result() for each in following]
    assert (launched.code, launched.document["status"]) == (0, "completed")
    assert [each.code for each in seen] == [0, 0, 0]
    whole = run("logs", "mi", "--json")
    assert seen[0].out == seen[1].out == seen[2].out == whole.out
    records = _records(whole)
    assert [record["cursor"] for record in records] == [str(n + 1) for n in range(len(records))]
    again = run(*launch, "--json")
    assert again.document["finished_at"] == launched.document["finished_at"]
    steps = [record["step"] for record in records]
    assert [step for step in steps if step] == sorted(step for step in steps if step)
    with warm(tmp_path, monkeypatch):
        asked = run("generate", "mi", "3 plus 3?", "--json")
        state = (tmp_path / "home" / "generate" / "state.json").read_text()
        talk = [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "1 plus 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3 plus 3?"},
        ]
        rows: list[dict[str, Any]] = [
            {"prompt": "3 plus 3?"},
            {"prompt": "2 plus\n2?"},
            {"messages": talk},
        ]
        (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        many = run("generate", "mi", "--input", "in.jsonl", "--json")
        assert (tmp_path / "home" / "generate" / "state.json").read_text() == state
    assert [{**row, "answer": ""} for row in _records(many)] == [
        {**row, "answer": ""} for row in rows
    ]
    assert _records(many)[0]["answer"] == asked.document["answer"]
    samples = [record["fields"] for record in records]
    (after,) = [fields["answer"] for fields in samples if fields.get("stage") == "after"]
    assert (asked.code, asked.document) == (0, {"answer": after})
    assert run("download", "mine", "out").code == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert run("download", "mine", "out").code != 0
    unknown = run("download", "mine", "other", "--checkpoint", "1")
    assert (unknown.code, "available: 40, 50, 60" in unknown.err) == (3, True)


def test_a_running_run_is_stopped_by_another_command(run: Run, config_file: Path) -> None:
    """`stop` asks, `wait` tells when it is over: exit code 11."""
    many = "--set=hyperparameters.training_steps=100000"
    launched = run("launch", config_file.name, "--id=long", many)
    conflict = run("launch", config_file.name, "--id=long")
    timed_out = run("wait", "long", "--timeout", "0.1")
    stopped = run("stop", "long", "--json").document
    waited = run("wait", "long", "--timeout", "60", "--json")
    # After the stop, so that a failure leaves no run behind.
    assert launched.code == 0
    assert conflict.code == 6
    assert timed_out.code == 124
    assert stopped["status"] in {"stopping", "cancelled"}
    assert (waited.code, waited.document[0]["status"]) == (11, "cancelled")
    assert run("download", "long", "out").code == 9


def _records(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]
