"""The command line, killed by SIGKILL at the n-th write to its run store.

    CHAOS_WRITE=before:7 python -m benchmarks._chaos_power launch …   # before the 7th COMMIT
    CHAOS_WRITE=after:7  python -m benchmarks._chaos_power launch …   # right after it
    CHAOS_WRITE=count:FILE …                                          # write the number to FILE

Only transactions with changes are counted. The package itself has no code for this.
"""

import atexit
import os
import signal
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from training_backends.cli.main import main

_CHANGES = ("INSERT", "UPDATE", "DELETE", "CREATE", "DROP", "ALTER")


class _Writes:
    """Counts the commits of one process and kills it at one of them."""

    def __init__(self, when: str, at: int) -> None:
        self.count = 0
        self._when = when
        self._at = at

    def install(self) -> None:
        event.listen(Engine, "before_cursor_execute", self._executes)
        event.listen(Engine, "commit", self._commits)

    def _executes(self, connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        del cursor
        if statement.lstrip().upper().startswith(_CHANGES):
            connection.info["changed"] = True

    def _commits(self, connection: Connection) -> None:
        """Count a commit; SQLAlchemy calls this just before it sends COMMIT."""
        if not connection.info.pop("changed", False):
            return
        self.count += 1
        if self.count != self._at:
            return
        if self._when == "after":
            # SQLAlchemy would commit after this hook, but the process is dead by then.
            connection.dialect.do_commit(connection.connection)
        os.kill(os.getpid(), signal.SIGKILL)


def run() -> None:
    """Install the hook that `CHAOS_WRITE` describes and run the command line."""
    when, _, argument = os.environ["CHAOS_WRITE"].partition(":")
    writes = _Writes(when, 0 if when == "count" else int(argument))
    writes.install()
    if when == "count":
        atexit.register(lambda: Path(argument).write_text(str(writes.count), encoding="utf-8"))
    main()


if __name__ == "__main__":
    run()
