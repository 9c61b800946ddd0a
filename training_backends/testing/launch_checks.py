"""Checks of launches: each run becomes one job, with everything that was configured."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training_backends.core.backend import TrainingBackend
from training_backends.core.capabilities import Capabilities, config_issues
from training_backends.core.concurrency import run_all
from training_backends.core.config import ChatTemplate, DataSource, Result, TrainingConfig, Tuning
from training_backends.core.errors import (
    AuthenticationFailed,
    ConfigError,
    Issue,
    PermissionDenied,
    TrainingBackendError,
)
from training_backends.core.run import RunState
from training_backends.core.status import TrainingStatus
from training_backends.testing.faults import Disturbance
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.subject import MANY, CheckSkipped, Subject, expect, needs

__all__ = ["LaunchChecks"]

_TRIES = 6
"""How often a user repeats a launch that fails."""

Launch = Callable[[TrainingBackend, MemoryJournal], Awaitable[RunState]]


class LaunchChecks:
    """Checks of validation, launch and resume."""

    async def check_launch_makes_one_job(self, subject: Subject) -> None:
        """A launch creates one job, starts it, and records its id early."""
        run = subject.run()
        journal = MemoryJournal(run)
        state = await subject.backend.launch(run, journal)
        expect(list(subject.job_ids()) == [state.remote_id], "one job, with the returned id")
        expect(journal.run.remote_id == state.remote_id, "the id recorded in the journal")
        expect(state.status not in {TrainingStatus.READY, TrainingStatus.FAILED}, "a started job")
        expect(
            bool(journal.quotes) == subject.backend.capabilities.quotes,
            "a quote if and only if `quotes` is declared",
        )

    async def check_killed_anywhere_makes_one_job(self, subject: Subject) -> None:
        """A launch killed at any point and repeated creates one job."""
        async for remote_id in _killed_anywhere(subject, _launch):
            await subject.finish(remote_id)

    @needs("starts")
    async def check_killed_anywhere_starts_once(self, subject: Subject) -> None:
        """A launch killed at any point and repeated starts its job once."""
        async for remote_id in _killed_anywhere(subject, _launch):
            count = subject.starts(remote_id)
            expect(count == 1, f"one start of {remote_id}, not {count}")

    @needs("lag_lists")
    async def check_lagging_lists_make_one_job(self, subject: Subject) -> None:
        """A job that is not listed yet is not created again."""
        lag = partial(subject.lag_lists, 2)
        async for remote_id in _killed_anywhere(subject, _launch, then=lag):
            await subject.finish(remote_id)

    @needs("disturb", "heal")
    async def check_lost_answers_make_one_job(self, subject: Subject) -> None:
        """A launch that fails without a clear answer, and is repeated, creates one job."""
        kinds: tuple[Disturbance, ...] = ("lose", "html", "drop", 503)
        for kind in kinds:
            before = set(subject.job_ids())
            journal = MemoryJournal(subject.run())
            subject.disturb(kind, on="create", times=2)
            await _persist(subject, journal)
            subject.heal()
            made = set(subject.job_ids()) - before
            expect(len(made) == 1, f"one job after {kind!r}, not {len(made)}")
            expect(journal.run.remote_id in made, f"its id recorded after {kind!r}")

    @needs("disturb", "heal")
    async def check_rejected_launch_can_be_repeated(self, subject: Subject) -> None:
        """A rejected create request raises its error, and the next launch creates the job."""
        errors = {401: AuthenticationFailed, 403: PermissionDenied}
        for status, error in errors.items():
            before = set(subject.job_ids())
            journal = MemoryJournal(subject.run())
            subject.disturb(status, on="create", times=MANY)
            try:
                await subject.backend.launch(journal.run, journal)
            except error:
                subject.heal()
            else:
                raise AssertionError(f"expected {error.__name__} after {status}")
            expect(set(subject.job_ids()) == before, f"no job after {status}")
            await _persist(subject, journal)
            made = set(subject.job_ids()) - before
            expect(len(made) == 1, f"one job after {status}, not {len(made)}")

    @needs("disturb", "heal")
    async def check_other_jobs_are_not_adopted(self, subject: Subject) -> None:
        """The job of another client with the same configuration is never taken for ours."""
        other = await subject.launched()
        before = set(subject.job_ids())
        journal = MemoryJournal(subject.run())
        subject.disturb("drop", on="create", times=MANY)
        for _ in range(2):
            try:
                await subject.backend.launch(journal.run, journal)
            except TrainingBackendError:
                continue
            break
        subject.heal()
        expect(journal.run.remote_id != other.remote_id, "not the job of another run")
        await _persist(subject, journal)
        made = set(subject.job_ids()) - before
        expect(journal.run.remote_id in made and len(made) == 1, "a job of its own")

    async def check_parallel_launches_stay_apart(self, subject: Subject) -> None:
        """Launches at the same time on one object each create their own job."""
        seeds: list[int] = []
        configs = [subject.config] * 3
        tried = _with_numbers(subject.config, seed=11)
        if type(subject).asked is not Subject.asked and not await _issues(subject, tried):
            seeds = [11, 12, 13]
            configs = [_with_numbers(subject.config, seed=seed) for seed in seeds]
        journals = [MemoryJournal(subject.run(config)) for config in configs]
        states: dict[str, RunState] = {}

        async def launch(journal: MemoryJournal) -> None:
            states[journal.run.id] = await _launch(subject.backend, journal)

        await run_all(partial(launch, journal) for journal in journals)
        ids = [str(states[journal.run.id].remote_id) for journal in journals]
        expect(sorted(ids) == sorted(subject.job_ids()), "one job for each run")
        expect([j.run.remote_id for j in journals] == ids, "each id in the journal of its run")
        for seed, remote_id in zip(seeds, ids, strict=False):
            values = [str(value) for _, value in _leaves(subject.asked(remote_id))]
            expect(str(seed) in values, f"the job of each run to have its own seed, {seed}")

    @needs("uploads")
    async def check_each_content_is_uploaded_once(self, subject: Subject) -> None:
        """The second launch with the same data uploads nothing."""
        first = MemoryJournal(subject.run())
        await subject.backend.launch(first.run, first)
        before = list(subject.uploads())
        expect(bool(before), "an upload by the first launch")
        second = MemoryJournal(subject.run())
        second.uploads = first.uploads
        await subject.backend.launch(second.run, second)
        expect(list(subject.uploads()) == before, "no upload of the same content again")

    @needs("uploads", "lose_uploads")
    async def check_lost_files_are_uploaded_again(self, subject: Subject) -> None:
        """A file that the provider no longer has is not used."""
        first = MemoryJournal(subject.run())
        await subject.backend.launch(first.run, first)
        before = len(subject.uploads())
        subject.lose_uploads()
        second = MemoryJournal(subject.run())
        second.uploads = first.uploads
        state = await subject.backend.launch(second.run, second)
        expect(len(subject.uploads()) > before, "another upload")
        expect(state.remote_id != first.run.remote_id, "a job with the new file")

    @needs("uploads")
    async def check_validation_uploads_nothing(self, subject: Subject) -> None:
        """Neither validation nor an estimate uploads a file or creates a job."""
        await subject.backend.validate(subject.config, subject.dataset)
        await subject.backend.estimate(subject.config, subject.dataset)
        expect(not subject.uploads(), "no upload")
        expect(not subject.job_ids(), "no job")

    @needs("asked")
    async def check_fields_arrive_or_are_rejected(self, subject: Subject) -> None:
        """A field that is set changes the job, or is an issue that names it; none is dropped."""
        plain = [await self._request(subject, subject.config) for _ in range(2)]
        expect(None not in plain, "the configuration itself accepted")
        steady = {path for path, value in plain[0] or () if (path, value) in (plain[1] or ())}
        known = {entry for entry in plain[0] or () if entry[0] in steady}
        noise = {path for path, _ in (plain[0] or set()) | (plain[1] or set())} - steady
        for field, config in _variants(subject.config, subject.backend.capabilities):
            found = await _issues(subject, config)
            if _named(found, field):
                continue
            expect(not any(issue.severity == "error" for issue in found), f"no error for {field}")
            sent = await self._request(subject, config)
            if sent is None:
                continue
            if field == "result.checkpoint" and config.data != subject.config.data:
                last = config.model_copy(update={"result": Result()})
                without = await self._request(subject, last) or set()
            else:
                without = known
            changed = {entry for entry in sent ^ without if entry[0] not in noise}
            expect(bool(changed), f"`{field}` sent to the provider, or an issue that names it")

    async def _request(
        self, subject: Subject, config: TrainingConfig
    ) -> set[tuple[str, str]] | None:
        """Return what a launch asks of the provider; None if it is rejected."""
        try:
            run = await subject.launched(config)
        except ConfigError:
            return None
        asked = subject.asked(str(run.remote_id))
        return {(path, repr(value)) for path, value in _leaves(asked)}

    async def check_resume_makes_one_job(self, subject: Subject) -> None:
        """Resuming, killed at any point and repeated, creates one further job."""
        if subject.backend.capabilities.resumes == "no":
            raise CheckSkipped("the backend does not resume")
        old = await subject.launched()
        await subject.fail(str(old.remote_id))
        old = old.updated(await subject.backend.status(old))

        def resume(backend: TrainingBackend, journal: MemoryJournal) -> Awaitable[RunState]:
            return backend.resume(old, journal.run, journal)

        async for remote_id in _killed_anywhere(subject, resume):
            expect(remote_id != old.remote_id, "another job than that of the failed run")
            await subject.finish(remote_id)


async def _launch(backend: TrainingBackend, journal: MemoryJournal) -> RunState:
    return await backend.launch(journal.run, journal)


async def _killed_anywhere(
    subject: Subject, launch: Launch, *, then: Callable[[], None] = lambda: None
) -> AsyncIterator[str]:
    """Launch with a kill at each point in turn, each time repeated; yield the job of each.

    Args:
        then: Called between the kill and the next launch.
    """
    for point in range(1000):
        before = set(subject.job_ids())
        journal = MemoryJournal(subject.run(), kill_at=point)
        journal.others = frozenset(before)
        survived = await _launch_or_die(subject.backend, journal, launch)
        if not survived:
            journal.kill_at = None
            then()
            again = subject.reopen()
            try:
                await _launch_or_die(again, journal, launch)
            finally:
                await again.aclose()
        made = set(subject.job_ids()) - before
        expect(len(made) == 1, f"one job when killed at point {point}, not {len(made)}")
        expect(journal.run.remote_id in made, f"its id recorded, killed at point {point}")
        yield next(iter(made))
        if survived:
            return


async def _launch_or_die(backend: TrainingBackend, journal: MemoryJournal, launch: Launch) -> bool:
    try:
        await journal.record(await launch(backend, journal))
    except Killed:
        return False
    return True


async def _persist(subject: Subject, journal: MemoryJournal) -> None:
    """Repeat a launch until it succeeds, as a user would."""
    for left in reversed(range(_TRIES)):
        try:
            await journal.record(await subject.backend.launch(journal.run, journal))
        except TrainingBackendError:
            if not left:
                raise
        else:
            return


async def _issues(subject: Subject, config: TrainingConfig) -> tuple[Issue, ...]:
    """Return what the client and the backend object to."""
    backend = subject.backend
    undeclared = tuple(config_issues(config, backend.capabilities, backend.name))
    return undeclared or (await backend.validate(config, subject.dataset)).issues


def _named(issues: tuple[Issue, ...], field: str) -> bool:
    return any(
        issue.field and (field.startswith(issue.field) or issue.field.startswith(field))
        for issue in issues
    )


def _with_numbers(config: TrainingConfig, **values: float) -> TrainingConfig:
    numbers = config.hyperparameters.model_copy(update=values)
    numbers.model_fields_set.update(values)
    return config.model_copy(update={"hyperparameters": numbers})


def _variants(
    config: TrainingConfig, capabilities: Capabilities
) -> Iterator[tuple[str, TrainingConfig]]:
    """Yield a field and the configuration that sets it as well."""
    numbers: Mapping[str, float] = {
        "learning_rate": 3.7e-5,
        "epochs": 7,
        "training_steps": 23,
        "batch_size": 3,
        "seq_len": 1234,
        "weight_decay": 0.071,
        "warmup_fraction": 0.031,
        "fim_ratio": 0.31,
        "seed": 4711,
    }
    for name, value in numbers.items():
        other = {"epochs": "training_steps", "training_steps": "epochs"}.get(name)
        values = {name: value} if other is None else {name: value, other: None}
        yield f"hyperparameters.{name}", _with_numbers(config, **values)
    for first, *rest in [config.data.train] if config.data.train else []:
        if not config.data.validation:
            data = config.data.model_copy(update={"validation": (first,)})
            yield "data.validation", config.model_copy(update={"data": data})
        values = {name: getattr(first, name) for name in first.model_fields_set}
        weighted = DataSource.model_validate({**values, "weight": 2.5})
        data = config.data.model_copy(update={"train": (weighted, *rest)})
        yield "data.train.0.weight", config.model_copy(update={"data": data})
    resources = config.resources.model_copy(update={"gpus": 3})
    resources.model_fields_set.add("gpus")
    yield "resources.gpus", config.model_copy(update={"resources": resources})
    best = config.model_copy(update={"result": Result(checkpoint="best")})
    if capabilities.validation_files and not config.data.validation:
        data = config.data.model_copy(update={"validation": config.data.train[:1]})
        best = best.model_copy(update={"data": data})
    yield "result.checkpoint", best
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kit.jinja"
        path.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        template = ChatTemplate(path=path).pinned()
        yield "chat_template", config.model_copy(update={"chat_template": template})
    if config.suffix is None:
        yield "suffix", config.model_copy(update={"suffix": "kit"})
    yield "tuning", config.model_copy(update={"tuning": Tuning(kind="lora", rank=5)})


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of everything in a JSON document."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}.{index}")
    else:
        yield path, value
