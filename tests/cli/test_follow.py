"""What a run shows on a terminal from its launch to its end."""

from pathlib import Path
from typing import Any

from training_backends.testing.provider import ScriptedProvider

Run = Any


def test_each_status_is_shown_once(run: Run, config_file: Path) -> None:
    """The log of a run that is followed begins before its launch was accepted."""
    with ScriptedProvider() as provider:
        provider.key = "k" * 32
        done = run(
            "launch",
            config_file.name,
            "--backend=mistral",
            "--set=hyperparameters.batch_size=null",
            "--yes",
            "--follow",
            MISTRAL_API_KEY="k" * 32,
            TRAINING_BACKENDS_MISTRAL__BASE_URL=provider.base_url,
        )
    assert done.code == 0, done.err
    shown = done.out + done.err
    assert [shown.count(word) for word in ("VALIDATING", "VALIDATED", "RUNNING")] == [1, 1, 1]
