"""A tokenizer that loads at once."""

import json
from pathlib import Path

import pytest

from training_backends.tokens.text_counters import shipped


@pytest.fixture(scope="session")
def small_tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tekken file with the first words of one that mistral-common ships.

    Loading all of them takes a second, and only their number differs.
    """
    pytest.importorskip("mistral_common")
    data = json.loads(shipped("tekken_240911.json").read_text(encoding="utf-8"))
    del data["vocab"][2000:]
    data["config"] |= {"num_vocab_tokens": 2000, "default_vocab_size": 3000}
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
