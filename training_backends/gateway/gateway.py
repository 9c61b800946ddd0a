"""Open and close a gateway and its services."""

import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import DuplicateRun, RunNotFound, StoreError
from training_backends.core.files import make_private_directory
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.cleanup import JobEnding
from training_backends.gateway.files import FileService
from training_backends.gateway.jobs import JobService
from training_backends.gateway.keys import KeyStore
from training_backends.gateway.models import ModelService
from training_backends.gateway.runner import JobRunner
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore
from training_backends.gateway.uploads import BlobStore, MinimumSpeed

__all__ = ["Gateway", "LinkSigner", "beside", "load_secret", "open_gateway"]

_SECRET_BYTES = 32


def load_secret(path: Path) -> bytes:
    """Return the gateway's signing secret, created on first use with mode 0600."""
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    if len(known) >= _SECRET_BYTES:
        return known  # a truncated secret could be guessed
    make_private_directory(path.parent)
    secret = secrets.token_bytes(_SECRET_BYTES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return secret


class LinkSigner:
    """Signs and verifies download URLs."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def path(self, file_id: str, hours: int) -> str:
        """Return the path and query of a URL that is valid for `hours`."""
        expires = int(time.time()) + hours * 3600
        return f"/files/{file_id}?expires={expires}&signature={self._sign(file_id, expires)}"

    def allows(self, file_id: str, expires: int, signature: str) -> bool:
        """Return whether the signature is genuine and not expired."""
        genuine = hmac.compare_digest(self._sign(file_id, expires).encode(), signature.encode())
        return genuine and time.time() < expires

    def _sign(self, file_id: str, expires: int) -> str:
        message = f"{file_id}\n{expires}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


@asynccontextmanager
async def beside() -> AsyncIterator[TaskGroup]:
    """Run tasks alongside a block, raising the block's own error unwrapped.

    A plain task group would wrap it in an exception group, so `except ConfigError` would miss it.
    """
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except BaseException as error:
                failure = error
                raise
    except BaseExceptionGroup:
        if failure is not None:
            raise failure from None
        raise


_NO_RUN = "none"
"""An id that no job has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """An open gateway with everything the HTTP routes need.

    Attributes:
        home: Directory with all of the gateway's state.
        client: Runs the jobs; a job's id is its run's id.
        public_url: URL that clients use, without a trailing slash.
    """

    settings: GatewaySettings
    home: Path
    public_url: str
    backend: str
    store: GatewayStore
    client: AsyncTrainingClient
    keys: KeyStore
    files: FileService
    jobs: JobService
    models: ModelService
    links: LinkSigner

    async def check(self) -> None:
        """Check that both databases can be read.

        Raises:
            StoreError: A database cannot be used.
        """
        await self.store.aread(lambda connection: connection.exec_driver_sql("SELECT 1 FROM keys"))
        with suppress(RunNotFound):
            await self.client.get(_NO_RUN)


@asynccontextmanager
async def open_gateway(
    settings: GatewaySettings,
    *,
    home: Path,
    url: str,
    backend: str,
    backends: Mapping[str, TrainingBackend] | None = None,
    vault: CredentialVault | None = None,
    blobs: BlobStore | None = None,
) -> AsyncIterator[Gateway]:
    """Open the gateway with its state in `<home>/gateway` and resume its jobs.

    Args:
        url: Listening URL, used in signed URLs unless the settings have a `public_url`.
        backend: Name of the training backend.
        backends: Backends to use instead of the registered ones.
        vault: Stores the API keys of jobs' integrations; default: the keyring.
        blobs: Storage for uploads; default: below the gateway's home.

    Raises:
        ConfigError: The backend or the catalogue cannot be used.
        BackendNotInstalled: The backend cannot be loaded.
        DuplicateRun: Another gateway is using this home.
        StoreError: A database is damaged or cannot be opened.
    """
    root = (home / "gateway").expanduser().absolute()
    vault = vault or CredentialVault(home=root)
    make_client = partial(AsyncTrainingClient, home=root, credentials=vault, backends=backends)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, await to_thread.run_sync(_lock_home, root))
        catalogue = await to_thread.run_sync(Catalogue.load, settings.catalogue)
        links = LinkSigner(await to_thread.run_sync(load_secret, root / "secret"))
        store = await to_thread.run_sync(GatewayStore, root / "gateway.db")
        stack.callback(store.close)
        client = await stack.enter_async_context(await to_thread.run_sync(make_client))
        await _check_run_store(client, root)
        found = await to_thread.run_sync(client.backend, backend)
        catalogue.check_options(found.options_model)
        files = FileService(
            store,
            blobs or BlobStore(root),
            limit=settings.max_upload_bytes,
            pace=MinimumSpeed(silence=settings.upload_timeout, rate=settings.min_upload_rate),
        )
        await files.open()
        tasks = await stack.enter_async_context(beside())
        stack.callback(tasks.cancel_scope.cancel)
        ending = JobEnding(store, files, vault)
        organization = settings.organization_id
        runner = JobRunner(store, client, files, tasks, organization_id=organization, on_end=ending)
        await runner.take_up()
        tasks.start_soon(files.sweep)
        yield Gateway(
            settings=settings,
            home=root,
            public_url=str(settings.public_url or url).rstrip("/"),
            backend=backend,
            store=store,
            client=client,
            keys=KeyStore(store, settings.api_key),
            files=files,
            jobs=JobService(
                store,
                client,
                files,
                runner,
                ending,
                backend=backend,
                catalogue=catalogue,
                secrets=vault,
                settings=settings,
            ),
            models=ModelService(
                store,
                client,
                backend=backend,
                catalogue=catalogue,
                organization_id=organization,
                opened_at=time.time(),
            ),
            links=links,
        )


async def _check_run_store(client: AsyncTrainingClient, root: Path) -> None:
    """Fail at start if the run store is damaged, which would block every job."""
    if problems := await client.check_store():
        raise StoreError(
            f"The gateway's run store in {root} cannot be used: {problems[0]}",
            hint=f"Run `TRAINING_BACKENDS_HOME={root} training-backends doctor --recover` to "
            "recover what is readable.",
        )


def _lock_home(root: Path) -> int:
    """Lock the home for this process; the kernel releases the lock when the process exits."""
    make_private_directory(root)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DuplicateRun(
            f"Another gateway is using {root}.",
            hint="Stop that gateway, or set TRAINING_BACKENDS_HOME to another directory.",
        ) from None
    return descriptor
