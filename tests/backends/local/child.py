"""A training process that trains nothing and ends as it is told: `child.py RUN_DIR`.

It keeps to the run directory's protocol, written down here once more by hand. A file `finish`
or `fail` in the directory ends it, as does what ends the engine.
"""

import json
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from training_backends.core.files import append_line, hold_lock, write_atomic

DONE, STOPPED, CRASHED, ALREADY_ACTIVE = 0, 3, 1, 5


def now() -> str:
    """Return the time as the files have it."""
    return datetime.now(UTC).isoformat()


def tell(run: Path, name: str, step: int, **data: object) -> None:
    """Append an event."""
    event = {"at": now(), "name": name, "message": name, "step": step, "data": data}
    append_line(run / "events.jsonl", json.dumps(event))


def measure(run: Path, step: int) -> None:
    """Append a row of metrics."""
    row = {"at": now(), "step": step, "total_steps": 2, "epoch": step / 2}
    row |= {"train_loss": 1 / step, "learning_rate": 0.1}
    append_line(run / "metrics.jsonl", json.dumps(row))


def end(run: Path, status: str, code: int, **record: object) -> int:
    """Say how it ended."""
    tell(run, "status", 2, status=status)
    document = {"status": status, "code": code, "at": now(), "step": 2, **record}
    write_atomic(run / "exit.json", json.dumps(document))
    (run / "stop").unlink(missing_ok=True)
    return code


def work(run: Path, signals: list[int]) -> int:
    """Begin, wait to be told how to end, end."""
    tell(run, "status", 0, status="initializing")
    tell(run, "status", 0, status="running", total_steps=2)
    measure(run, 1)
    while run.is_dir():
        if signals or (run / "stop").exists():
            return end(run, "stopped", STOPPED)
        if (run / "fail").exists():
            failure = {"kind": "internal", "message": "it was told to fail"}
            return end(run, "failed", CRASHED, failure=failure)
        if (run / "finish").exists():
            measure(run, 2)
            tell(run, "checkpoint", 2, path="checkpoints/step-2", metrics={"train_loss": 0.75})
            (run / "result").mkdir(exist_ok=True)
            result = {"path": "result", "format": "full", "base_model": "tiny-mistral"}
            return end(run, "completed", DONE, result=result)
        time.sleep(0.01)
    return CRASHED


def main(run: Path) -> int:
    """Live in a directory, unless another does or a completed run lies there."""
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        with hold_lock(run / "lock"):
            return DONE if (run / "exit.json").exists() else work(run, signals)
    except BlockingIOError:
        return ALREADY_ACTIVE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
