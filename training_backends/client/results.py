"""Trained models of runs: downloads, uploads to the Hub and to object stores, and answers."""

import shutil
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal
from uuid import uuid4

import anyio
import msgspec
from anyio import from_thread, to_thread

from training_backends.client.boundary import callers_own
from training_backends.client.journal import OnProgress
from training_backends.client.leases import Leases
from training_backends.client.observe import Observer
from training_backends.client.preparation import check_cancelled
from training_backends.client.push import push_to_hub, read_hub_target
from training_backends.core.backend import CredentialSource, TrainingBackend
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import (
    ConfigError,
    RunNotFound,
    StoreError,
    TrainingBackendError,
)
from training_backends.core.estimate import format_duration
from training_backends.core.logging import get_logger, redact
from training_backends.core.run import (
    ChatMessage,
    LogRecord,
    Prompt,
    Reply,
    TrainingRun,
    utc_now,
)
from training_backends.core.status import TrainingStatus
from training_backends.objects.publish import MANIFEST, fetch, publish
from training_backends.objects.store import ObjectStore, scheme_of
from training_backends.store import RunStore
from training_backends.store.destinations import DueResult

__all__ = ["Results", "checked_prompt"]

log = get_logger()

_FIRST_PAUSE: Final = 5.0
_LONGEST_PAUSE: Final = 3600.0
"""Seconds between two attempts to copy a result."""


class Results:
    """Uses the trained models of runs; the methods are those of `AsyncTrainingClient`.

    Args:
        home: Directory for temporary copies.
        status: Returns a run as it is at its provider.
        object_options: Options of the object stores, by scheme.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        home: Path,
        status: Callable[[str], Awaitable[TrainingRun]],
        credentials: CredentialSource,
        object_options: Mapping[str, Mapping[str, Any]],
        store: RunStore,
        leases: Leases,
    ) -> None:
        self._store = store
        self._leases = leases
        self._observer = observer
        self._home = home
        self._status = status
        self._credentials = credentials
        self._object_options = object_options

    async def download(self, run_id: str, target: Path, checkpoint: str | None) -> Path:
        """Download the model of a run or of one of its checkpoints."""
        run = await self._status(run_id)
        backend = await self._observer.backend_of(run.backend)
        copy = destination_of(run)
        has_copy = checkpoint is None and copy is not None and copy == run.result_uri
        if has_copy and not backend.sees(run):
            return await self._fetch(str(copy), target)
        await self._observer.require_here(run, "download the model of")
        if checkpoint is not None:
            if not backend.capabilities.downloads_checkpoints:
                raise backend.unsupported("download a checkpoint", "Omit the checkpoint.")
            return await backend.download_checkpoint(run, checkpoint, target)
        if backend.capabilities.downloads:
            _require_model(backend, run, "download")
        try:
            return await backend.download(run, target)
        except RunNotFound:  # only the copy is left
            if not has_copy:
                raise
            return await self._fetch(str(copy), target)

    async def _fetch(self, url: str, target: Path) -> Path:
        def copy() -> bool:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise ConfigError(
                    f"{target} exists and is not empty.", hint="Choose a new directory."
                )
            return fetch(self._opened(url), target)

        if not await to_thread.run_sync(copy):
            raise RunNotFound(f"There is no complete copy of the result at {url}.")
        return target

    def _opened(self, url: str) -> ObjectStore:
        return ObjectStore(url, self._object_options.get(scheme_of(url)))

    def check_destination(self, config: TrainingConfig) -> None:
        """Check that the store of a run's destination can be used at all. Blocking.

        Raises:
            ConfigError: The URL or an option is invalid.
            BackendNotInstalled: The package of the store is not installed.
        """
        if config.result.destination is not None:
            self._opened(config.result.destination)

    async def deliver_due(self) -> None:
        """Copy results to the destinations of their runs, as far as they are due.

        A copy that fails is repeated later; the run's log says so.

        Raises:
            StoreError: The run store cannot be used.
        """
        for due in await to_thread.run_sync(self._store.due_results, utc_now()):
            await self._deliver(due)

    async def deliver(self, run: TrainingRun) -> TrainingRun:
        """Copy the result of a completed run now, unless it has been copied; return the run."""
        if run.status is not TrainingStatus.COMPLETED or destination_of(run) is None:
            return run
        due = await to_thread.run_sync(self._store.due_result, run.id)
        return run if due is None else (await self._deliver(due) or run)

    async def _deliver(self, due: DueResult) -> TrainingRun | None:
        async with self._leases.try_hold(f"result:{due.run_id}") as lease:
            if lease is None:  # another process copies it
                return None
            try:
                run = await to_thread.run_sync(self._store.get, due.run_id)
            except RunNotFound:
                return None  # deleted
            url = str(destination_of(run))
            try:
                backend = await self._observer.backend_of(run.backend)
                if not backend.sees(run):
                    return None
                await self.publish(run.id, url, checkpoint=None, on_progress=None)
            except StoreError:
                raise
            except (TrainingBackendError, OSError) as error:
                reason = redact(str(getattr(error, "message", error)))
                pause = timedelta(seconds=min(_FIRST_PAUSE * 2**due.attempts, _LONGEST_PAUSE))
                text = f"The result is not copied to {url} yet: {reason}"
                log.warning("result not copied", run_id=run.id, reason=reason)
                again = f"{text} It is tried again in {format_duration(pause)}."
                postpone = partial(self._store.postpone_result, run.id, utc_now() + pause)
                noted = await self._noted(run, again, "warning", run.result_uri)
                await to_thread.run_sync(postpone)
                return noted
            noted = await self._noted(run, f"The result is copied to {url}", "info", url)
            await to_thread.run_sync(self._store.result_copied, run.id)
            return noted

    async def _noted(
        self, run: TrainingRun, message: str, level: Literal["info", "warning"], uri: str | None
    ) -> TrainingRun:
        record = LogRecord(at=utc_now(), level=level, message=message, source="watch", cursor="")
        change = partial(_with_uri, uri=uri)
        return await to_thread.run_sync(self._store.note, run.id, change, [record])

    async def push(
        self,
        run_id: str,
        target: str,
        *,
        checkpoint: str | None,
        private: bool,
        profile: str | None,
    ) -> str:
        """Upload the model to the Hugging Face Hub."""
        repository = read_hub_target(target)
        token = await self._credentials.get("huggingface", profile)
        message = f"Upload the model of {run_id}"
        make = partial(
            TemporaryDirectory, prefix="push-", dir=self._home, ignore_cleanup_errors=True
        )
        with await to_thread.run_sync(make) as directory:
            model = await self.download(run_id, Path(directory, "model"), checkpoint)
            return await push_to_hub(model, repository, token, private=private, message=message)

    async def publish(
        self, run_id: str, url: str, *, checkpoint: str | None, on_progress: OnProgress | None
    ) -> str:
        """Copy the model to an object store."""
        store = await to_thread.run_sync(self._opened, url)
        try:
            await to_thread.run_sync(store.check)
        except RunNotFound as error:
            raise ConfigError(error.message, hint="Create the bucket.") from None
        directory = anyio.Path(self._home / "cache" / f"publish-{uuid4().hex}")
        try:
            await directory.mkdir(parents=True)
            path = await self.download(run_id, Path(directory / run_id), checkpoint)
            about = {"run": run_id, **({"checkpoint": checkpoint} if checkpoint else {})}

            def progress(name: str, done: int, total: int) -> None:
                check_cancelled()
                if on_progress:
                    with callers_own():
                        from_thread.run_sync(on_progress, name, done, total)

            await to_thread.run_sync(publish, path, store, about, progress)
        finally:
            with anyio.CancelScope(shield=True):
                remove = partial(shutil.rmtree, directory, ignore_errors=True)
                await to_thread.run_sync(remove)
        return store.place(MANIFEST)

    async def sample(self, run_id: str, prompt: Prompt, max_tokens: int) -> Reply:
        """Prompt the model."""
        prompt = checked_prompt(prompt)
        run, backend = await self._found(run_id, "ask the model of")
        if backend.capabilities.samples:
            _require_model(backend, run, "ask")
            if not (isinstance(prompt, str) or backend.capabilities.samples_chats):
                raise backend.unsupported(
                    "continue a conversation with the model of a run", "Give a single message."
                )
        return await backend.sample(run, prompt, max_tokens=max_tokens)

    async def _found(self, run_id: str, verb: str) -> tuple[TrainingRun, TrainingBackend]:
        run = await self._status(run_id)
        await self._observer.require_here(run, verb)
        return run, await self._observer.backend_of(run.backend)


def destination_of(run: TrainingRun) -> str | None:
    """Return the URL below which the result of a run is copied, if it is."""
    base = run.config.result.destination
    return None if base is None else f"{base.rstrip('/')}/{run.id}"


def _with_uri(run: TrainingRun, uri: str | None) -> TrainingRun:
    return run.model_copy(update={"result_uri": uri})


def checked_prompt(prompt: Prompt) -> Prompt:
    """Return a conversation of a single user message as that message, which all backends take.

    Raises:
        ValueError: A conversation is malformed, or does not end with the user.
    """
    if isinstance(prompt, str):
        return prompt
    try:
        messages = msgspec.convert([*prompt], list[ChatMessage])
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"prompt is neither a text nor a list of messages: {error}") from None
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("prompt: the last message of a conversation must be the user's")
    return messages[0]["content"] if len(messages) == 1 else messages


def _require_model(backend: TrainingBackend, run: TrainingRun, verb: str) -> None:
    if run.status is not TrainingStatus.COMPLETED:
        raise backend.unsupported(
            f"{verb} the model of a run that is {run.status}", "Only completed runs have a model."
        )
