"""Live updates of the console: one look at the database per second for all open pages.

Nobody looking costs nothing. A page that falls behind gets the newest state of each run, not every
state between, so a slow connection needs no more memory than the list has rows. A page names the
point that it has seen (`Last-Event-ID`), so after a reconnect, to this gateway or to a restarted
one, it misses nothing.
"""

import json
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import sqlalchemy as sa

from training_backends.core.logging import get_logger
from training_backends.gateway.console_runs import last_records, records_after, summaries
from training_backends.gateway.errors import HTTPProblem, is_temporary, plain
from training_backends.gateway.jobstore import OWNER
from training_backends.gateway.keys import Principal
from training_backends.gateway.store import GatewayStore
from training_backends.protocols.mistral.status import ACTIVE
from training_backends.store.gateway_schema import IS_OPEN, jobs
from training_backends.store.schema import runs

__all__ = ["MOST_FOLLOWED", "ConsoleFeed", "FeedCursor"]

log = get_logger()

MOST_STREAMS: Final = 256
MOST_FOLLOWED: Final = 8
"""Runs whose log one page follows."""
LOOK_EVERY: Final = 1.0
_PAUSE_FACTOR: Final = 10
"""Looking takes at most this part of the time."""
_ALIVE_EVERY: Final = 15.0
"""Seconds between two signs of life, and two checks of the session."""
_SLACK: Final = 5.0
"""Seconds by which clocks of several gateways, and the end of a transaction, may differ."""
_MOST_CHANGED: Final = 500
"""Runs to send at once; a page that missed more loads its list again."""
_BATCH: Final = 500
"""Log records per event."""
_FORGOTTEN_AFTER: Final = 3600.0
_RECENT: Final = 60.0
"""Seconds after its end for which a run is compared; longer than a look can take."""

_Found = list[tuple[str, dict[str, Any]]]
"""Project and summary of runs."""
_State = tuple[float, int | None]
"""What changes with a run: when its job changed, and the version of its record."""


@dataclass(slots=True)
class FeedCursor:
    """What a page has seen: the list at a time, and each followed log up to a record."""

    at: float
    logs: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ";".join([f"{self.at:.3f}", *(f"{run}={seq}" for run, seq in self.logs.items())])

    @classmethod
    def parse(cls, text: str) -> "FeedCursor":
        """Read what `str` wrote.

        Raises:
            HTTPProblem: The text is something else.
        """
        first, *rest = text.split(";")
        try:
            at = float(first)
            logs = {run: int(seq) for run, _, seq in (part.partition("=") for part in rest)}
        except ValueError:
            raise plain(422, "Invalid cursor.") from None
        if not 0 <= at < 1e11 or any(not 0 <= seq < 2**63 for seq in logs.values()):
            raise plain(422, "Invalid cursor.")
        return cls(at, logs)


class _Page:
    """An open page and what it has not been sent yet."""

    def __init__(self, caller: Principal, followed: Sequence[str]) -> None:
        self.caller = caller
        self.followed = followed
        self.changed: dict[str, dict[str, Any]] = {}
        self.seqs: dict[str, int] = {}
        self.is_behind = False
        self.at = 0.0
        self.news = anyio.Event()

    def offer(self, found: _Found) -> None:
        """Add runs that the page may see."""
        mine = self.caller
        new = {run["id"]: run for project, run in found if mine.admin or project == mine.project}
        self.changed |= new
        if new:
            self.news.set()


class ConsoleFeed:
    """The open pages of this process."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._pages: set[_Page] = set()
        self._wanted = anyio.Event()
        self._known: dict[str, _State] = {}
        self._has_looked = anyio.Event()
        self._is_closed = False

    def close(self) -> None:
        """End all streams; the pages reconnect to the next gateway."""
        self._is_closed = True
        for page in self._pages:
            page.news.set()

    def check_room(self) -> None:
        """Check that one more page can be opened.

        Raises:
            HTTPProblem: 503: too many are open.
        """
        if len(self._pages) >= MOST_STREAMS or self._is_closed:
            raise HTTPProblem(503, {"detail": "Too many open pages."}, {"retry-after": "10"})

    async def run(self) -> None:
        """Look for changes while a page is open; runs until cancelled."""
        while True:
            if not self._pages:
                self._known.clear()
                self._has_looked = anyio.Event()
                await self._wanted.wait()
                self._wanted = anyio.Event()
                continue
            began = anyio.current_time()
            try:
                await self._look()
            except Exception as error:  # must not stop the gateway
                if not is_temporary(error):
                    log.exception("console not updated")
            took = anyio.current_time() - began
            await anyio.sleep(max(LOOK_EVERY, took * _PAUSE_FACTOR))

    async def events(
        self,
        caller: Principal,
        cursor: FeedCursor,
        followed: Sequence[str],
        *,
        is_admitted: Callable[[], Any],
        masks: Mapping[str, Callable[[str], str]],
    ) -> AsyncGenerator[str, None]:
        """Yield server-sent events until the session ends or the gateway shuts down.

        Args:
            followed: Runs whose logs to send, which the caller may see.
            is_admitted: Checks the session again.
            masks: Hides local paths in the log of each followed run.
        """
        with self._opened(caller, followed) as page:
            # Or a change between the two would be in neither.
            await self._has_looked.wait()
            for event in await self._missed(page, cursor):
                yield event
            sent = checked = anyio.current_time()
            while not self._is_closed:
                with anyio.move_on_after(_ALIVE_EVERY):
                    await page.news.wait()
                page.news = anyio.Event()
                if anyio.current_time() - checked > _ALIVE_EVERY:
                    checked = anyio.current_time()
                    try:
                        await is_admitted()
                    except HTTPProblem:
                        yield _event("signed-out", {}, cursor)
                        return
                cursor.at = page.at or cursor.at
                if page.changed:
                    changed, page.changed = [*page.changed.values()], {}
                    yield _event("runs", changed, cursor)
                    sent = anyio.current_time()
                async for event in self._logs(page, cursor, masks):
                    yield event
                    sent = anyio.current_time()
                if anyio.current_time() - sent > _ALIVE_EVERY:
                    sent = anyio.current_time()
                    yield ": alive\n\n"

    @contextmanager
    def _opened(self, caller: Principal, followed: Sequence[str]) -> Iterator[_Page]:
        page = _Page(caller, followed)
        self._pages.add(page)
        self._wanted.set()
        try:
            yield page
        finally:
            self._pages.discard(page)

    async def _missed(self, page: _Page, cursor: FeedCursor) -> list[str]:
        """Return what changed since a page loaded its list, or lost its connection."""
        now = time.time()
        since = cursor.at - _SLACK
        live = "STARTED", "RUNNING", "CANCELLATION_REQUESTED"
        changed = sa.select(jobs.c.id).where(page.caller.sees(OWNER), _recent(live, since))

        def work(connection: sa.Connection) -> list[dict[str, Any]] | None:
            ids = connection.execute(changed.limit(_MOST_CHANGED + 1)).scalars().all()
            if len(ids) > _MOST_CHANGED or now - cursor.at > _FORGOTTEN_AFTER:
                return None
            return [run for _, run in summaries(connection, ids)]

        found = await self._store.aread(work)
        cursor.at = now
        if found is None:
            return [_event("reload", {}, cursor)]
        return [_event("runs", found, cursor)]

    async def _logs(
        self, page: _Page, cursor: FeedCursor, masks: Mapping[str, Callable[[str], str]]
    ) -> AsyncGenerator[str, None]:
        for run_id in page.followed:
            while page.seqs.get(run_id, 0) > (after := cursor.logs.get(run_id, 0)):
                found = await self._store.aread(
                    lambda c, run_id=run_id, after=after: records_after(  # type: ignore[misc]
                        c, run_id, after=after, limit=_BATCH
                    )
                )
                if not found:
                    break
                cursor.logs[run_id] = found[-1]["seq"]
                for record in found:
                    record["message"] = masks[run_id](record["message"])
                yield _event("log", {"run": run_id, "records": found}, cursor)

    async def _look(self) -> None:
        """Compare the database with what was known, and give each page its news."""
        now = time.time()
        followed = {run_id for page in self._pages for run_id in page.followed}
        is_first = not self._has_looked.is_set()
        query = (
            sa.select(jobs.c.id, jobs.c.modified_at, runs.c.version)
            .select_from(jobs.outerjoin(runs, runs.c.id == jobs.c.id))
            .where(_recent(ACTIVE, now - _RECENT))
        )

        def work(connection: sa.Connection) -> tuple[_Found, dict[str, _State], dict[str, int]]:
            states = {row[0]: (row[1], row[2]) for row in connection.execute(query)}
            changed = [key for key, state in states.items() if self._known.get(key) != state]
            found: _Found = []
            # Pages that have just been opened read their list themselves.
            for start in range(0, 0 if is_first else len(changed), _MOST_CHANGED):
                found += summaries(connection, changed[start : start + _MOST_CHANGED])
            return found, states, last_records(connection, followed) if followed else {}

        found, self._known, seqs = await self._store.aread(work)
        self._has_looked.set()
        for page in list(self._pages):
            page.at = now
            page.offer(found)
            for run_id in page.followed:
                if seqs.get(run_id, 0) != page.seqs.get(run_id, 0):
                    page.seqs[run_id] = seqs[run_id]
                    page.news.set()


def _event(name: str, data: Any, cursor: FeedCursor) -> str:
    # Compact JSON has no line breaks.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\nid: {cursor}\ndata: {text}\n\n"


def _recent(statuses: Collection[str], since: float) -> sa.ColumnElement[bool]:
    """Return the condition of the jobs with one of these statuses, or that changed since a time.

    Two queries, as SQLite would read all jobs for one with OR.
    """
    active = sa.select(jobs.c.id).where(IS_OPEN, jobs.c.status.in_(statuses))
    changed = sa.select(jobs.c.id).where(jobs.c.modified_at >= since)
    return jobs.c.id.in_(active.union(changed))
