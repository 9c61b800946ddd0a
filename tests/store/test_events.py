"""The timeline: each record once, in order of time, readable from any place."""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from tests.store.conftest import BEGINNING, MakeRun, at_once, told
from tests.store.worker import EACH, LOOKS
from training_backends import ConfigError, LogRecord, RunNotFound, TrainingRun, TrainingStatus
from training_backends.core.run import RunState, utc_now
from training_backends.store import LeaseLost, MetricPoint, RunStore


def same(run: TrainingRun) -> TrainingRun:
    return run


def ended(run: TrainingRun) -> TrainingRun:
    return run.updated(RunState(status=TrainingStatus.COMPLETED))


@pytest.fixture
def look(store: RunStore, running: MakeRun) -> Callable[..., TrainingRun | None]:
    """Store a look at a run, behind the last one if nothing else is said."""
    store.insert(running("r"))

    def look(
        *records: LogRecord,
        after: str | None = "",
        cursor: str | None = None,
        change: Callable[[TrainingRun], TrainingRun] = same,
    ) -> TrainingRun | None:
        place = store.provider_cursor("r")
        after = place if after == "" else after  # None is a place
        return store.observed("r", change, records, after=after, cursor=cursor or f"{place}+")

    return look


def messages(records: Sequence[LogRecord]) -> list[str]:
    return [record.message for record in records]


def test_records_come_back_as_they_were_but_for_the_cursor(
    store: RunStore, look: Callable[..., None]
) -> None:
    """The provider's cursors mean nothing to whoever reads the store."""
    record = told("x", 1.5, "metrics", train_loss=0.5, name="ünïcode").model_copy(
        update={"level": "warning", "step": 7}
    )
    look(record)
    assert store.records("r") == [record.model_copy(update={"cursor": "1"})]


def test_a_record_without_a_time_gets_that_of_the_observation(
    store: RunStore, look: Callable[..., None]
) -> None:
    """In the order of the provider, and the stored time never changes."""
    before = utc_now()
    look(*(told(text).model_copy(update={"at": None}) for text in "abc"))
    found = store.records("r")
    assert messages(found) == ["a", "b", "c"]
    assert {before <= (record.at or BEGINNING) <= utc_now() for record in found} == {True}
    assert store.records("r") == found


def test_a_stored_record_of_a_source_that_no_longer_exists_is_output(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Earlier versions stored any word."""
    look(told("x").model_copy(update={"source": "sample"}))
    assert [record.source for record in store.records("r")] == ["output"]


def test_a_log_goes_on_behind_any_cursor(store: RunStore, look: Callable[..., None]) -> None:
    """Whoever read half of it reads the other half, in pages of any size."""
    look(*(told(str(n), n) for n in range(10)))
    everything = store.records("r")
    for n, record in enumerate(everything):
        assert store.records("r", after=record.cursor) == everything[n + 1 :]
    assert store.records("r", after="4", limit=3) == everything[4:7]


@pytest.mark.parametrize(("count", "cursor"), [(0, "4"), (1, "3"), (3, "1"), (4, None), (9, None)])
def test_the_last_records_begin_after_a_cursor(
    store: RunStore, look: Callable[..., None], count: int, cursor: str | None
) -> None:
    """The log need not be read to find it."""
    look(*(told(str(n), n) for n in range(4)))
    assert store.cursor_before_last("r", count) == cursor
    assert len(store.records("r", after=cursor)) == min(count, 4)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.0", "٣", "3", "9" * 18, "9" * 40, "0:0:0"])
def test_a_cursor_that_was_never_given_out_is_refused(
    store: RunStore, look: Callable[..., None], cursor: str
) -> None:
    """A log that starts somewhere else would have a gap that nobody sees."""
    look(told("a"), told("b"))
    with pytest.raises(ConfigError, match="cursor"):
        store.records("r", after=cursor)


def test_records_of_one_look_are_put_in_order_of_time(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Events, checkpoints and the log itself come from separate lists."""
    look(told("c", 3), told("a", 1), told("b", 2), told("also b", 2))
    assert messages(store.records("r")) == ["a", "b", "also b", "c"]


def test_a_record_that_comes_late_goes_to_the_end_and_keeps_its_time_in_a_field(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Who has read past that time still gets it, and times never run backwards."""
    look(told("first", 10))
    look(told("late", 5, size=1))
    late = store.records("r", after="1")[0]
    assert late.at == BEGINNING + timedelta(seconds=10)
    assert late.fields == {"size": 1, "told_at": "2026-01-01T00:00:05.000000+00:00"}


def test_our_own_records_go_in_between(store: RunStore, look: Callable[..., None]) -> None:
    """A note changes the run and takes no part in the provider's log."""
    look(told("theirs", 1), cursor="p1")
    run = store.note("r", ended, [told("ours", 2, "watch")])
    assert run.status is TrainingStatus.COMPLETED
    assert store.provider_cursor("r") == "p1"
    assert messages(store.records("r")) == ["theirs", "ours"]


def test_of_two_looks_from_the_same_place_only_the_first_is_stored(
    store: RunStore, look: Callable[..., TrainingRun | None]
) -> None:
    """The second may even be the older one, so nothing of it counts."""
    assert look(told("a"), after=None, cursor="p1") is not None
    assert look(told("a"), after=None, cursor="p1", change=ended) is None
    assert messages(store.records("r")) == ["a"]
    assert store.get("r").status is TrainingStatus.RUNNING


def test_two_processes_that_store_the_same_looks_store_each_once(
    store: RunStore, url: str, running: MakeRun
) -> None:
    """No record is doubled, none is missing, whoever was faster."""
    store.insert(running("r"))
    stored = at_once(2, "look", url)
    assert sum(map(int, stored)) == LOOKS
    wanted = [f"{n}.{i}" for n in range(LOOKS) for i in range(EACH)]
    assert messages(store.records("r")) == wanted


def test_nothing_is_stored_of_a_look_that_cannot_be_stored_whole(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Run, records and cursor change together or not at all."""

    def fails(run: TrainingRun) -> TrainingRun:
        raise LookupError(run.id)

    look(told("a"), cursor="p1")
    with pytest.raises(LookupError):
        look(told("b"), cursor="p2", change=fails)
    assert store.provider_cursor("r") == "p1"
    assert messages(store.records("r")) == ["a"]


def test_a_run_that_is_not_there_cannot_be_looked_at(store: RunStore) -> None:
    """It may have been deleted while its provider was asked."""
    with pytest.raises(RunNotFound):
        store.observed("gone", same, after=None, cursor="p1")


def test_a_log_is_complete_with_the_observation_that_sees_the_end(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Only then there is nothing left to ask for."""
    look(told("a"))
    assert not store.is_complete("r")
    look(told("b"), change=ended)
    assert store.is_complete("r")


def test_an_end_without_a_look_leaves_the_log_open(
    store: RunStore, look: Callable[..., None]
) -> None:
    """A status alone tells nothing of what the provider has logged."""
    store.update("r", ended)
    store.note("r", same, [told("seen to be over", source="watch")])
    assert not store.is_complete("r")


def test_a_run_that_we_end_has_a_whole_log(store: RunStore, look: Callable[..., None]) -> None:
    """A provider that has lost a run will not tell more of it."""
    store.note("r", ended, [told("lost", source="watch")])
    assert store.is_complete("r")


# -- metrics -----------------------------------------------------------------------------


def test_metrics_are_taken_from_records_with_a_step(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Of what is measured; not from texts, counts, other records or what is no number."""
    measured = told("m", 1, "metrics", train_loss=2, lr=0.1, total_steps=9, note="x", ok=True)
    wrong = told("m", 2, "metrics", train_loss=math.nan, lr=math.inf, much=10**400)
    look(
        measured.model_copy(update={"step": 1}),
        wrong.model_copy(update={"step": 2}),
        told("c", 3, "checkpoint", valid_loss=1.5).model_copy(update={"step": 2}),
        told("e", 4, "event", train_loss=7.0).model_copy(update={"step": 3}),
        told("m", 5, "metrics", train_loss=8.0),
    )
    second = timedelta(seconds=1)
    assert store.metrics("r") == [
        MetricPoint(1, BEGINNING + second, "lr", 0.1),
        MetricPoint(1, BEGINNING + second, "train_loss", 2.0),
        MetricPoint(2, BEGINNING + 3 * second, "valid_loss", 1.5),
    ]


def test_metrics_are_read_on_from_a_step(store: RunStore, look: Callable[..., None]) -> None:
    """A tracker reads each value once, and only what it shows."""
    measured = [told("m", n, "metrics", train_loss=1.0, lr=0.1) for n in (1, 2, 3)]
    look(*(record.model_copy(update={"step": n}) for n, record in enumerate(measured, 1)))
    found = store.metrics("r", after_step=1, names=["train_loss"])
    assert [(it.step, it.name) for it in found] == [(2, "train_loss"), (3, "train_loss")]


def test_metrics_become_a_table(store: RunStore, look: Callable[..., None]) -> None:
    """A row for each step, a column for each metric; what a step lacks is missing."""
    pytest.importorskip("pandas")
    look(
        told("m", 1, "metrics", a=1.0).model_copy(update={"step": 1}),
        told("m", 2, "metrics", a=2.0, b=3.0).model_copy(update={"step": 2}),
    )
    frame = store.metrics("r").to_frame()
    assert (list(frame.index), list(frame.columns)) == ([1, 2], ["a", "b"])
    assert frame["a"].tolist() == [1.0, 2.0]
    assert frame["b"].isna().tolist() == [True, False]


@pytest.mark.parametrize("together", [True, False], ids=["one look", "two looks"])
@pytest.mark.parametrize("order", [1, -1], ids=["step first", "checkpoint first"])
def test_a_checkpoint_changes_no_measure_of_its_step(
    store: RunStore, look: Callable[..., None], order: int, *, together: bool
) -> None:
    """A provider may give a mean under the same name; what only the checkpoint has is kept."""
    step = told("m", 1, "metrics", train_loss=2.0, lr=0.1)
    point = told("c", 1, "checkpoint", train_loss=4.0, valid_loss=3.0)
    found = [record.model_copy(update={"step": 10}) for record in (step, point)][::order]
    for batch in [found] if together else [[record] for record in found]:
        look(*batch)
    assert {point.name: point.value for point in store.metrics("r")} == {
        "lr": 0.1,
        "train_loss": 2.0,
        "valid_loss": 3.0,
    }


def test_checkpoints_alone_are_the_series(store: RunStore, look: Callable[..., None]) -> None:
    """Not every provider tells of single steps; a checkpoint told of again counts as it is then."""
    for second, loss in ((1, 3.0), (2, 2.5)):
        look(told("c", second, "checkpoint", train_loss=loss).model_copy(update={"step": 10}))
    look(told("m", 3, "metrics", train_loss=9.0).model_copy(update={"step": 11}))
    assert [(point.step, point.value) for point in store.metrics("r")] == [(10, 2.5), (11, 9.0)]


def test_a_value_told_again_replaces_the_first(store: RunStore, look: Callable[..., None]) -> None:
    """A run that resumed from a checkpoint goes through the same steps again."""
    for second, loss in ((1, 3.0), (2, 2.0)):
        look(told("m", second, "metrics", train_loss=loss).model_copy(update={"step": 1}))
    assert [point.value for point in store.metrics("r")] == [2.0]


def test_numbers_that_no_database_holds_do_not_stop_the_log(
    store: RunStore, look: Callable[..., None]
) -> None:
    """A provider that tells nonsense is still listened to."""
    look(told("m", 0, "metrics", train_loss=1.0).model_copy(update={"step": 10**30}))
    look(
        told("m", 1, "metrics", train_loss=5e-324, **{"x" * 3000: 1.0, "\0": 1.0}).model_copy(
            update={"step": 2**62}
        )
    )
    assert messages(store.records("r")) == ["m", "m"]
    assert [(it.step, it.name, it.value) for it in store.metrics("r")] == [
        (2**62, "train_loss", 5e-324)
    ]


def test_a_character_that_not_every_database_has_does_not_stop_the_log(
    store: RunStore, look: Callable[..., None]
) -> None:
    """What a child process wrote may hold anything."""
    look(told("a\0b\U0001f600", 0, "engine", line="c\0"))
    (record,) = store.records("r")
    assert (record.message, record.fields) == ("a\ufffdb\U0001f600", {"line": "c\0"})


# -- deliveries --------------------------------------------------------------------------


def test_events_wait_to_be_delivered_and_go_once(
    store: RunStore, look: Callable[..., None], running: MakeRun
) -> None:
    """Oldest first, whatever the run; metrics and the engine's own words are no events."""
    store.insert(running("s"))
    look(told("a", 1), told("m", 2, "metrics"), told("log", 3, "engine"))
    store.note("s", same, [told("b", 0, "status"), told("c", 1, "watch")])
    look(told("d", 4, "checkpoint"))
    waiting = store.undelivered(backend="scripted", limit=10)
    assert [(event.run_id, event.record.message) for event in waiting] == [
        ("r", "a"),
        ("s", "b"),
        ("s", "c"),
        ("r", "d"),
    ]
    assert waiting[0].record == store.records("r")[0]
    store.delivered([event.id for event in waiting[:2]])
    assert store.undelivered(backend="scripted", limit=1) == waiting[2:3]


def test_events_are_delivered_by_backend(store: RunStore, look: Callable[..., None]) -> None:
    """Watchers may share the work by backend."""
    look(told("a"))
    assert store.undelivered(backend="another", limit=10) == []


def test_who_lost_its_lease_marks_nothing_as_delivered(
    store: RunStore, look: Callable[..., None]
) -> None:
    """Whoever took over tells of it."""
    look(told("a"))
    lease = store.take("watch", "me", timedelta(0), is_gone=lambda _: None)
    store.take("watch", "other", timedelta(hours=1), is_gone=lambda _: None)
    waiting = store.undelivered(backend="scripted", limit=10)
    with pytest.raises(LeaseLost):
        store.delivered([waiting[0].id], lease=lease)
    assert store.undelivered(backend="scripted", limit=10) == waiting


def test_deleting_a_run_deletes_what_happened_in_it(
    store: RunStore, look: Callable[..., None], running: MakeRun
) -> None:
    """A new run with the same id has a log, metrics and events of its own."""
    look(told("m", 0, "checkpoint", valid_loss=1.0).model_copy(update={"step": 1}))
    store.delete("r")
    store.insert(running("r"))
    assert store.provider_cursor("r") is None
    assert store.records("r") == []
    assert store.metrics("r") == []
    assert store.undelivered(backend="scripted", limit=10) == []


def test_the_log_survives_the_process(
    store: RunStore, url: str, look: Callable[..., None], tmp_path: Path
) -> None:
    """Another store on the same file reads the same."""
    look(told("a"), told("b"))
    other = RunStore(url)
    assert other.records("r") == store.records("r")
    other.close()
