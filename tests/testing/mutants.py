"""Single faults of the example backend, each with the check that must find it."""

import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint as yield_once
from test_tiny_openai import TinySubject
from tiny_openai import TinyBackend, job_path

from training_backends import (
    AuthenticationFailed,
    BackendUnavailable,
    Capabilities,
    ConfigError,
    Dataset,
    Estimate,
    Health,
    Journal,
    LogRecord,
    Observation,
    ProtocolError,
    RemoteFilters,
    RemoteRun,
    RunNotFound,
    RunState,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    ValidationReport,
)
from training_backends.plugins import HttpClient, JSONValue, KeySource

__all__ = ["MUTANTS", "Mutant", "Paging"]

KEY = TinySubject.key


@dataclass(frozen=True, slots=True)
class Mutant:
    """A faulty backend.

    Attributes:
        what: What is wrong with it.
        check: The check that finds it, without `check_`.
    """

    what: str
    kind: type[TinyBackend]
    check: str


MUTANTS: list[Mutant] = []


def mutant(what: str, check: str) -> Callable[[type[TinyBackend]], type[TinyBackend]]:
    def register(kind: type[TinyBackend]) -> type[TinyBackend]:
        MUTANTS.append(Mutant(what, kind, check))
        return kind

    return register


class Through:
    """A journal that passes everything on; mutants change one method."""

    def __init__(self, journal: Journal) -> None:
        self.to = journal

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        return await self.to.step(name, do, find, repeatable=repeatable)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.to, name)


def through(kind: type[Through]) -> type[TinyBackend]:
    """Make a backend that launches with this journal."""

    class Launching(TinyBackend):
        async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
            return await super().launch(run, kind(journal))

    return Launching


def declaring(**capabilities: Any) -> type[TinyBackend]:
    """Make a backend with other capabilities and the same methods."""

    class Declaring(TinyBackend):
        @property
        def capabilities(self) -> Capabilities:
            return super().capabilities.model_copy(update=capabilities)

    return Declaring


def stating(change: Callable[[RunState], Mapping[str, Any]]) -> type[TinyBackend]:
    """Make a backend whose states differ."""

    class Stating(TinyBackend):
        def _state(self, job: Any) -> RunState:
            state = super()._state(job)
            return state.model_copy(update=dict(change(state)))

    return Stating


def recording(change: Callable[[LogRecord], Mapping[str, Any]]) -> type[TinyBackend]:
    """Make a backend whose records differ."""

    class Recording(TinyBackend):
        def _record(self, event: Any) -> LogRecord:
            record = super()._record(event)
            return record.model_copy(update=dict(change(record)))

    return Recording


def observing(change: Callable[[Observation], Observation]) -> type[TinyBackend]:
    """Make a backend whose observations differ."""

    class Observing(TinyBackend):
        async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
            return change(await super().observe(run, after=after))

    return Observing


def requesting(change: Callable[[dict[str, Any]], object]) -> type[TinyBackend]:
    """Make a backend that changes the body of its create request in place."""

    class Requesting(TinyBackend):
        async def _request(self, run: TrainingRun, journal: Journal) -> dict[str, Any]:
            body = await super()._request(run, journal)
            change(body)
            return body

    return Requesting


def decoding(status: int, make: Callable[[str], Exception]) -> type[TinyBackend]:
    """Make a backend that raises another error for a status code."""

    class Decoding(TinyBackend):
        def connect(self, key: KeySource) -> HttpClient:
            http = super().connect(key)
            usual = http._decode_error

            def decode(code: int, headers: Mapping[str, str], body: bytes) -> Any:
                error = usual(code, headers, body)
                return make(error.message) if code == status else error

            http._decode_error = decode
            return http

    return Decoding


def creating(kind: type[Exception], make: Callable[[str], Exception]) -> type[TinyBackend]:
    """Make a backend whose create request raises another error instead of `kind`."""

    class Creating(TinyBackend):
        async def _create(self, body: dict[str, Any]) -> str:
            try:
                return await super()._create(body)
            except kind as error:
                raise make(str(error)) from error

    return Creating


Send = Callable[..., Awaitable[Any]]


def sending(send: Callable[..., Awaitable[Any]]) -> type[TinyBackend]:
    """Make a backend that requests documents with a function, which gets the usual one first."""

    class Sending(TinyBackend):
        def connect(self, key: KeySource) -> HttpClient:
            http = super().connect(key)
            http.json = partial(send, http.json)  # type: ignore[method-assign,assignment]
            return http

    return Sending


def asking(kind: type[Exception], make: Callable[[str], Exception]) -> type[TinyBackend]:
    """Make a backend whose every request raises another error instead of `kind`."""

    async def send(usual: Send, *args: Any, **request: Any) -> Any:
        try:
            return await usual(*args, **request)
        except kind as error:
            raise make(str(error)) from error

    return sending(send)


def put(what: str, check: str, kind: type[TinyBackend]) -> None:
    MUTANTS.append(Mutant(what, kind, check))


# -- launch ----------------------------------------------------------------------------

LOST = "lost_answers_make_one_job"
KILLED = "killed_anywhere_makes_one_job"
FIELDS = "fields_arrive_or_are_rejected"


async def _repeat(usual: Send, *args: Any, **request: Any) -> Any:
    return await usual(*args, **{**request, "repeatable": True})


put("the HTTP client repeats the create request", LOST, sending(_repeat))
put(
    "a lost response to create is raised as a rejection",
    LOST,
    creating(BackendUnavailable, ConfigError),
)
put("a web page in response to create is a rejection", LOST, creating(ProtocolError, ConfigError))
put(
    "a lost response to create is raised as not sent",
    LOST,
    creating(BackendUnavailable, lambda text: BackendUnavailable(text, sent=False)),
)


class _Repeating(Through):
    async def step(self, name: str, do: Any, find: Any = None, *, repeatable: bool = False) -> Any:
        return await self.to.step(name, do, repeatable=True)


class _Around(Through):
    async def step(self, name: str, do: Any, find: Any = None, *, repeatable: bool = False) -> Any:
        return await do()


class _FindFirst(Through):
    async def step(self, name: str, do: Any, find: Any = None, *, repeatable: bool = False) -> Any:
        return (await find() if find else None) or await do()


class _Silent(Through):
    async def record(self, state: RunState) -> None:
        """Store nothing."""


class _Hasty(Through):
    async def upload(self, scope: str, sha256: str, do: Any, find: Any, has: Any) -> Any:
        return await do()


class _Private(Through):
    async def upload(self, scope: str, sha256: str, do: Any, find: Any, has: Any) -> Any:
        return await self.to.step(f"upload:{sha256}", do, repeatable=True)


put("create is declared repeatable", KILLED, through(_Repeating))
put("create runs outside the journal", KILLED, through(_Around))
put("the job id is not recorded", "launch_makes_one_job", through(_Silent))


@mutant("the job is looked for once, although lists lag", "lagging_lists_make_one_job")
class _(TinyBackend):
    async def _find(self, metadata: dict[str, str]) -> str | None:
        jobs = await self.list_remote(RemoteFilters())
        return next((job.remote_id for job in jobs if job.run_id == metadata["run"]), None)


@mutant("find-or-create outside the journal", "lagging_lists_make_one_job")
class _(through(_FindFirst)):  # type: ignore[no-redef,misc]
    async def _find(self, metadata: dict[str, str]) -> str | None:
        jobs = await self.list_remote(RemoteFilters())
        return next((job.remote_id for job in jobs if job.run_id == metadata["run"]), None)


@mutant("any job of the same model is taken for ours", "other_jobs_are_not_adopted")
class _(TinyBackend):  # type: ignore[no-redef]
    async def _find(self, metadata: dict[str, str]) -> str | None:
        jobs = await self.list_remote(RemoteFilters())
        return jobs[0].remote_id if jobs else None


@mutant("the job is never found", LOST)
class _(TinyBackend):  # type: ignore[no-redef]
    async def _find(self, metadata: dict[str, str]) -> str | None:
        return None


@mutant("launch returns no job id", "launch_makes_one_job")
class _(TinyBackend):  # type: ignore[no-redef]
    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        state = await super().launch(run, journal)
        return state.model_copy(update={"remote_id": None})


put("each launch uploads its files again", "each_content_is_uploaded_once", through(_Hasty))
put("uploads are remembered for one run only", "each_content_is_uploaded_once", through(_Private))


@mutant("a file that the provider lost is used", "lost_files_are_uploaded_again")
class _(TinyBackend):  # type: ignore[no-redef]
    async def _has_file(self, file_id: str) -> bool:
        return True


@mutant("the run of a launch is kept on the object", "parallel_launches_stay_apart")
class _(TinyBackend):  # type: ignore[no-redef]
    async def _request(self, run: TrainingRun, journal: Journal) -> dict[str, Any]:
        self.current = run
        await anyio.sleep(0.01)
        return await super()._request(self.current, journal)


@mutant("the journal of a launch is kept on the object", "parallel_launches_stay_apart")
class _(TinyBackend):  # type: ignore[no-redef]
    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        self.journal = journal
        await anyio.sleep(0.01)
        return await super().launch(run, self.journal)


def _without(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(body: dict[str, Any]) -> None:
        *places, last = path
        for place in places:
            body = body[place]
        body.pop(last, None)

    return change


put("validation data is dropped", FIELDS, requesting(_without("validation_file")))
put("the suffix is dropped", FIELDS, requesting(_without("suffix")))
put("the seed is dropped", FIELDS, requesting(_without("seed")))
put("all hyperparameters are dropped", FIELDS, requesting(_without("method")))
put(
    "the batch size is dropped",
    FIELDS,
    requesting(_without("method", "supervised", "hyperparameters", "batch_size")),
)
put("a learning rate is declared and not sent", FIELDS, declaring(hyperparameters=None))
put("GPUs are declared and not sent", FIELDS, declaring(resources=frozenset({"gpus"})))
put("a chat template is declared and not sent", FIELDS, declaring(chat_template=True))
put(
    "the best checkpoint is declared and not requested",
    FIELDS,
    declaring(result_checkpoints=frozenset({"last", "best"})),
)
put("weights are declared and not sent", FIELDS, declaring(weights=True))
put("LoRA is declared and not sent", FIELDS, declaring(tunings=frozenset({"lora"})))


@mutant("validate uploads the data", "validation_uploads_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        run = TrainingRun(id="v", backend=self.name, config=config)
        await _upload(self, run)
        return await super().validate(config, dataset)


@mutant("estimate uploads the data", "validation_uploads_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        await _upload(self, TrainingRun(id="e", backend=self.name, config=config))
        return await super().estimate(config, dataset)


@mutant("validate creates a job", "validate_changes_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        run = TrainingRun(id="v", backend=self.name, config=config)
        await self.launch(run, _memory(run))
        return await super().validate(config, dataset)


@mutant("an estimate without a reason", "estimate_gives_reasons")
class _(TinyBackend):  # type: ignore[no-redef]
    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        return Estimate()


put("quotes are declared and not given", "launch_makes_one_job", declaring(quotes=True))
put(
    "a rejected create is reported as unavailable",
    "rejected_launch_can_be_repeated",
    creating(AuthenticationFailed, BackendUnavailable),
)


@mutant("resume creates its job outside the journal", "resume_makes_one_job")
class _(TinyBackend):  # type: ignore[no-redef]
    async def resume(self, run: Any, new_run: Any, journal: Any, **rest: Any) -> RunState:
        job_id = await self._create(await self._request(new_run, journal))
        state = RunState(status=TrainingStatus.PENDING, remote_id=str(job_id))
        await journal.record(state)
        return state


@mutant("resume returns the old job", "resume_makes_one_job")
class _(TinyBackend):  # type: ignore[no-redef]
    async def resume(self, run: Any, new_run: Any, journal: Any, **rest: Any) -> RunState:
        return await self.status(run)


# -- status and log --------------------------------------------------------------------

LIVE = "live_run_is_followed_to_its_end"
GAPS = "logs_have_no_gap_and_no_repeat"
WORDS = "unknown_word_is_unknown"
TIMES = "times_are_right"


@mutant("only the first page of a log is read", "long_logs_are_complete")
class _(TinyBackend):  # type: ignore[no-redef]
    async def _list(self, path: str, shape: Any) -> AsyncGenerator[Any, None]:
        count = 0
        async for item in super()._list(path, shape):
            yield item
            count += 1
            if count == self.page_size and path.endswith("events"):
                return


@mutant("the record of the cursor is repeated", GAPS)
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        seen = await super().observe(run, after=after)
        complete = (await super().observe(run)).records
        given = tuple(record for record in complete if record.cursor == after)
        return replace(seen, records=(*given, *seen.records))


put(
    "the oldest new record is skipped",
    "long_logs_are_complete",
    observing(lambda seen: replace(seen, records=seen.records[1:])),
)
put(
    "records are newest first",
    GAPS,
    observing(lambda seen: replace(seen, records=seen.records[::-1])),
)
put(
    "the newest record of a finished run is held back",
    "observation_has_state_and_log",
    observing(
        lambda seen: (
            replace(seen, records=seen.records[:-1], cursor=seen.records[-2].cursor)
            if len(seen.records) > 1
            else seen
        )
    ),
)
put("a cursor is the second of its record", GAPS, recording(lambda r: {"cursor": f"{r.at:%s}"}))


@mutant("cursors live in the memory of the object", "cursors_outlive_the_object")
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        self.known: set[str] = getattr(self, "known", set())
        seen = await super().observe(run, after=after if after in self.known else None)
        self.known |= {record.cursor for record in seen.records}
        return replace(seen, cursor=seen.cursor or after)


@mutant("an invalid cursor starts at the beginning", "invalid_cursor_is_rejected")
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        try:
            return await super().observe(run, after=after)
        except ConfigError:
            return await super().observe(run)


@mutant("following ends when nothing is new", LIVE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        while records := (await self.observe(run, after=after)).records:
            for record in records:
                yield record
            after = records[-1].cursor


@mutant("following does not advance its cursor", LIVE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        while True:
            seen = await self.observe(run, after=after)
            for record in seen.records:
                yield record
            if not follow or seen.state.status.is_terminal:
                return
            await anyio.sleep(0.01)


@mutant("following never ends", GAPS)
class _(TinyBackend):  # type: ignore[no-redef]
    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        async for record in super().logs(run, after=after, follow=follow):
            yield record
        if follow:
            await anyio.sleep_forever()


@mutant("following skips what came while it slept", LIVE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        async for record in super().logs(run, after=after):
            yield record
        while follow and not (await self.status(run)).status.is_terminal:
            await anyio.sleep(0.05)
            after = (await self.observe(run)).cursor
            async for record in super().logs(run, after=after):
                yield record


@mutant("a lost connection ends following", "lost_connection_does_not_end_following")
class _(TinyBackend):  # type: ignore[no-redef]
    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        self.http._policy = replace(self.http._policy, attempts=1)
        async for record in super().logs(run, after=after, follow=follow):
            yield record


@mutant("a finished run is running again at the second look", "end_is_final")
class _(TinyBackend):  # type: ignore[no-redef]
    def _state(self, job: Any) -> RunState:
        state = super()._state(job)
        self.looks = getattr(self, "looks", 0) + 1
        ended = state.status is TrainingStatus.COMPLETED and self.looks % 4 == 0
        return state.model_copy(update={"status": TrainingStatus.RUNNING}) if ended else state


@mutant("the first state is kept on the object", "end_is_final")
class _(TinyBackend):  # type: ignore[no-redef]
    def _state(self, job: Any) -> RunState:
        self.states: dict[str, RunState] = getattr(self, "states", {})
        return self.states.setdefault(job.id, super()._state(job))


def _unknown_as(status: TrainingStatus) -> Callable[[RunState], Mapping[str, Any]]:
    return lambda state: {"status": status} if state.status is TrainingStatus.UNKNOWN else {}


put("an unknown status is pending", WORDS, stating(_unknown_as(TrainingStatus.PENDING)))
put("an unknown status is failed", WORDS, stating(_unknown_as(TrainingStatus.FAILED)))
put("the provider's word is lost", WORDS, stating(lambda state: {"raw_status": None}))
put(
    "the provider's word is changed",
    WORDS,
    stating(lambda state: {"raw_status": (state.raw_status or "").lower()}),
)
put(
    "the times of records are hours off",
    TIMES,
    recording(lambda r: {"at": r.at and r.at + timedelta(hours=2)}),
)
put(
    "finished_at is hours off",
    TIMES,
    stating(lambda s: {"finished_at": s.finished_at and s.finished_at - timedelta(hours=8)}),
)
put(
    "seconds are read as milliseconds",
    TIMES,
    recording(lambda r: {"at": r.at and r.at - timedelta(days=20_000)}),
)


class Paging(TinyBackend):
    """Sound: returns the log in parts."""

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        seen = await super().observe(run, after=after)
        records = seen.records[:4]
        if len(records) == len(seen.records):
            return seen
        return replace(seen, records=records, cursor=records[-1].cursor, more=True)


def parts(change: Callable[[Observation], Observation]) -> type[TinyBackend]:
    """Make a backend whose parts of a log differ."""

    class Changed(Paging):
        async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
            return change(await super().observe(run, after=after))

    return Changed


MORE = "more_is_reported_while_there_is_more"

put("a part of the log is not marked", MORE, parts(lambda seen: replace(seen, more=False)))
put("every part of the log is marked", MORE, parts(lambda seen: replace(seen, more=True)))
put(
    "only parts of a live log are marked",
    MORE,
    parts(lambda seen: replace(seen, more=seen.more and not seen.state.status.is_terminal)),
)


@mutant("the cursor of a part is that of the end", MORE)
class _(Paging):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        end = (await TinyBackend.observe(self, run, after=after)).cursor
        return replace(await super().observe(run, after=after), cursor=end)


@mutant("the cursor of a part is the one that was given", MORE)
class _(Paging):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        seen = await super().observe(run, after=after)
        return replace(seen, cursor=after) if seen.more else seen


put("the result is not named", "ends_are_reported", stating(lambda s: {"result_model": None}))
put("the reason of a failure is lost", "ends_are_reported", stating(lambda s: {"failure": None}))
put(
    "a stopped run has failed",
    "stop_is_repeatable",
    stating(
        lambda s: {"status": TrainingStatus.FAILED} if s.status is TrainingStatus.CANCELLED else {}
    ),
)


@mutant("a run without a job is asked for as None", "run_without_job_is_not_found")
class _(TinyBackend):  # type: ignore[no-redef]
    def job_id(self, run: TrainingRun) -> str:
        return run.remote_id.strip()  # type: ignore[union-attr]


@mutant("`statuses` fails if one run is gone", "statuses_agree")
class _(TinyBackend):  # type: ignore[no-redef]
    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        return {run.id: await self.status(run) for run in runs}


@mutant("`statuses` returns what was recorded", "statuses_agree")
class _(TinyBackend):  # type: ignore[no-redef]
    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        return {run.id: RunState(status=run.status) for run in runs if run.id != "gone"}


@mutant("`status` and `observe` disagree", "observation_has_state_and_log")
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        seen = await super().observe(run, after=after)
        return replace(seen, state=seen.state.model_copy(update={"result_model": "another"}))


# -- errors ----------------------------------------------------------------------------

CLASSES = "errors_have_their_class"
BROKEN = "broken_answers_are_errors_of_this_package"
SECRETS = "errors_hide_secrets"

put("401 is raised as unavailable", CLASSES, decoding(401, BackendUnavailable))
put("403 is raised as a wrong key", CLASSES, decoding(403, AuthenticationFailed))
put("404 is raised as unavailable", "unknown_run_is_not_found", decoding(404, BackendUnavailable))
put("429 is raised as a rejection", CLASSES, decoding(429, ConfigError))
put("500 is raised as a rejection", CLASSES, decoding(500, ConfigError))
put("503 is raised as a missing run", CLASSES, decoding(503, RunNotFound))
put("503 raises KeyError", CLASSES, decoding(503, KeyError))
put("a lost connection raises OSError", BROKEN, asking(BackendUnavailable, OSError))
put("a web page raises ValueError", BROKEN, asking(ProtocolError, ValueError))
put(
    "the key is in a message",
    SECRETS,
    decoding(401, lambda text: AuthenticationFailed(f"{text} The key was {KEY}.")),
)
put(
    "the key is in a hint",
    SECRETS,
    decoding(401, lambda text: AuthenticationFailed(text, hint=f"Check {KEY}.")),
)


async def _with_cause(usual: Send, *args: Any, **request: Any) -> Any:
    try:
        return await usual(*args, **request)
    except BackendUnavailable as error:
        raise error from ValueError(f"GET /?key={KEY}")


put("the key is in the cause of an error", SECRETS, sending(_with_cause))


# -- stop ------------------------------------------------------------------------------


@mutant("stopping a finished run fails", "stop_of_finished_run_changes_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        if (await self.status(run)).status is TrainingStatus.COMPLETED:
            raise ConfigError("It is over.")
        await super().stop(run)


@mutant("a second stop fails", "stop_is_repeatable")
class _(TinyBackend):  # type: ignore[no-redef]
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        if (await self.status(run)).status is TrainingStatus.CANCELLED:
            raise ConfigError("It is stopped.")
        await super().stop(run)


@mutant("stop does not wait for the provider's answer", "stop_reports_rejection")
class _(TinyBackend):  # type: ignore[no-redef]
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        import asyncio  # noqa: PLC0415

        self.stopping = asyncio.ensure_future(super().stop(run))
        await yield_once()


@mutant("stop ignores errors", "stop_reports_rejection")
class _(TinyBackend):  # type: ignore[no-redef]
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        try:
            await super().stop(run)
        except TrainingBackendError:
            return


@mutant("stop does nothing", "stop_reports_rejection")
class _(TinyBackend):  # type: ignore[no-redef]
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        await self.status(run)


PAUSE = "pause_keeps_the_job"


@mutant("pause cancels the run", PAUSE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def pause(self, run: TrainingRun) -> None:
        await self.stop(run)


@mutant("unpause launches the run again", PAUSE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def unpause(self, run: TrainingRun) -> None:
        await super().unpause(run)
        await self.launch(run, _memory(run))


@mutant("a second pause fails", PAUSE)
class _(TinyBackend):  # type: ignore[no-redef]
    async def pause(self, run: TrainingRun) -> None:
        await self.http.json("POST", f"{job_path(self.job_id(run))}/pause")


# -- declared methods and lists --------------------------------------------------------

DECLARED = "declared_verbs_exist"
LACKING = "lacking_verbs_are_unsupported"

put("downloads are declared and missing", DECLARED, declaring(downloads=True))
put("samples are declared and missing", DECLARED, declaring(samples=True))
put("deletes work and are not declared", LACKING, declaring(deletes=False))
put("lists work and are not declared", LACKING, declaring(lists_remote=False))


@mutant("deletes are declared and missing", DECLARED)
class _(TinyBackend):  # type: ignore[no-redef]
    async def delete(self, run: TrainingRun) -> None:
        raise self.unsupported("delete")


@mutant("resumes are declared and missing", DECLARED)
class _(TinyBackend):  # type: ignore[no-redef]
    async def resume(self, *args: Any, **rest: Any) -> RunState:
        raise self.unsupported("resume")


@mutant("lists are declared and missing", DECLARED)
class _(TinyBackend):  # type: ignore[no-redef]
    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        raise self.unsupported("list")


def ignoring(*names: str) -> type[TinyBackend]:
    """Make a backend that ignores filters."""

    class Ignoring(TinyBackend):
        async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
            return await super().list_remote(filters.model_copy(update=dict.fromkeys(names, None)))

    return Ignoring


put("the filter by status is ignored", "lists_are_filtered", ignoring("status"))
put("the filter by model is ignored", "lists_are_filtered", ignoring("model"))
put("the filter by suffix is ignored", "lists_are_filtered", ignoring("suffix"))


@mutant("only the first page of jobs is listed", "lists_are_complete")
class _(TinyBackend):  # type: ignore[no-redef]
    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        return (await super().list_remote(filters))[: self.page_size]


@mutant("only finished jobs are listed", "listed_runs_include_ours")
class _(TinyBackend):  # type: ignore[no-redef]
    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        return [r for r in await super().list_remote(filters) if r.state.status.is_terminal]


# -- resources -------------------------------------------------------------------------

LEFT = "tasks_and_threads_end"
CANCEL = "calls_can_be_cancelled"
HEALTH = "health_reports_problems"


async def _block(usual: Send, *args: Any, **request: Any) -> Any:
    time.sleep(0.3)  # noqa: ASYNC251  # the fault
    return await usual(*args, **request)


put("each call blocks the event loop", "event_loop_stays_free", sending(_block))


@mutant("cancellation is swallowed", CANCEL)
class _(TinyBackend):  # type: ignore[no-redef]
    async def status(self, run: TrainingRun) -> RunState:
        try:
            return await super().status(run)
        except BaseException as error:
            if isinstance(error, TrainingBackendError):
                raise
            return RunState(status=TrainingStatus.UNKNOWN)


@mutant("calls are shielded from cancellation", CANCEL)
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        with anyio.CancelScope(shield=True):
            seen = await super().observe(run, after=after)
        return replace(seen)


@mutant("a cancelled call breaks the object", CANCEL)
class _(TinyBackend):  # type: ignore[no-redef]
    async def _job(self, job_id: str) -> Any:
        if getattr(self, "busy", False):
            raise ConfigError("There is a request in flight.")
        self.busy = True
        job = await super()._job(job_id)
        self.busy = False
        return job


@mutant("aclose leaves connections open", "connections_are_closed")
class _(TinyBackend):  # type: ignore[no-redef]
    async def aclose(self) -> None:
        _kept.append(self)


@mutant("each call opens a pool", "connections_are_closed")
class _(TinyBackend):  # type: ignore[no-redef]
    async def _job(self, job_id: str) -> Any:
        _kept.append(self.http)
        self._http = None
        return await super()._job(job_id)


_kept: list[object] = []


@mutant("a task is left running", LEFT)
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        import asyncio  # noqa: PLC0415

        self.task = asyncio.ensure_future(anyio.sleep(30))
        return await super().observe(run, after=after)


@mutant("a thread is left running", LEFT)
class _(TinyBackend):  # type: ignore[no-redef]
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        threading.Thread(target=time.sleep, args=(5,), daemon=True, name="poller").start()
        return await super().observe(run, after=after)


@mutant("a second aclose fails", "close_is_repeatable")
class _(TinyBackend):  # type: ignore[no-redef]
    async def aclose(self) -> None:
        await super().aclose()
        del self._key


@mutant("an unused backend cannot be closed", "close_is_repeatable")
class _(TinyBackend):  # type: ignore[no-redef]
    async def aclose(self) -> None:
        await self._http.aclose()  # type: ignore[union-attr]


@mutant("the constructor sends a request", "creation_sends_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    def __init__(self, settings: Any, key: Any) -> None:
        super().__init__(settings, key)
        request = urllib.request.Request(f"{settings.base_url}/models", headers={"api-key": KEY})
        urllib.request.urlopen(request).close()


@mutant("`capabilities` sends a request", "creation_sends_nothing")
class _(TinyBackend):  # type: ignore[no-redef]
    @property
    def capabilities(self) -> Capabilities:
        request = urllib.request.Request(
            f"{self.settings.base_url}/models", headers={"api-key": KEY}
        )
        urllib.request.urlopen(request).close()
        return super().capabilities


@mutant("health raises", HEALTH)
class _(TinyBackend):  # type: ignore[no-redef]
    async def health(self) -> Health:
        await self.http.json("GET", "/models")
        return Health(ok=True, message="it answers")


@mutant("health is always ok", HEALTH)
class _(TinyBackend):  # type: ignore[no-redef]
    async def health(self) -> Health:
        await super().health()
        return Health(ok=True, message="it answers")


@mutant("health hangs", HEALTH)
class _(TinyBackend):  # type: ignore[no-redef]
    async def health(self) -> Health:
        while not (health := await super().health()).ok:
            await anyio.sleep(0.05)
        return health


def _memory(run: TrainingRun) -> Any:
    from training_backends.testing.journal import MemoryJournal  # noqa: PLC0415

    return MemoryJournal(run)


async def _upload(backend: TinyBackend, run: TrainingRun) -> None:
    await backend._request(run, _memory(run))
