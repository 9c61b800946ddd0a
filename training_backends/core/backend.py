"""The interface that every backend implements, and the types it uses."""

from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import anyio
from pydantic import BaseModel, SecretStr

from training_backends.core.backoff import Backoff
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
from training_backends.core.redaction import split_secret
from training_backends.core.run import (
    CleanText,
    LogRecord,
    Observation,
    Prompt,
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
"""The result type of a journal step."""


class CredentialSource(Protocol):
    """A source of secrets for backends."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the secret of `provider`.

        Raises:
            CredentialNotFound: No source has one.
            VaultLocked: The keyring was not unlocked in time.
        """
        ...

    async def get_all(self, provider: str, profile: str | None = None) -> Mapping[str, SecretStr]:
        """Return the secrets of a provider that needs several, by name.

        A stored secret that is a JSON object of strings holds one secret per name; any other is
        returned under the name `key`.

        Raises:
            CredentialNotFound: No source has any.
            VaultLocked: The keyring was not unlocked in time.
        """
        return split_secret(await self.get(provider, profile))


class Journal(Protocol):
    """The durable journal of a launch, from which a repeated launch continues."""

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """Run `do` at most once for this run and return its stored result.

        The step is recorded before `do` starts. Whether `do` took effect is decided by one rule:
        anything but a clear refusal may have happened (`core.errors.may_have_happened`).

        - `do` returns: its result is stored, and later calls return it without running anything.
        - `do` raises a refusal (nothing sent, rate limited, a 4xx class): the step is forgotten
          and the error raised; the next call runs `do` again.
        - `do` raises anything else: `find` is called at once. What it returns is the result; if it
          returns None, the error is raised and the step stays open.
        - The step is open, because of that or because the process died: `find` is called first,
          and `do` runs again only if it returns None.

        Steps may be nested, and different steps may run at the same time.

        Args:
            name: Unique within the run, for example `create`; at most 200 characters.
            do: Performs the side effect; returns a JSON value other than None.
            find: Returns the result of an earlier `do`, or None if it had no effect.
            repeatable: Repeating `do` is harmless, so no `find` is needed.

        Raises:
            AmbiguousLaunch: The step is open, not repeatable, and there is no `find`.
        """
        ...

    async def token(self, name: str) -> str:
        """Return a random value that stays the same for this run, of 32 hexadecimal digits.

        Use it as an idempotency key, or as a mark by which `find` recognizes a job: run ids are
        unique in one store, not in a provider's account.

        Args:
            name: Unique within the run.
        """
        ...

    async def upload(
        self,
        scope: str,
        sha256: str,
        do: Callable[[], Awaitable[str]],
        find: Callable[[], Awaitable[str | None]],
        has: Callable[[str], Awaitable[bool]],
    ) -> str:
        """Return the provider's id of uploaded content, uploading it if necessary.

        One upload serves all runs of the store, also those that are launched at the same time:
        they wait for it. Content that the provider has lost is uploaded again.

        Args:
            scope: Server and account that the id belongs to; not secret.
            sha256: Hex digest of the content.
            do: Uploads and returns the provider's id; governed by the rule of `step`.
            find: Returns the id of the content if the provider has it, else None.
            has: Returns whether the provider still has the file with this id.

        Raises:
            ProtocolError: The provider repeatedly lost the file.
        """
        ...

    async def record(self, state: RunState) -> None:
        """Store the state of the run; call it as soon as `remote_id` is known."""
        ...

    async def quote(self, estimate: Estimate) -> None:
        """Store the provider's quote, check the budget and ask the user for consent.

        Raises:
            BudgetExceeded: The run must not be started; clean up at the provider.
        """
        ...

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """Return which of these provider job ids belong to other runs."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """Report the progress of a step in bytes; nothing is stored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """The arguments of `TrainingBackend.create`.

    Attributes:
        home: Directory for all state on this machine.
        credentials: Source of secrets.
        settings: The loaded settings of `TrainingBackend.settings_model`; None: it has none.
    """

    home: Path
    credentials: CredentialSource
    settings: SectionSettings | None = None


class NoOptions(BaseModel, frozen=True, extra="forbid"):
    """The options model of a backend without options."""


class RemoteFilters(BaseModel, frozen=True, extra="forbid"):
    """Filters for listing a provider's jobs; None: no filter."""

    status: TrainingStatus | None = None
    model: str | None = None
    suffix: str | None = None

    def accept(self, *, status: TrainingStatus, model: str, suffix: str | None) -> bool:
        """Return whether a job passes all filters."""
        return (
            self.status in {None, status}
            and self.model in {None, model}
            and self.suffix in {None, suffix}
        )


class RemoteRun(BaseModel, frozen=True):
    """A job in the provider's list, also one that was created elsewhere.

    Attributes:
        run_id: Our run id, if the provider stores it.
        config: The configuration, as far as the provider returns it; data files may be given by
            the provider's file ids.
    """

    remote_id: str
    model: str
    state: RunState
    created_at: UtcDatetime | None = None
    run_id: str | None = None
    config: TrainingConfig | None = None


class Health(BaseModel, frozen=True):
    """The result of a backend's health check.

    Attributes:
        hint: How to fix a problem.
        configured: Whether the backend is set up here; otherwise a failure is expected.
        clock_offset: How far the server's clock is ahead of ours, to the second, if known.
    """

    ok: bool
    message: CleanText
    hint: CleanText | None = None
    configured: bool = True
    clock_offset: timedelta | None = None


class TrainingBackend(ABC):
    """A provider's training service.

    A backend stores no records of runs; durable state belongs to the client. Its module must be
    importable without its heavy dependencies, and instances must be cheap to create.
    """

    name: ClassVar[str]
    """The entry point's name."""
    summary: ClassVar[str] = ""
    """One-line description."""
    options_model: ClassVar[type[BaseModel]] = NoOptions
    """Schema of `TrainingConfig.options`."""
    settings_model: ClassVar[type[SectionSettings] | None] = None
    """The backend's section of the settings, with its name (`-` as `_`); see `BackendContext`."""

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend; override to use the context."""
        del context
        return cls()

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """The capabilities of this backend."""

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Shortest and longest polling interval of a run.

        Override if observing is cheaper or more expensive than a request to a server.
        """
        return timedelta(seconds=0.5), timedelta(minutes=1)

    @abstractmethod
    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Validate configuration and data without side effects at the provider.

        The client has already rejected fields that `capabilities` do not declare, and options that
        `options_model` does not accept. Whatever else is not supported must be reported as an
        issue, never silently ignored.

        Raises:
            BackendNotInstalled: A dependency of the backend is not installed.
        """

    @abstractmethod
    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Estimate tokens, steps, cost and duration without starting the run.

        Tokens are counted as `dataset.counting` says, which `tokens.count_tokens` observes; a
        backend that counts in another way may ignore it.
        """

    @abstractmethod
    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Launch the run at the provider and return once it is accepted.

        Every side effect must go through `journal`, so that calling `launch` again after a crash
        continues instead of starting a second run. Record `remote_id` as soon as it is known.

        Raises:
            BudgetExceeded: The provider's quote exceeds the budget; nothing was started.
            DuplicateRun: The provider rejects the run because a similar one exists.
            AmbiguousLaunch: It is unknown whether an earlier attempt succeeded.
            BackendRetired: The provider has discontinued the service.
        """

    @abstractmethod
    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Fetch the state of the run and the part of its log after a cursor.

        `status`, `logs` and the client are built on this. If the provider has no log, build it
        from events, status changes and checkpoints. See `Observation` for what cursors and states
        promise: if state and log need two requests, fetch the state first.

        Args:
            after: Cursor of a record or an observation of this run, perhaps made by another
                process; None: the beginning of the log.

        Raises:
            RunNotFound: The provider does not have the run.
            BackendUnavailable: No response after all retries.
            ConfigError: `after` is not a cursor of this backend.
        """

    async def status(self, run: TrainingRun) -> RunState:
        """Fetch the state of the run.

        Override if the state costs much less than the log.

        Raises:
            RunNotFound: The provider does not have the run.
            BackendUnavailable: No response after all retries.
        """
        return (await self.observe(run)).state

    async def logs(
        self, run: TrainingRun, *, after: str | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield the run's log in order, without gaps or duplicates.

        Consume the generator under `contextlib.aclosing`, in one task. An error ends it; to
        continue, pass the cursor of the last record as `after`.

        Args:
            after: Start after the record with this cursor.
            follow: Poll at `poll_interval` until the run has finished and its log is complete.
        """
        shortest, longest = (bound.total_seconds() for bound in self.poll_interval)
        polls = Backoff(shortest, longest)
        while True:
            seen = await self.observe(run, after=after)
            for record in seen.records:
                yield record
            if seen.more and seen.cursor != after:
                after = seen.cursor
                continue
            if seen.state.status.is_terminal or not follow:
                return
            if seen.records:
                polls.reset()
            after = seen.cursor
            await anyio.sleep(polls.next())

    @abstractmethod
    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Ask the provider to stop the run; return once the request is accepted.

        Safe to repeat: does nothing if the run is stopping or finished. The run may take minutes
        to stop; see `status`.

        Args:
            save_checkpoint: Save a checkpoint, if the provider can.

        Raises:
            RunNotFound: The provider does not have the run.
            BackendUnavailable: No response after all retries; the request may have arrived, so
                check `status`.
        """

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Continue `run` as `new_run`, from `checkpoint` or the newest one.

        The client calls this only if `Capabilities.resumes` allows it; a checkpoint is given only
        for `checkpoint`. The default is correct for `no` and `anew`: it launches `new_run`.

        Raises:
            UnsupportedOperation: The provider cannot resume runs.
        """
        del run, checkpoint
        if self.capabilities.resumes != "anew":
            raise self.unsupported("resume runs")
        return await self.launch(new_run, journal)

    async def pause(self, run: TrainingRun) -> None:
        """Ask the provider to pause the run; return once the request is accepted.

        Safe to repeat. Override together with `unpause` if runs can be paused.
        """
        del run
        raise self.unsupported("pause runs")

    async def unpause(self, run: TrainingRun) -> None:
        """Ask the provider to continue a paused run in place; see `pause`."""
        del run
        raise self.unsupported("pause runs")

    def tolerated_bad_rows(self, config: TrainingConfig) -> float:
        """Return the fraction of a file's rows that may be invalid under these options.

        Override if the provider can skip invalid rows; default: 0.
        """
        del config
        return 0.0

    def options_tolerating(self, fraction: float) -> dict[str, JSONValue]:
        """Return the options that skip up to this fraction of invalid rows.

        Override together with `tolerated_bad_rows`; default: no options.
        """
        del fraction
        return {}

    def sees(self, run: TrainingRun) -> bool:
        """Return whether a run can be observed from here; must not send requests.

        Override together with `RunState.place` if runs are tied to a machine. The client does
        not update runs that cannot be observed from here.
        """
        del run
        return True

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Fetch the states of many runs, by run id, in as few requests as possible.

        Unchanged runs must be included, possibly with few fields. Runs that are left out have
        changed or were not found; the client calls `observe` for them.

        Override if the provider can list many runs in one request; the default calls `status`
        for each run, five at a time.
        """
        found: dict[str, RunState] = {}

        async def ask(run: TrainingRun) -> None:
            with suppress(RunNotFound):
                found[run.id] = await self.status(run)

        await run_all((partial(ask, run) for run in runs), at_once=5)
        return found

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List all jobs of the account, also those created elsewhere; override if supported."""
        del filters
        raise self.unsupported("list the provider's jobs")

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Download the trained model to `target`, atomically, and return its path.

        Override if the provider offers weight downloads.
        """
        del run, target
        raise self.unsupported("download the trained model")

    async def download_checkpoint(self, run: TrainingRun, checkpoint: str, target: Path) -> Path:
        """Download the model as it was at a checkpoint; override if supported.

        The client calls this only if `Capabilities.downloads_checkpoints` is set. The run may be
        in progress or have failed.

        Raises:
            ConfigError: There is no such checkpoint.
        """
        del run, checkpoint, target
        raise self.unsupported("download a checkpoint")

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Prompt the trained model; override if supported.

        Args:
            prompt: A user's message; with `Capabilities.samples_chats` also a conversation.

        Raises:
            BackendUnavailable: The model cannot be loaded.
        """
        del run, prompt, max_tokens
        raise self.unsupported(
            "answer a prompt with the model of a run", "Use the provider's inference API."
        )

    async def delete(self, run: TrainingRun) -> None:
        """Delete a finished run and its model at the provider; override if supported."""
        del run
        raise self.unsupported("delete runs")

    async def remove_checkpoints(self, run: TrainingRun, steps: Collection[int]) -> None:
        """Remove the files of some checkpoints of a finished run, but not its model.

        Safe to repeat. Override together with `Capabilities.downloads_checkpoints`.
        """
        del run, steps
        raise self.unsupported("remove checkpoints")

    async def remove_log(self, run: TrainingRun) -> None:  # noqa: B027  # most have no files
        """Remove the files with the log of a finished run, which the store has by then.

        Safe to repeat. Override if the backend keeps such files; `observe` must still work.
        """

    async def suspend(self) -> int:
        """Save the progress of all runs that would end with this machine or container.

        Called before it shuts down; the runs continue once they are observed again. Override if
        runs are processes here. Returns when they are saved, with their number.
        """
        return 0

    async def health(self) -> Health:
        """Check that the backend works, at no cost; override to contact the provider."""
        return Health(ok=True, message="nothing to check")

    async def aclose(self) -> None:  # noqa: B027  # most backends have nothing to close
        """Close connections; the backend is not used afterwards."""

    def job_id(self, run: TrainingRun) -> str:
        """Return the provider's id of the job of a run.

        Raises:
            RunNotFound: The run has no job yet.
        """
        if run.remote_id is None:
            raise RunNotFound(
                f"Run {run.id} has no job at the provider yet.",
                hint=f"Run `training-backends launch --id {run.id}` with the same configuration "
                "to continue.",
                backend=self.name,
                run_id=run.id,
            )
        return run.remote_id

    @contextmanager
    def errors_of(self, run: TrainingRun) -> Generator[None, None, None]:
        """Add the run and the backend to every error within."""
        try:
            yield
        except TrainingBackendError as error:
            error.run_id = error.run_id or run.id
            error.backend = error.backend or self.name
            raise

    def unsupported(self, what: str, hint: str | None = None) -> TrainingBackendError:
        """Return the error for an operation that this backend does not support."""
        return UnsupportedOperation(
            f"The backend {self.name!r} cannot {what}.", backend=self.name, hint=hint
        )
