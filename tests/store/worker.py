"""A process that shares a store with others: `worker.py WHAT URL [MORE]`.

It says `ready`, waits for a line, does what it was told to and says how it went.
"""

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from training_backends.core.run import LogRecord
from training_backends.store import RunStore

LOOKS = 10
EACH = 3


def count_runs(store: RunStore) -> str:
    """Open the store."""
    return str(len(store.list()))


def look(store: RunStore) -> str:
    """Store look after look at the run `r`, each with some records, until all are stored."""
    stored = 0
    while (n := int(store.provider_cursor("r") or 0)) < LOOKS:
        records = [
            LogRecord(
                at=datetime.fromtimestamp(n * EACH + i, UTC),
                message=f"{n}.{i}",
                source="event",
                cursor="",
            )
            for i in range(EACH)
        ]
        after = str(n) if n else None
        run = store.observed("r", lambda run: run, records, after=after, cursor=str(n + 1))
        stored += run is not None
    return str(stored)


def count_up(store: RunStore, path: str) -> str:
    """Add to the number in a file, under a lease, often."""
    mine = f"{os.getpid()}"
    done = 0
    while done < 6:
        lease = store.take("file", mine, timedelta(hours=1), is_gone=lambda _: None)
        if lease is None:
            continue
        number = int(Path(path).read_text())
        Path(path).write_text(str(number + 1))
        store.release(lease)
        done += 1
    return mine


def hold(store: RunStore) -> str:
    """Have the store open until told otherwise."""
    store.list()
    say("open")
    sys.stdin.readline()
    return "closed"


def lazily(store: RunStore) -> str:
    """Open the store and say whether that took alembic."""
    store.list()
    return str("alembic" in sys.modules)


DUTIES: dict[str, Callable[..., str]] = {
    "count": count_runs,
    "look": look,
    "up": count_up,
    "hold": hold,
    "lazily": lazily,
}


def say(word: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main(what: str, url: str, *more: str) -> None:
    """Do one of them."""
    store = RunStore(url)
    say("ready")
    sys.stdin.readline()
    say(DUTIES[what](store, *more))


if __name__ == "__main__":
    main(*sys.argv[1:])
