"""Launches, journal and status machine against a provider that may do anything."""

import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import _GeneratorContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from training_backends import (
    AmbiguousLaunch,
    LogRecord,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import CredentialSource
from training_backends.protocols.mistral.status import JOB_STATUSES
from training_backends.testing.faults import CutAnswer, DropRequest, Fault, LoseAnswer, OtherAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import Received, StubReply
from training_backends.testing.stored import StoredJob

OVER = {"SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED"}
WORDS = [*JOB_STATUSES, "ON_HOLD", "PAUSED"]
PAGE = "<html>Something else is here</html>"
HALF = b'{"object": "list", "data": ['
TARGETS = [
    ("POST", "/jobs"),
    ("POST", "/start"),
    ("POST", "/files"),
    ("POST", "/cancel"),
    ("GET", "/jobs"),
    ("GET", None),
    (None, None),
]
FAULTS = [
    LoseAnswer(),
    DropRequest(),
    CutAnswer(),
    OtherAnswer(status=500, body={"detail": "sorry"}),
    OtherAnswer(status=500, body={"detail": "sorry"}, done=True),
    OtherAnswer(status=502, body=PAGE, content_type="text/html"),
    OtherAnswer(status=504, body=PAGE, content_type="text/html", done=True),
    OtherAnswer(status=200, body=PAGE, content_type="text/html", done=True),
    OtherAnswer(status=200, body=HALF, done=True),
    OtherAnswer(status=200, body=HALF),
    OtherAnswer(status=200, body={}, done=True),
    OtherAnswer(status=429, body={"message": "slow down"}, headers={"Retry-After": "0"}),
    OtherAnswer(status=503, body={"detail": "busy"}, headers={"Retry-After": "0"}),
    OtherAnswer(status=403, body={"detail": "not you"}),
    OtherAnswer(status=404, body={"detail": "what?"}),
    OtherAnswer(status=409, body={"detail": "A similar job is in progress."}),
]

WHAT = ["twin", "move", "lose files"]
PLANS = st.tuples(st.integers(0, 12), st.sampled_from(WHAT), st.sampled_from(WORDS))
MANY = 6


class Watched(ScriptedProvider):
    """Notes who starts what, and what had been shown before.

    Attributes:
        started: Job ids by the run that asked for their start.
        blind: Starts of a job while another one of the same run was shown, which waits too.
        before: Jobs that had been shown when a run's first create came.
        plans: What happens before one of the next requests that are no look at a single job.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key = None
        self.auto = "validate"
        self.started: dict[str, set[str]] = {}
        self.blind: list[str] = []
        self.before: dict[str, set[str]] = {}
        self.plans: list[tuple[int, Callable[[], None]]] = []
        self._shown: set[str] = set()

    def received(self, request: Received) -> _GeneratorContextManager[Fault | None]:
        """Note what was shown when a create comes, whatever becomes of it."""
        if request.method == "POST" and request.path.endswith("/jobs"):
            self.before.setdefault(self.owner, set(self._shown))
        return super().received(request)

    def answer(self, request: Received) -> StubReply:
        """Do what is planned, then what is asked."""
        # How often a job is looked at depends on the time that it takes: not counted.
        if request.method == "POST" or request.path.endswith("/jobs"):
            due = [act for left, act in self.plans if left <= 0]
            self.plans = [(left - 1, act) for left, act in self.plans if left > 0]
            for act in due:
                act()
        return super().answer(request)

    def _list_jobs(self, request: Received) -> StubReply:
        hidden = next(reversed(self.jobs), None) if self.lists_lag else None
        self._shown = {job_id for job_id in self.jobs if job_id != hidden}
        return super()._list_jobs(request)

    def _jobs(self, request: Received, rest: list[str]) -> StubReply:
        reply = super()._jobs(request, rest)
        if rest[1:] == ["start"]:
            self.started.setdefault(self.owner, set()).add(rest[0])
            twins = [
                job.id
                for job in self.waiting(self.owner)
                if job.id in self._shown and job.id != rest[0]
            ]
            if twins:
                self.blind.append(f"{rest[0]} started while {twins} wait")
        return reply

    def waiting(self, owner: str) -> list[StoredJob]:
        """Return the jobs of a run that are neither started nor over."""
        return [
            job
            for job in self.jobs.values()
            if job.owner == owner
            and not job.started
            # QUEUED behind validation says that it was started.
            and (
                job.status in {"VALIDATING", "VALIDATED"}
                or (job.status == "QUEUED" and job.metadata is None)
            )
        ]


class Ours:
    """A run as our side knows it."""

    def __init__(self, run: TrainingRun, source: "Ours | None" = None) -> None:
        self.journal = MemoryJournal(run)
        self.source = source
        self.accepted = False
        self.trouble: BaseException | None = None
        self.cursor: str | None = None
        self.told: list[LogRecord] = []
        self.end: TrainingStatus | None = None

    @property
    def run(self) -> TrainingRun:
        """The record."""
        return self.journal.run

    @property
    def root(self) -> str:
        """The id of the run that it all began with."""
        return self.run.id if self.source is None else self.source.root

    @property
    def goes_on(self) -> bool:
        """Whether launching it makes sense."""
        return not self.accepted and not self.run.status.is_terminal


class Key(CredentialSource):
    """Gives every process a key of its own, as nothing else is shared between processes."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._key = SecretStr(f"key-{next(self._numbers)}")

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return it."""
        del provider, profile
        return self._key


class AnythingGoes(RuleBasedStateMachine):
    """Every rule is an act of ours, in a process of its own, or of the provider's."""

    @initialize(similar=st.booleans(), newest_first=st.booleans())
    def begin(self, *, similar: bool, newest_first: bool) -> None:
        """Open the provider."""
        self.folder = TemporaryDirectory()
        self.data = Path(self.folder.name) / "train.jsonl"
        self.data.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
        self.provider = Watched()
        self.provider.refuses_similar = similar
        self.provider.newest_first = newest_first
        self.now = int(time.time())
        self.provider.clock = lambda: self.now
        self.provider.start()
        self.uploads: dict[tuple[str, str], str] = {}
        self.runs: list[Ours] = []
        self.numbers = itertools.count(1)
        self.add_run()

    def teardown(self) -> None:
        """Let everything come to rest; what is left over must be known."""
        if not hasattr(self, "provider"):
            return
        try:
            self.come_to_rest()
        finally:
            self.provider.stop()
            self.folder.cleanup()

    def add_run(self, source: Ours | None = None) -> Ours:
        """Write the record of a run."""
        config = TrainingConfig.model_validate(
            {
                "model": "open-mistral-7b",
                "data": {"train": self.data},
                "hyperparameters": {"training_steps": 10},
                "options": {"validate_timeout": 0.05},
            }
        )
        run = TrainingRun(id=f"run-{len(self.runs)}", backend="mistral", config=config)
        self.runs.append(Ours(run, source))
        self.runs[-1].journal.uploads = self.uploads
        return self.runs[-1]

    def act(self, ours: Ours, what: Callable[[MistralAPIBackend], Awaitable[Any]]) -> Any:
        """Do something in a process of its own; return what came of it, an error perhaps."""
        self.provider.owner = ours.run.id
        ours.journal.others = frozenset(
            other.run.remote_id for other in self.runs if other is not ours and other.run.remote_id
        )
        ours.journal.points = 0

        async def process() -> Any:
            backend = MistralAPIBackend(credentials=Key(), settings=self.quick())
            try:
                return await what(backend)
            except (TrainingBackendError, Killed) as trouble:
                return trouble
            finally:
                await backend.aclose()

        return anyio.run(process)

    def quick(self) -> MistralSettings:
        """Return settings that wait for nothing."""
        return MistralSettings(
            base_url=self.provider.base_url,
            poll_min=0.001,
            poll_max=0.002,
            settle_timeout=0.01,
            attempts=1,
            call_timeout=2.0,
            read_timeout=1.0,
        )

    def launch(self, ours: Ours, kill_at: int | None = None) -> None:
        """Start a run, or go on with that."""
        ours.journal.kill_at = kill_at
        source = ours.source

        async def start(backend: MistralAPIBackend) -> object:
            if source is not None:
                return await backend.resume(source.run, ours.run, ours.journal)
            return await backend.launch(ours.run, ours.journal)

        outcome = self.act(ours, start)
        ours.journal.kill_at = None
        ours.trouble = outcome if isinstance(outcome, BaseException) else None
        if ours.trouble is None:
            ours.journal.run = ours.run.updated(outcome)
            ours.accepted = True

    # -- what we do --------------------------------------------------------------------

    @rule(
        kill_at=st.one_of(st.none(), st.integers(0, 14)),
        late=st.one_of(st.none(), st.integers(1, 12)),
        plans=st.lists(PLANS, max_size=2),
    )
    def launch_some(
        self, kill_at: int | None, late: int | None, plans: list[tuple[int, str, str]]
    ) -> None:
        """Launch a run or go on with one, killed and disturbed on the way perhaps."""
        if late is not None:
            self.provider.late_creates.append(late)
        for after, what, word in plans:
            self.provider.plans.append((after, partial(self.disturb, what, word)))
        waiting = [ours for ours in self.runs if ours.goes_on]
        if waiting:
            self.launch(waiting[0], kill_at)
        elif len(self.runs) < MANY:
            self.launch(self.add_run(), kill_at)

    @precondition(lambda self: len(self.runs) < MANY)
    @rule()
    def launch_another(self) -> None:
        """Launch another run of the same configuration, whatever became of those before."""
        self.launch(self.add_run())

    def disturb(self, what: str, word: str) -> None:
        """Do something at the provider while a launch goes on."""
        jobs = list(self.provider.jobs.values())
        if what == "lose files":
            self.provider.files.clear()
        elif jobs and what == "twin":
            self.provider.add_job(jobs[-1].asked, word)
        elif jobs:
            self.provider.set_status(jobs[-1].id, word, n=next(self.numbers))

    @rule(number=st.integers(0, 9))
    def observe(self, number: int) -> None:
        """Look at a run; what the provider says of an end is true of the record then."""
        ours = self.runs[number % len(self.runs)]
        if ours.run.remote_id is None:
            return
        before = ours.run.status
        seen = self.act(ours, lambda backend: backend.observe(ours.run, after=ours.cursor))
        if isinstance(seen, BaseException):
            return
        ours.told += seen.records
        ours.cursor = seen.cursor
        ours.journal.run = ours.run.updated(seen.state)
        job = self.provider.jobs[str(ours.run.remote_id)]
        if job.status == "SUCCESS" and not before.is_terminal:
            assert ours.run.status is TrainingStatus.COMPLETED

    @rule(number=st.integers(0, 9))
    def stop(self, number: int) -> None:
        """Ask for the end of a run; once that is agreed, it ends or is ending."""
        ours = self.runs[number % len(self.runs)]
        if ours.run.remote_id is None or ours.run.status.is_terminal:
            return
        if self.act(ours, lambda backend: backend.stop(ours.run)) is None:
            job = self.provider.jobs[str(ours.run.remote_id)]
            assert job.status in {*OVER, "CANCELLATION_REQUESTED"}

    @precondition(lambda self: len(self.runs) < MANY)
    @rule(number=st.integers(0, 9))
    def resume(self, number: int) -> None:
        """Continue a run that ended badly as a new one."""
        ours = self.runs[number % len(self.runs)]
        if ours.run.status in {TrainingStatus.FAILED, TrainingStatus.CANCELLED}:
            self.launch(self.add_run(ours))

    # -- what the provider does --------------------------------------------------------

    @rule(
        fault=st.sampled_from(FAULTS),
        place=st.sampled_from(TARGETS),
        times=st.integers(1, 4),
        skip=st.integers(0, 3),
    )
    def break_down(
        self, fault: OtherAnswer, place: tuple[str | None, str | None], times: int, skip: int
    ) -> None:
        """Let some of the next requests go wrong."""
        method, path = place
        self.provider.fail(fault, method=method, path=path, times=times, skip=skip)

    @rule()
    def heal(self) -> None:
        """Work as it should."""
        self.provider.heal()
        self.provider.lists_lag = 0
        self.provider.plans.clear()

    @rule(after=st.integers(1, 25), answer_is_lost=st.booleans())
    def carry_out_late(self, after: int, *, answer_is_lost: bool) -> None:
        """Carry a create out only some requests later."""
        self.provider.late_creates.append(after)
        if answer_is_lost:
            self.provider.fail(LoseAnswer(), method="POST", path="/jobs")

    @rule(lag=st.integers(1, 6))
    def lag(self, lag: int) -> None:
        """Do not list the newest job for a while."""
        self.provider.lists_lag = lag

    @rule(number=st.integers(0, 20), word=st.sampled_from(WORDS), event=st.booleans())
    def move(self, number: int, word: str, *, event: bool) -> None:
        """Put any job into any state."""
        if self.provider.jobs:
            job_id = list(self.provider.jobs)[number % len(self.provider.jobs)]
            self.provider.set_status(job_id, word, event=event, n=next(self.numbers))

    @rule(number=st.integers(0, 20), step=st.integers(1, 50))
    def reach(self, number: int, step: int) -> None:
        """Let a job make a checkpoint."""
        if self.provider.jobs:
            job = list(self.provider.jobs.values())[number % len(self.provider.jobs)]
            self.provider.add_checkpoint(job.id, job.latest_step + step, train_loss=1.0)

    @rule(what=st.sampled_from(WHAT), word=st.sampled_from(WORDS))
    def do_something(self, what: str, word: str) -> None:
        """Lose the files, move the newest job, or let somebody else make one like it."""
        self.disturb(what, word)

    @rule(auto=st.sampled_from(["none", "validate", "complete"]))
    def be_moody(self, auto: Any) -> None:
        """Go on by itself, or not."""
        self.provider.auto = auto

    @rule(seconds=st.integers(1, 100))
    def wait(self, seconds: int) -> None:
        """Let time pass."""
        self.now += seconds

    # -- what holds at all times -------------------------------------------------------

    @invariant()
    def one_run_starts_one_job(self) -> None:
        """No run starts two jobs, no job is started by two runs, none starts blindly."""
        if not hasattr(self, "provider"):
            return
        started = self.provider.started
        assert all(len(jobs) == 1 for jobs in started.values())
        # A run may start the job of the one that it resumes, if a provider brings that back.
        roots = {(ours.root, job) for ours in self.runs for job in started.get(ours.run.id, ())}
        assert max(Counter(job for _, job in roots).values(), default=1) == 1
        assert self.provider.blind == []

    @invariant()
    def nothing_of_others_is_taken(self) -> None:
        """A run's job was not shown before its first create."""
        for ours in getattr(self, "runs", ()):
            if ours.source is None:
                assert ours.run.remote_id not in self.provider.before.get(ours.run.id, ())

    @invariant()
    def ends_are_final(self) -> None:
        """A run never leaves a terminal status."""
        for ours in getattr(self, "runs", ()):
            if ours.end is not None:
                assert ours.run.status is ours.end
            elif ours.run.status.is_terminal:
                ours.end = ours.run.status

    def come_to_rest(self) -> None:
        """Let the provider work again: each run starts or says why not, and no log has gaps."""
        self.heal()
        self.provider.late_creates.clear()
        self.provider.catch_up()
        self.provider.auto = "validate"
        for ours in self.runs:
            if ours.goes_on:
                self.launch(ours)
                self.nothing_is_forgotten(ours)
            self.log_is_whole(ours)
        self.one_run_starts_one_job()
        self.nothing_of_others_is_taken()
        self.ends_are_final()

    def nothing_is_forgotten(self, ours: Ours) -> None:
        """Whatever a run has created is a run's, or was named."""
        named = str(ours.trouble) if isinstance(ours.trouble, AmbiguousLaunch) else ""
        known = {other.run.remote_id for other in self.runs}
        waiting = {job.id for job in self.provider.waiting(ours.run.id)} - known
        left = [job_id for job_id in waiting if job_id not in named]
        assert not left or ours.run.remote_id is not None, f"{left} forgotten: {ours.trouble!r}"

    def log_is_whole(self, ours: Ours) -> None:
        """The cursors that were followed told every event and checkpoint, and each once."""
        if ours.run.remote_id is None:
            return
        rest = self.act(ours, lambda backend: backend.observe(ours.run, after=ours.cursor))
        whole = self.act(ours, lambda backend: backend.observe(ours.run))
        told = _numbered([*ours.told, *rest.records])
        assert told == _numbered(whole.records)
        assert set(told.values()) <= {1}


def _numbered(records: list[LogRecord] | tuple[LogRecord, ...]) -> Counter[str]:
    return Counter(
        f"{record.source} {record.step or record.fields.get('n')} {record.message}"
        for record in records
        if record.source == "checkpoint" or "n" in record.fields
    )


def test_anything_goes() -> None:
    """One job is started at most, none is forgotten, no end is left, no record lost or doubled."""
    run_state_machine_as_test(
        AnythingGoes,
        settings=settings(suppress_health_check=list(HealthCheck)),
    )
