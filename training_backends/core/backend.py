"""The interface that every backend implements, and what it is handed to do so."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, SecretStr

from training_backends.core.capabilities import Capabilities
from training_backends.core.concurrency import run_all
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    RunNotFound,
    TrainingBackendError,
    UnsupportedOperation,
)
from training_backends.core.estimate import Estimate
from training_backends.core.run import (
    CleanText,
    LogRecord,
    Observation,
    Reply,
    RunState,
    TrainingRun,
    UtcDatetime,
    ValidationReport,
)
from training_backends.core.settings import SectionSettings
from training_backends.core.status import TrainingStatus

__all__ = [
    "BackendContext",
    "CredentialSource",
    "Health",
    "JSONValue",
    "Journal",
    "NoOptions",
    "RemoteFilters",
    "RemoteRun",
    "TrainingBackend",
]

JSONValue = None | bool | int | float | str | list[Any] | dict[str, Any]
"""What a journal step may return and remember."""


class CredentialSource(Protocol):
    """Where a backend gets its secrets."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the secret of `provider`.

        Raises:
            CredentialNotFound: No source has one.
            VaultLocked: The keyring did not open in time.
        """
        ...


class Journal(Protocol):
    """What one launch has done so far; durable, so that a repeated launch goes on there."""

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """Run `do` at most once for this run and return its (remembered) result.

        The step is durable before `do` starts. If it was begun before and is not known
        to be finished, `find` is asked first and only when it returns None is `do` tried
        again.

        Args:
            name: Unique within the run, for example `upload:<sha256>`.
            do: Changes the world; returns something JSON can hold, not None.
            find: Looks for the effect of an earlier `do`; None if there is none.
            repeatable: Doing it twice does no harm, so no `find` is needed.

        Raises:
            AmbiguousLaunch: Begun earlier, not repeatable, and there is no `find`.
        """
        ...

    async def record(self, state: RunState) -> None:
        """Store what is known by now, `remote_id` above all, as soon as it is known."""
        ...

    async def quote(self, estimate: Estimate) -> None:
        """Store the provider's own quote and let the budget and the user decide.

        Raises:
            BudgetExceeded: The run must not be started; undo what can be undone.
        """
        ...

    async def known_upload(self, scope: str, sha256: str) -> str | None:
        """Return the provider's id of a content that some run has uploaded before.

        It may be gone by now, so make sure that the provider still has it.

        Args:
            scope: Server and account that the id holds for; no secret.
            sha256: Of the content, in hex.
        """
        ...

    async def uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        """Remember the provider's id of a content for all runs."""
        ...

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """Return those of the provider's ids that belong to other runs."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """Tell whoever watches how far a step is (bytes); nothing is stored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """What a backend is made with.

    Attributes:
        home: Directory for all state on this machine.
        credentials: Where secrets come from.
    """

    home: Path
    credentials: CredentialSource


class NoOptions(BaseModel):
    """The options of a backend that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RemoteFilters(BaseModel):
    """Which of the provider's runs to list; None does not filter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: TrainingStatus | None = None
    model: str | None = None
    suffix: str | None = None


class RemoteRun(BaseModel):
    """A run as the provider lists it, whoever made it.

    Attributes:
        run_id: Our own id of it, where the provider keeps that.
        config: What it was made with, as far as the provider tells; the data files may be
            named by ids of the provider's.
    """

    model_config = ConfigDict(frozen=True)

    remote_id: str
    model: str
    state: RunState
    created_at: UtcDatetime | None = None
    run_id: str | None = None
    config: TrainingConfig | None = None


class Health(BaseModel):
    """Whether a backend works from here, and what to do if not.

    Attributes:
        configured: Whether somebody has set it up here; what nobody has need not work.
        clock_offset: How far its server's clock is ahead of ours, to the second, if known.
    """

    model_config = ConfigDict(frozen=True)

    ok: bool
    message: CleanText
    hint: CleanText | None = None
    configured: bool = True
    clock_offset: timedelta | None = None


class TrainingBackend(ABC):
    """One provider's training service behind seven verbs.

    A backend keeps no record of runs: everything durable belongs to the client. It must
    import without the heavy libraries it works with, and be cheap to create.
    """

    name: ClassVar[str]
    """The entry point's name."""
    summary: ClassVar[str] = ""
    """One line for people."""
    options_model: ClassVar[type[BaseModel]] = NoOptions
    """Checks `TrainingConfig.options`."""
    settings_model: ClassVar[type[SectionSettings] | None] = None
    """Its section of the settings, under its own name."""

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Make the backend from what the client offers; override to take some of it."""
        del context
        return cls()

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Time between two looks at a run: while much happens, and after long standstill.

        Override when looking is cheaper, or dearer, than asking a server.
        """
        return timedelta(seconds=0.5), timedelta(minutes=1)

    @abstractmethod
    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Say what would go wrong, before anything is uploaded or spent.

        Changes nothing at the provider. A field of `config` that this backend cannot
        honour is an issue, never silently dropped.

        Raises:
            BackendNotInstalled: What the backend needs is not installed.
        """

    @abstractmethod
    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Say what the run will take, as far as that is known without starting it."""

    @abstractmethod
    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Start the run at the provider and return once the start is accepted.

        Every step that changes the world goes through `journal`, so that calling again
        after a crash continues instead of starting a second run. `remote_id` is recorded
        as soon as it is known.

        Raises:
            BudgetExceeded: The provider's quote is above the budget; nothing was started.
            DuplicateRun: The provider refuses because a similar run exists.
            AmbiguousLaunch: It cannot be told whether an earlier try got through.
            BackendRetired: The provider has ended the service.
        """

    @abstractmethod
    async def status(self, run: TrainingRun) -> RunState:
        """Ask the provider where the run stands.

        Raises:
            RunNotFound: The provider does not know the run.
            BackendUnavailable: No answer within the retry budget.
        """

    @abstractmethod
    def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield the run's log in order, without gap or repeat.

        A provider that streams no logs gets them from its events, status changes and
        checkpoints. Consume it under `contextlib.aclosing`, in one task.

        Args:
            after: Go on behind the record with this cursor.
            follow: Stay until the run is terminal and everything was yielded, over
                dropped connections too.
        """

    @abstractmethod
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Ask the provider to end the run; return once it has agreed.

        Safe to repeat: an ending or ended run is left alone. The run is over when
        `status` says so, possibly minutes later.

        Args:
            save_checkpoint: Keep what was learnt so far, where the provider can.

        Raises:
            RunNotFound: The provider does not know the run.
            BackendUnavailable: No answer within the retry budget; the request may still
                have arrived, so ask `status`.
        """

    @abstractmethod
    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Continue `run` as `new_run`, from `checkpoint` or the newest one.

        Raises:
            UnsupportedOperation: The provider cannot continue a run.
        """

    def tolerated_bad_rows(self, config: TrainingConfig) -> float:
        """Return the share of a file's rows that may be unusable, as the options say.

        Override when the provider leaves such rows out; the default takes none.
        """
        del config
        return 0.0

    def options_tolerating(self, fraction: float) -> dict[str, JSONValue]:
        """Return the options under which so large a share of unusable rows is left out.

        Override together with `tolerated_bad_rows`; the default has none.
        """
        del fraction
        return {}

    def sees(self, run: TrainingRun) -> bool:
        """Return whether a run can be observed from here; quick, and without a request.

        Override together with `RunState.place` when runs are tied to a machine. The client
        neither asks about nor judges a run that cannot be observed from here.
        """
        del run
        return True

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Ask where the run stands and for its log behind a cursor, in one look.

        Override when one request tells both; the default asks for one after the other, so
        that the log of a run said to be over is whole.

        Raises:
            RunNotFound: The provider does not know the run.
            BackendUnavailable: No answer within the retry budget.
        """
        state = await self.status(run)
        async with aclosing(self.logs(run, after=after)) as log:
            records = [record async for record in log]
        return Observation(state, tuple(records), records[-1].cursor if records else after)

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Ask for many runs at once, by run id, in as few requests as the provider allows.

        A run that stands as its record says is told of, though perhaps only in short. One
        that is left out has changed, or the provider lost it: `observe` tells.

        Override when the provider answers for many runs in one request; the default asks
        one by one, five at a time.
        """
        found: dict[str, RunState] = {}

        async def ask(run: TrainingRun) -> None:
            with suppress(RunNotFound):
                found[run.id] = await self.status(run)

        await run_all((partial(ask, run) for run in runs), at_once=5)
        return found

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List the provider's runs, whoever made them; override when it can."""
        del filters
        raise self.unsupported("list the provider's runs")

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Fetch the finished model into `target` and return where it lies.

        Override when the provider hands out weights. `target` appears whole or not at all.
        """
        del run, target
        raise self.unsupported("download the trained model")

    async def sample(self, run: TrainingRun, prompt: str, *, max_tokens: int = 64) -> Reply:
        """Ask the finished model; override where it is at hand.

        Raises:
            BackendUnavailable: The model cannot be loaded.
        """
        del run, prompt, max_tokens
        raise self.unsupported(
            "answer a prompt with the model of a run", "Ask the provider's own service."
        )

    async def delete(self, run: TrainingRun) -> None:
        """Delete a terminal run and its result at the provider; override when it can."""
        del run
        raise self.unsupported("delete runs")

    async def health(self) -> Health:
        """Check that the backend works from here, at no cost; override to really ask."""
        return Health(ok=True, message="nothing to check")

    async def aclose(self) -> None:  # noqa: B027  # most backends hold nothing open
        """Release connections; the backend is not used afterwards."""

    def unsupported(self, what: str, hint: str | None = None) -> TrainingBackendError:
        """Make the error for a verb that this backend lacks."""
        return UnsupportedOperation(
            f"The backend {self.name!r} cannot {what}.", backend=self.name, hint=hint
        )
