"""Timelines and leases do what a few lines over lists and dicts would do."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.client.conftest import NewUrl
from tests.effort import searching
from tests.store.conftest import BEGINNING, told
from training_backends import LogRecord, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.store import Lease, LeaseLost, RunStore

pytestmark = pytest.mark.slow

HOUR, OVER = timedelta(hours=1), timedelta(0)

runs = st.sampled_from(["r", "s"])
records = st.lists(
    st.builds(
        told,
        st.text(st.sampled_from("a\0\n\ufffd\U0001f600"), max_size=3) | st.text(max_size=3),
        st.integers(0, 20),
        st.sampled_from(["event", "metrics", "checkpoint", "engine"]),
        loss=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    ).flatmap(
        lambda record: st.sampled_from([None, 1, 2]).map(
            lambda step: record.model_copy(update={"step": step})
        )
    ),
    max_size=4,
)


def _at(record: LogRecord) -> datetime:
    assert record.at is not None
    return record.at


@dataclass
class Log:
    """What is known of one run."""

    cursor: str | None = None
    said: list[tuple[str, datetime]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    """Steps whose own record told a loss, which no checkpoint's does away with."""

    def add(self, found: list[LogRecord]) -> list[str]:
        """Add records; return the messages of those that somebody wants to be told of."""
        for record in sorted(found, key=_at):
            latest = self.said[-1][1] if self.said else BEGINNING
            self.said.append((record.message.replace("\0", "\ufffd"), max(_at(record), latest)))
            loss = record.fields["loss"]
            if record.step is None or loss is None:
                continue
            if record.source == "metrics":
                self.own.add(record.step)
                self.losses[record.step] = loss
            elif record.source == "checkpoint" and record.step not in self.own:
                self.losses[record.step] = loss
        events = sorted(found, key=_at)
        return [
            it.message.replace("\0", "\ufffd")
            for it in events
            if it.source in {"event", "checkpoint"}
        ]


class Timelines(RuleBasedStateMachine):
    """Looks, notes and deliveries in any order, some of them from an old place."""

    def __init__(self, new_url: NewUrl) -> None:
        super().__init__()
        self.store = RunStore(new_url())

    @initialize()
    def begin(self) -> None:
        config = TrainingConfig.model_validate({"model": "m", "data": {"train": "train.jsonl"}})
        self.logs = {"r": Log(), "s": Log()}
        self.waiting: list[tuple[str, str]] = []
        for name in self.logs:
            status = TrainingStatus.RUNNING
            run = TrainingRun(id=name, backend="b", config=config, remote_id=name, status=status)
            self.store.insert(run)

    def teardown(self) -> None:
        self.store.close()

    @rule(run=runs, found=records, after=st.sampled_from(["here", None, "1"]), moves=st.booleans())
    def look(self, run: str, found: list[LogRecord], after: str | None, *, moves: bool) -> None:
        """Store a look from the last place, or from one that may be an old one."""
        log = self.logs[run]
        after = log.cursor if after == "here" else after
        cursor = str(int(after or 0) + 1) if moves else after
        stored = self.store.observed(run, lambda run: run, found, after=after, cursor=cursor)
        assert (stored is not None) == (log.cursor == after)
        if stored is not None:
            log.cursor = cursor
            self.waiting += [(run, message) for message in log.add(found)]

    @rule(run=runs, found=records)
    def note(self, run: str, found: list[LogRecord]) -> None:
        """Add records of our own."""
        self.store.note(run, lambda run: run, found)
        self.waiting += [(run, message) for message in self.logs[run].add(found)]

    @rule(count=st.integers(1, 5))
    def deliver(self, count: int) -> None:
        """Tell somebody of the oldest events."""
        events = self.store.undelivered(backend="b", limit=count)
        assert [(event.run_id, event.record.message) for event in events] == self.waiting[:count]
        self.store.delivered([event.id for event in events])
        del self.waiting[:count]

    @rule(run=runs, place=st.integers(0, 100), limit=st.integers(1, 5))
    def replay(self, run: str, place: int, limit: int) -> None:
        """Read a part of a log from any place of it."""
        said = self.logs[run].said
        place = min(place, len(said))
        found = self.store.records(run, after=str(place), limit=limit)
        assert [(it.message, it.at) for it in found] == said[place : place + limit]
        assert [it.cursor for it in found] == [str(place + n + 1) for n in range(len(found))]

    @invariant()
    def agree(self) -> None:
        """The store says of every run what the model says."""
        for name, log in self.logs.items():
            assert [(it.message, it.at) for it in self.store.records(name)] == log.said
            assert self.store.provider_cursor(name) == log.cursor
            losses = {point.step: point.value for point in self.store.metrics(name)}
            assert losses == log.losses


class Holders(RuleBasedStateMachine):
    """Owners here and elsewhere that take, renew, release, sleep, die and come back."""

    def __init__(self, new_url: NewUrl) -> None:
        super().__init__()
        self.store = RunStore(new_url())

    owners = st.sampled_from(["here", "here too", "elsewhere", "far away"])

    @initialize()
    def begin(self) -> None:
        self.dead: set[str] = set()
        self.known: list[Lease] = []
        self.held: Lease | None = None
        self.expired = False

    def teardown(self) -> None:
        self.store.close()

    def is_gone(self, owner: str) -> bool | None:
        return owner in self.dead if owner.startswith("here") else None

    def may_take(self) -> bool:
        if self.held is None:
            return True
        gone = self.is_gone(self.held.owner)
        return self.expired if gone is None else gone

    @rule(owner=owners, ttl=st.sampled_from([HOUR, OVER]))
    def take(self, owner: str, ttl: timedelta) -> None:
        """Try to get the lease."""
        free = self.may_take()
        lease = self.store.take("work", owner, ttl, is_gone=self.is_gone)
        assert (lease is not None) == free
        if lease is not None:
            assert all(lease.token > old.token for old in self.known)
            self.known.append(lease)
            self.held, self.expired = lease, ttl == OVER
            self.dead.discard(owner)

    @rule(data=st.data(), ttl=st.sampled_from([HOUR, OVER]))
    def renew(self, data: st.DataObject, ttl: timedelta) -> None:
        """Renew a lease, perhaps one that was lost long ago."""
        if not self.known:
            return
        lease = data.draw(st.sampled_from(self.known))
        assert self.store.renew(lease, ttl) == (lease == self.held)
        if lease == self.held:
            self.expired = ttl == OVER

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Release a lease, perhaps one that was lost long ago."""
        if not self.known:
            return
        lease = data.draw(st.sampled_from(self.known))
        self.store.release(lease)
        if lease == self.held:
            self.held = None

    @rule(owner=owners)
    def die(self, owner: str) -> None:
        """An owner ends without a word."""
        self.dead.add(owner)

    @invariant()
    def agree(self) -> None:
        """One holds it, as far as can be told, and only the last one to take it may write."""
        holder = None if self.may_take() or self.held is None else self.held.owner
        assert self.store.holder("work", is_gone=self.is_gone) == holder
        for lease in self.known[-3:]:
            try:
                self.store.delivered([], lease=lease)
            except LeaseLost:
                assert lease != self.held
            else:
                assert lease == self.held


def test_timelines_do_what_lists_would_do(new_url: NewUrl) -> None:
    """Whatever is looked at, noted and delivered, in whatever order."""
    run_state_machine_as_test(partial(Timelines, new_url), settings=searching(2))  # type: ignore[arg-type]


def test_leases_do_what_one_variable_would_do(new_url: NewUrl) -> None:
    """Whoever takes, sleeps, dies and comes back."""
    run_state_machine_as_test(partial(Holders, new_url), settings=searching(2))  # type: ignore[arg-type]
