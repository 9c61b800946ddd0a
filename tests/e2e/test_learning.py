"""A job through the gateway, in front of the engine, that must learn something."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Served
from tests.e2e.sdk_learning import main

TOPICS = {"cat": "pets", "sun": "sky", "bus": "roads"}


def texts(seed: int) -> Iterator[tuple[str, str]]:
    """Yield texts in which one word decides, each once, and that word."""
    chance = random.Random(seed)
    seen = set[str]()
    while True:
        word = chance.choice([*TOPICS])
        words = [*chance.choices(["one", "two", "red", "old", "new", "far"], k=3), word]
        chance.shuffle(words)
        if (text := " ".join(words)) not in seen:
            seen.add(text)
            yield text, word


def row(text: str, word: str) -> dict[str, Any]:
    """Make a row of a text."""
    return {"text": text, "labels": {"topic": TOPICS[word], "words": [word]}}


@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(200)
def test_the_official_sdk_trains_what_knows_the_unseen(served: Served, tmp_path: Path) -> None:
    """From the upload to held-out rows, none of which was trained on, 95 of 100 of them right."""
    some = texts(1)
    paths = []
    # More than 5 % of the training's size is refused.
    for name, count in (("words", 1200), ("unseen", 56)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(*next(some))) + "\n" for _ in range(count)))
        paths.append(path)
    main(served.url, served.key, *paths)
