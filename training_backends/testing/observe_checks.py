"""Checks of status and log: complete, in order, in the contract's words, from any process."""

from collections.abc import Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Final

import anyio

from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import ConfigError, RunNotFound
from training_backends.core.run import LogRecord, Observation, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.testing.faults import Disturbance
from training_backends.testing.subject import Subject, expect, needs

__all__ = ["ObserveChecks", "unknown_to_provider"]

_CLOCK_SLACK: Final = timedelta(minutes=15)
"""How far the provider's clock may be from ours."""
_MOST_PARTS: Final = 1000
"""Observations of a log that `progress` made."""
_WORD: Final = "half_done"
"""A status that no provider has."""


class ObserveChecks:
    """Checks of observe, status, statuses and logs."""

    async def check_another_process_continues(self, subject: Subject) -> None:
        """A backend object that has never seen a run works from its record alone."""
        run = await subject.launched()
        other = subject.reopen()
        try:
            seen = await other.status(run)
            expect(seen.remote_id in {None, run.remote_id}, "the state of the same job")
            await subject.finish(str(run.remote_id))
            end = await other.status(run)
        finally:
            await other.aclose()
        expect(end.status is TrainingStatus.COMPLETED, f"completed, not {end.status}")

    async def check_ends_are_reported(self, subject: Subject) -> None:
        """Completion and failure are reported, with a result or a reason."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        good = await subject.backend.status(run)
        expect(good.status is TrainingStatus.COMPLETED, f"completed, not {good.status}")
        if subject.backend.capabilities.names_result:
            expect(good.result_model is not None, "the name of the result")
        run = await subject.launched()
        await subject.fail(str(run.remote_id))
        bad = await subject.backend.status(run)
        expect(bad.status is TrainingStatus.FAILED, f"failed, not {bad.status}")
        expect(bad.failure is not None and bool(bad.failure.message), "why it failed")

    async def check_end_is_final(self, subject: Subject) -> None:
        """Every observation of a finished run reports its end, also to another process."""
        run = await subject.launched()
        await subject.backend.observe(run)
        await subject.backend.status(run)
        await subject.finish(str(run.remote_id))
        other = subject.reopen()
        try:
            for backend in (subject.backend, other, subject.backend):
                for _ in range(2):
                    looks = [(await backend.observe(run)).state, await backend.status(run)]
                    for state in looks:
                        expect(
                            state.status is TrainingStatus.COMPLETED,
                            f"a finished run to stay completed, not {state.status}",
                        )
        finally:
            await other.aclose()

    async def check_statuses_agree(self, subject: Subject) -> None:
        """`statuses` returns every run whose status is unchanged, and nothing outdated."""
        runs = [await subject.launched() for _ in range(5)]
        runs = [run.updated(await subject.backend.status(run)) for run in runs]
        gone = runs[0].model_copy(update={"id": "gone", "remote_id": unknown_to_provider(runs[0])})
        together = await subject.backend.statuses([*runs, gone])
        expect("gone" not in together, "no state of a run that is unknown to the provider")
        for run in runs:
            alone = await subject.backend.status(run)
            found = together.get(run.id)
            expect(
                found is not None or alone.status is not run.status,
                f"the unchanged state of {run.id}",
            )
        for run in runs:
            await subject.finish(str(run.remote_id))
        reported = await subject.backend.statuses(runs)
        wrong = [name for name, state in reported.items() if not state.status.is_terminal]
        expect(not wrong, "no outdated state of a finished run")

    async def check_observation_has_state_and_log(self, subject: Subject) -> None:
        """An observation includes the complete log so far; the next one only what is new."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        *_, seen = await _parts(subject.backend, run)
        expect(seen.state.status.is_terminal, f"the end of the run, not {seen.state.status}")
        expect(await subject.backend.status(run) == seen.state, "the observed state as status")
        again = await subject.backend.observe(run, after=seen.cursor)
        expect(again.records == (), "no records after the last cursor of a finished run")
        expect(again.cursor == seen.cursor, "the same cursor while nothing is new")

    async def check_logs_have_no_gap_and_no_repeat(self, subject: Subject) -> None:
        """Following ends with the run, and every cursor yields exactly the rest."""
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        records = await _collect(subject.backend, run, follow=True)
        expect(bool(records), "at least one record")
        expect(len({r.cursor for r in records}) == len(records), "a unique cursor per record")
        times = [record.at for record in records if record.at is not None]
        expect(times == sorted(times), "records in order of time")
        for index, record in enumerate(records):
            rest = await _collect(subject.backend, run, after=record.cursor)
            expect(rest == records[index + 1 :], f"the records after number {index}")

    async def check_cursors_outlive_the_object(self, subject: Subject) -> None:
        """A cursor of one process continues in another."""
        run = await subject.launched()
        early = await subject.backend.observe(run)
        await subject.finish(str(run.remote_id))
        records = await _collect(subject.backend, run)
        cursors = [early.cursor, *(record.cursor for record in records[-2:])]
        for cursor in cursors:
            here = await _collect(subject.backend, run, after=cursor)
            other = subject.reopen()
            try:
                there = await _collect(other, run, after=cursor)
            finally:
                await other.aclose()
            expect(there == here, "the same records after a cursor from another process")

    async def check_invalid_cursor_is_rejected(self, subject: Subject) -> None:
        """A text that is no cursor raises ConfigError."""
        run = await subject.launched()
        try:
            await subject.backend.observe(run, after="no such cursor")
        except ConfigError:
            return
        raise AssertionError("expected ConfigError for an invalid cursor")

    @needs("progress")
    async def check_long_logs_are_complete(self, subject: Subject) -> None:
        """A log of several pages has neither a gap nor a repeat, from any cursor."""
        count = 2 * subject.page_size + 3
        run = await subject.launched()
        subject.progress(str(run.remote_id), 1)
        start = await _parts(subject.backend, run)
        subject.progress(str(run.remote_id), count)
        rest = await _parts(subject.backend, run, start[-1].cursor)
        new = _records(rest)
        expect(len(new) == count, f"{count} new records, not {len(new)}")
        complete = _records(await _parts(subject.backend, run))
        expect(_texts(complete) == _texts([*_records(start), *new]), "the same log from the start")

    @needs("progress")
    async def check_more_is_reported_while_there_is_more(self, subject: Subject) -> None:
        """An observation has all records, or says that there are more after its cursor."""
        run = await subject.launched()
        subject.progress(str(run.remote_id), 2 * subject.page_size + 3)
        for finished in (False, True):
            if finished:
                await subject.finish(str(run.remote_id))
            parts = await _parts(subject.backend, run)
            for part in parts[:-1]:
                rest = await subject.backend.observe(run, after=part.cursor)
                expect(bool(rest.records), "records after a cursor with `more`")
            last = await subject.backend.observe(run, after=parts[-1].cursor)
            expect(not last.records and not last.more, "no records after one without `more`")
        followed = await _collect(subject.backend, run, follow=True)
        expect(_texts(followed) == _texts(_records(parts)), "following to read all parts")

    @needs("progress")
    async def check_live_run_is_followed_to_its_end(self, subject: Subject) -> None:
        """Following a live run yields each record once, and ends with the run."""
        await _follow(subject, None)

    @needs("progress", "disturb", "heal")
    async def check_lost_connection_does_not_end_following(self, subject: Subject) -> None:
        """A single lost connection does not end following a live run."""
        kinds: tuple[Disturbance, ...] = ("lose", 503)
        for kind in kinds:
            await _follow(subject, kind)
            subject.heal()

    @needs("say")
    async def check_unknown_word_is_unknown(self, subject: Subject) -> None:
        """A status that is not known is `unknown`, and the provider's word is kept."""
        run = await subject.launched()
        for word in (_WORD, _WORD.upper()):
            subject.say(str(run.remote_id), word)
            seen = await subject.backend.observe(run)
            for state in (seen.state, await subject.backend.status(run)):
                expect(
                    state.status is TrainingStatus.UNKNOWN,
                    f"unknown for {word!r}, not {state.status}",
                )
                expect(state.raw_status == word, f"raw_status {word!r}, not {state.raw_status!r}")

    async def check_times_are_right(self, subject: Subject) -> None:
        """The times of states and records are those of the events, in UTC."""
        began = utc_now()
        run = await subject.launched()
        await subject.finish(str(run.remote_id))
        seen = await subject.backend.observe(run)
        state = seen.state
        times = {
            "started_at": state.started_at,
            "finished_at": state.finished_at,
            "changed_at": state.changed_at,
            **{f"the time of record {n}": record.at for n, record in enumerate(seen.records)},
        }
        for name, at in times.items():
            near = at is None or began - _CLOCK_SLACK <= at <= utc_now() + _CLOCK_SLACK
            expect(near, f"{name} to be about now, not {at}")

    async def check_unknown_run_is_not_found(self, subject: Subject) -> None:
        """Every request for an unknown run raises RunNotFound."""
        run = subject.run()
        unknown = unknown_to_provider(await subject.launched())
        await self._not_found(subject, run.model_copy(update={"remote_id": unknown}))

    async def check_run_without_job_is_not_found(self, subject: Subject) -> None:
        """Every request for a run that has no provider job id raises RunNotFound."""
        await self._not_found(subject, subject.run())

    async def _not_found(self, subject: Subject, run: TrainingRun) -> None:
        backend = subject.backend
        for ask in (backend.status, backend.observe, backend.stop):
            try:
                await ask(run)
            except RunNotFound:
                continue
            raise AssertionError(f"expected {ask.__name__} to raise RunNotFound")


async def _collect(
    backend: TrainingBackend, run: TrainingRun, *, after: str | None = None, follow: bool = False
) -> list[LogRecord]:
    async with aclosing(backend.logs(run, after=after, follow=follow)) as records:
        return [record async for record in records]


async def _parts(
    backend: TrainingBackend, run: TrainingRun, after: str | None = None
) -> list[Observation]:
    """Observe until there is nothing more."""
    parts: list[Observation] = []
    while not parts or parts[-1].more:
        parts.append(await backend.observe(run, after=after))
        if parts[-1].more:
            expect(parts[-1].cursor != after, "another cursor where there is more")
            expect(len(parts) < _MOST_PARTS, f"the log in fewer than {_MOST_PARTS} parts")
        after = parts[-1].cursor
    return parts


def _records(parts: Sequence[Observation]) -> list[LogRecord]:
    return [record for part in parts for record in part.records]


async def _follow(subject: Subject, kind: Disturbance | None) -> None:
    """Follow a run while it runs, with a disturbance in between if `kind` is given."""
    run = await subject.launched()
    job = str(run.remote_id)
    subject.progress(job, 2)
    count = len(_records(await _parts(subject.backend, run)))
    found: list[LogRecord] = []

    async def follow() -> None:
        async with aclosing(subject.backend.logs(run, follow=True)) as records:
            async for record in records:
                found.append(record)  # noqa: PERF401  # read while it grows

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        for _ in range(3):
            await _filled(found, count)
            await anyio.sleep(0.03)  # observe a few times without news
            if kind is not None:
                subject.disturb(kind, on="read")
            subject.progress(job, 2)
            count += 2
        await _filled(found, count)
        await subject.finish(job)
    complete = await _collect(subject.backend, run)
    expect(_texts(found) == _texts(complete), "each record of the log once, in order")


def _texts(records: Sequence[LogRecord]) -> list[str]:
    """Return records without what may depend on when the run was observed.

    That is the cursors, and the statuses that a backend reads from the state.
    """
    return [
        record.model_dump_json(exclude={"cursor"})
        for record in records
        if record.source != "status"
    ]


async def _filled(records: Sequence[LogRecord], count: int) -> None:
    """Wait until so many records have arrived."""
    while len(records) < count:  # noqa: ASYNC110  # filled by another task, one at a time
        await anyio.sleep(0.01)


def unknown_to_provider(run: TrainingRun) -> str:
    """Return an id in the provider's format that it never issued."""
    known = str(run.remote_id)
    return "".join("0" if letter.isalnum() else letter for letter in known)
