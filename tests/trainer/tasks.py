"""A small task for each method: its rows, of very different lengths, and what its spec says."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tests.trainer.plain import save_tiny

__all__ = ["METHODS", "changes_for", "write_tasks"]

_TARGETS: Final = [{"name": "mood", "labels": ["x", "y"]}, {"name": "topic", "labels": ["a", "b"]}]
METHODS: Final[Mapping[str, dict[str, Any]]] = MappingProxyType(
    {
        "all weights": {},
        "packing": {"packing": True, "seq_len": 200},
        "pairs, LoRA": {"method": "dpo", "tuning": {"kind": "lora", "rank": 4}},
        "classifier": {"method": "classifier", "classifier_targets": _TARGETS},
    }
)


def write_tasks(directory: Path) -> Path:
    """Write the rows of each method, and a model to begin with."""
    save_tiny(directory / "base")
    chats: list[object] = []
    pairs: list[object] = []
    labels: list[object] = []
    for n in range(40):
        question = {"role": "user", "content": "why? " * (1 + n % 7)}
        good = {"role": "assistant", "content": f"Because of {n}. " * (1 + n % 5)}
        bad = {"role": "assistant", "content": "No."}
        chats.append({"messages": [question, good]})
        pairs.append({"prompt": [question], "chosen": [good], "rejected": [bad]})
        named = {"mood": "xy"[n % 4 // 2]}
        if n % 3:  # so that some rows of a step have none of these
            named["topic"] = "ab"[n % 2]
        labels.append({"text": f"{n} " * (1 + n % 9), "labels": named})
    for name, rows in {"sft": chats, "dpo": pairs, "classifier": labels}.items():
        (directory / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return directory


def changes_for(method: str, directory: Path) -> dict[str, Any]:
    """Return what the spec of a short run says."""
    changes = METHODS[method]
    path = directory / f"{changes.get('method', 'sft')}.jsonl"
    length = {"training_steps": 8, "batch_size": 5, "checkpoint_every": 4}
    data = {"train": [path], "validation": [path], "model": str(directory / "base")}
    return {**length, **data, **changes}
