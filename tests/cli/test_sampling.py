"""Asking a model that cannot be asked; one that can is asked in `test_runs`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_backends.core.config import TrainingConfig
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.store import RunStore

Run = Any


@pytest.mark.parametrize("backend", ["mistral", "local"])
def test_what_cannot_be_asked_is_said(
    run: Run, tmp_path: Path, make_config: Callable[..., TrainingConfig], backend: str
) -> None:
    """A provider that keeps its models, or a run that has none: exit code 9, or 5 if it is gone."""
    home = tmp_path / "home"
    home.mkdir()
    store = RunStore(f"sqlite:///{home / 'runs.db'}")
    over = TrainingRun(id="r", backend=backend, config=make_config(), remote_id="r")
    store.insert(over.model_copy(update={"status": TrainingStatus.COMPLETED}))
    store.close()
    done = run("generate", "r", "hello", "--json")
    assert done.code == (9 if backend == "mistral" else 5)
    assert done.document["error"]["backend"] == backend


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        ((), "", "give PROMPT or --input"),
        (("hello", "--input", "in.txt"), "hello", "give PROMPT or --input"),
        (("--input", "none.txt"), "", "Cannot read none.txt"),
        (("--input", "in.jsonl"), '{"prompt": "a"}\n\n["b"]\n', "in.jsonl, line 3"),
        (
            ("--input", "in.jsonl"),
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "user's",
        ),
        (("--input", "in.jsonl"), '{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
        (("--input", "in.txt"), "\udcff", "not UTF-8"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_said(
    run: Run, tmp_path: Path, words: tuple[str, ...], content: str, said: str
) -> None:
    """Before anything is asked."""
    for name in ("in.txt", "in.jsonl"):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    done = run("generate", "r", *words)
    assert (done.code, said in done.err) == (2 if "give" in said else 3, True), done.err
