"""What a backend's tests provide to the conformance kit: the backend and its provider."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Final, Literal, TypeVar

from training_backends.core.backend import TrainingBackend
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.run import TrainingRun, new_run_id
from training_backends.testing.faults import Disturbance, disturbance
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.server import LoopbackServer

__all__ = ["CheckSkipped", "LoopbackSubject", "Subject", "Target", "expect", "needs"]

Target = Literal["create", "upload", "read", "any"]
"""The requests that a disturbance affects: those that create a job, upload a file, only read."""

MANY: Final = 1_000_000
"""Enough disturbances to last until `heal`."""


class CheckSkipped(Exception):
    """A check does not apply, or needs a hook that the subject lacks."""


class Subject(ABC):
    """A backend under test, and direct access to its provider.

    The methods below `optional hooks` are optional: checks that need a missing one are skipped.

    Attributes:
        backend: Ready to launch `config`.
        dataset: The dataset that `config.data` refers to.
        patience: Seconds within which each check must finish.
        page_size: Entries per page of the provider's lists; some checks create a few more.
    """

    backend: TrainingBackend
    config: TrainingConfig
    dataset: Dataset
    patience: float = 30.0
    page_size: int = 20

    @abstractmethod
    def reopen(self) -> TrainingBackend:
        """Create another backend object for the same provider, as another process would."""

    @abstractmethod
    def job_ids(self) -> Sequence[str]:
        """Return the ids of all jobs ever created at the provider."""

    @abstractmethod
    async def finish(self, remote_id: str) -> None:
        """Let a started job complete."""

    @abstractmethod
    async def fail(self, remote_id: str) -> None:
        """Let a started job fail."""

    async def confirm_stop(self, remote_id: str) -> None:  # noqa: B027  # most need none
        """Let a requested stop take effect; override if it does not do so by itself."""

    async def aclose(self) -> None:
        """Close the backend; override to also stop the provider."""
        await self.backend.aclose()

    # -- optional hooks ----------------------------------------------------------------

    def disturb(self, kind: Disturbance, *, on: Target = "any", times: int = 1) -> None:
        """Disturb the next requests; `faults.disturbance` returns the fault for each kind.

        Args:
            kind: `lose`: carried out, but the connection closes before the response; `drop`: not
                carried out, likewise; `html`: carried out, the response is a proxy's page;
                `hang`: no response; a number: not carried out, an error with this status code,
                whose body repeats the API key.
        """
        raise NotImplementedError

    def heal(self) -> None:
        """Remove all disturbances."""
        raise NotImplementedError

    def uploads(self) -> Sequence[str]:
        """Return the ids of all files ever uploaded."""
        raise NotImplementedError

    def lose_uploads(self) -> None:
        """Delete all files at the provider, as their expiry would."""
        raise NotImplementedError

    def starts(self, remote_id: str) -> int:
        """Return how often a job was started."""
        raise NotImplementedError

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        """Return the request that created a job."""
        raise NotImplementedError

    def say(self, remote_id: str, word: str) -> None:
        """Set a job's status to a word of the provider, known or not."""
        raise NotImplementedError

    def progress(self, remote_id: str, records: int) -> None:
        """Let a job run, and add this many records to its log."""
        raise NotImplementedError

    def connections(self) -> int:
        """Return the number of connections that are open at the provider."""
        raise NotImplementedError

    def requests(self) -> int:
        """Return the number of requests received so far."""
        raise NotImplementedError

    def secrets(self) -> Sequence[str]:
        """Return what no error may show, such as the API key."""
        raise NotImplementedError

    def lag_lists(self, times: int) -> None:
        """Leave the newest job out of this many of the next lists."""
        raise NotImplementedError

    # -- for checks --------------------------------------------------------------------

    def run(self, config: TrainingConfig | None = None) -> TrainingRun:
        """Create a run record as the client would."""
        chosen = config or self.config
        return TrainingRun(id=new_run_id(), backend=self.backend.name, config=chosen)

    async def launched(self, config: TrainingConfig | None = None) -> TrainingRun:
        """Launch, and return the record as the client would store it."""
        run = self.run(config)
        return run.updated(await self.backend.launch(run, MemoryJournal(run)))


class LoopbackSubject(Subject):
    """A subject whose provider is a `LoopbackServer`, with the hooks that need nothing else.

    Attributes:
        server: The provider, already started.
        key: The API key, which error responses repeat.
        create_path: End of the path of requests that create a job.
        upload_path: End of the path of requests that upload a file.
    """

    server: LoopbackServer
    key: str
    create_path: str
    upload_path: str = "/files"

    def disturb(self, kind: Disturbance, *, on: Target = "any", times: int = 1) -> None:
        """Inject the fault for this kind."""
        targets: Mapping[Target, tuple[str | None, str | None]] = {
            "create": ("POST", self.create_path),
            "upload": ("POST", self.upload_path),
            "read": ("GET", None),
            "any": (None, None),
        }
        method, path = targets[on]
        self.server.fail(disturbance(kind, echo=self.key), method=method, path=path, times=times)

    def heal(self) -> None:
        """Remove all faults."""
        self.server.heal()

    def connections(self) -> int:
        """Count the open connections."""
        return self.server.open_connections

    def requests(self) -> int:
        """Count the requests."""
        return len(self.server.requests)

    def secrets(self) -> Sequence[str]:
        """Return the key."""
        return [self.key]


_C = TypeVar("_C", bound=Callable[..., Awaitable[None]])


def needs(*hooks: str) -> Callable[[_C], _C]:
    """Skip a check if the subject lacks one of these hooks."""

    def decorate(check: _C) -> _C:
        @wraps(check)
        async def checked(self: object, subject: Subject) -> None:
            for name in hooks:
                if getattr(type(subject), name) is getattr(Subject, name):
                    raise CheckSkipped(f"the subject has no hook `{name}`")
            await check(self, subject)

        checked.hooks = hooks  # type: ignore[attr-defined]  # for the documentation
        return checked  # type: ignore[return-value]  # the same signature

    return decorate


def expect(condition: bool, what: str) -> None:  # noqa: FBT001  # reads like assert
    """Raise AssertionError unless the condition holds."""
    if not condition:
        raise AssertionError(f"expected {what}")
