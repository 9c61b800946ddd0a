"""Trained models of runs: downloads, uploads to the Hub and to object stores, and answers."""

import shutil
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import anyio
import msgspec
from anyio import from_thread, to_thread

from training_backends.client.boundary import callers_own
from training_backends.client.journal import OnProgress
from training_backends.client.observe import Observer
from training_backends.client.preparation import check_cancelled
from training_backends.client.push import push_to_hub, read_hub_target
from training_backends.core.backend import CredentialSource, TrainingBackend
from training_backends.core.errors import ConfigError, RunNotFound
from training_backends.core.run import ChatMessage, Prompt, Reply, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.objects.publish import MANIFEST, publish
from training_backends.objects.store import ObjectStore, scheme_of

__all__ = ["Results", "checked_prompt"]


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
    ) -> None:
        self._observer = observer
        self._home = home
        self._status = status
        self._credentials = credentials
        self._object_options = object_options

    async def download(self, run_id: str, target: Path, checkpoint: str | None) -> Path:
        """Download the model of a run or of one of its checkpoints."""
        run, backend = await self._found(run_id, "download the model of")
        if checkpoint is not None:
            if not backend.capabilities.downloads_checkpoints:
                raise backend.unsupported("download a checkpoint", "Omit the checkpoint.")
            return await backend.download_checkpoint(run, checkpoint, target)
        if backend.capabilities.downloads:
            _require_model(backend, run, "download")
        return await backend.download(run, target)

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
        options = self._object_options.get(scheme_of(url))
        store = await to_thread.run_sync(ObjectStore, url, options)
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
