"""Open and close a gateway and its services."""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

import anyio
import sqlalchemy as sa
from anyio import to_thread
from anyio.abc import TaskGroup

from training_backends.backends.local.interpreter import Interpreter
from training_backends.client.client import AsyncTrainingClient
from training_backends.client.leases import Leases
from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import StoreError
from training_backends.core.files import make_private_directory, write_atomic
from training_backends.core.run import utc_now
from training_backends.core.settings import load_settings
from training_backends.credentials.vault import CredentialVault
from training_backends.gateway.audit import AuditLog
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.chat import ChatService, find_interpreter
from training_backends.gateway.checkpoint_models import CheckpointModels
from training_backends.gateway.cleanup import JobEnding, SecretKeeper
from training_backends.gateway.console_data import DataLook
from training_backends.gateway.console_feed import ConsoleFeed
from training_backends.gateway.console_sessions import ConsoleSessions
from training_backends.gateway.files import FileService
from training_backends.gateway.jobs import JobService
from training_backends.gateway.keys import KeyStore
from training_backends.gateway.legacy_store import import_legacy, import_legacy_locked
from training_backends.gateway.model_use import ModelUse
from training_backends.gateway.models import ModelService
from training_backends.gateway.object_blobs import ObjectBlobStore
from training_backends.gateway.part_uploads import PartUploads
from training_backends.gateway.result_files import ResultFiles
from training_backends.gateway.retention import Retention
from training_backends.gateway.runner import JobRunner
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore, database_url, lock_home, shares_home
from training_backends.gateway.uploads import BlobStore, MinimumSpeed
from training_backends.gateway.webhooks import Webhooks
from training_backends.gateway.weights import WeightService
from training_backends.http.webhook import signing_key
from training_backends.objects.cache import ObjectCache, objects_directory
from training_backends.objects.settings import ObjectSettings
from training_backends.objects.store import ObjectStore, is_object_url, scheme_of
from training_backends.store import gateway_schema
from training_backends.store.version import StoreVersion

__all__ = [
    "Gateway",
    "LinkSigner",
    "beside",
    "load_secret",
    "open_blobs",
    "open_gateway",
    "open_retention",
]

_SECRET_BYTES = 32
_CHECKING: Final = 2.0
"""Seconds; a store that takes longer to check is checked in part."""
_CREATING: Final = timedelta(minutes=5)
"""Within this time, the key of a job's integration and the job itself are stored."""


def load_secret(path: Path) -> bytes:
    """Return the gateway's signing secret, created on first use with mode 0600.

    The lock of the home must be held: gateways that share it start one after the other.
    """
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    if len(known) >= _SECRET_BYTES:
        return known  # a truncated secret could be guessed
    make_private_directory(path.parent)
    secret = secrets.token_bytes(_SECRET_BYTES)
    write_atomic(path, secret, private=True)
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
    versions: StoreVersion
    client: AsyncTrainingClient
    keys: KeyStore
    files: FileService
    uploads: PartUploads
    jobs: JobService
    models: ModelService
    weights: WeightService
    checkpoints: CheckpointModels
    chat: ChatService
    links: LinkSigner
    catalogue: Catalogue
    sessions: ConsoleSessions
    feed: ConsoleFeed
    data: DataLook

    async def check(self) -> None:
        """Check that the database can be read.

        Raises:
            StoreError: The database cannot be used.
        """
        await to_thread.run_sync(self.check_store)

    def check_store(self) -> None:
        """Check that the database can be read. Blocking.

        Raises:
            StoreError: The database cannot be used.
        """
        self.store.read(
            lambda connection: connection.execute(sa.select(gateway_schema.keys.c.id).limit(1))
        )


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
    async with AsyncExitStack() as stack:
        shared = shares_home(settings.store_url)
        lock = await to_thread.run_sync(partial(lock_home, root, shared=shared))
        stack.callback(os.close, lock.descriptor)
        catalogue = await to_thread.run_sync(Catalogue.load, settings.catalogue)
        links = LinkSigner(await to_thread.run_sync(load_secret, root / "secret"))
        store, client = await _open_database(stack, settings, root, vault, backends)
        versions = StoreVersion(database_url(root, settings.store_url))
        stack.push_async_callback(versions.aclose)
        found = await to_thread.run_sync(client.backend, backend)
        catalogue.check_options(found.options_model)
        if blobs is None:
            blobs = await to_thread.run_sync(open_blobs, settings, root)
        pace = MinimumSpeed(silence=settings.upload_timeout, rate=settings.min_upload_rate)
        files = FileService(
            store,
            blobs,
            limit=settings.max_upload_bytes,
            pace=pace,
            exclusive=client.exclusive,
        )
        uploads = PartUploads(
            store,
            files,
            blobs,
            limit=settings.max_parts_bytes,
            pace=pace,
            exclusive=client.exclusive,
        )
        if lock.alone:
            await files.open()
            await uploads.open()
        tasks = await stack.enter_async_context(beside())
        stack.callback(tasks.cancel_scope.cancel)
        interpreter = None
        if settings.inference_url is None:
            interpreter = await to_thread.run_sync(find_interpreter, found)
        models = _open_models(
            stack,
            store,
            client,
            tasks,
            backend=backend,
            catalogue=catalogue,
            settings=settings,
            root=root,
            interpreter=interpreter,
        )
        if lock.alone:
            await models.weights.sweep()
            await models.checkpoints.sweep()
            await models.chat.sweep()
        if shared:
            lock.settle()
        public_url = str(settings.public_url or url).rstrip("/")
        keys = KeyStore(store, settings.api_key)
        feed = ConsoleFeed(store)
        tasks.start_soon(feed.run)
        tasks.start_soon(uploads.sweep)
        yield Gateway(
            settings=settings,
            home=root,
            public_url=public_url,
            backend=backend,
            store=store,
            versions=versions,
            client=client,
            keys=keys,
            files=files,
            uploads=uploads,
            jobs=await _start_jobs(
                stack,
                store,
                client,
                files,
                models=models.service,
                webhooks=await _webhooks(store, settings, vault),
                backend=backend,
                catalogue=catalogue,
                secrets=vault,
                settings=settings,
            ),
            models=models.service,
            weights=models.weights,
            checkpoints=models.checkpoints,
            chat=models.chat,
            links=links,
            catalogue=catalogue,
            sessions=ConsoleSessions(store, keys, public_url=public_url),
            feed=feed,
            data=DataLook(root / "cache" / "data", blobs),
        )


@asynccontextmanager
async def open_retention(
    settings: GatewaySettings,
    *,
    home: Path,
    backends: Mapping[str, TrainingBackend] | None = None,
) -> AsyncIterator[Retention]:
    """Open what deletes by age in the gateway of a home, which may be running.

    Args:
        backends: Backends to use instead of the registered ones.

    Raises:
        ConfigError: The settings are invalid.
        StoreError: A database is damaged or cannot be opened.
    """
    root = (home / "gateway").expanduser().absolute()
    async with AsyncExitStack() as stack:
        vault = CredentialVault(home=root)
        store, client = await _open_database(
            stack, settings, root, vault, backends, is_locked=False
        )
        catalogue = await to_thread.run_sync(Catalogue.load, settings.catalogue)
        blobs = await to_thread.run_sync(open_blobs, settings, root)
        pace = MinimumSpeed(silence=settings.upload_timeout, rate=settings.min_upload_rate)
        limit, exclusive = settings.max_upload_bytes, client.exclusive
        files = FileService(store, blobs, limit=limit, pace=pace, exclusive=exclusive)
        tasks = await stack.enter_async_context(beside())
        models = _open_models(
            stack,
            store,
            client,
            tasks,
            backend="",
            catalogue=catalogue,
            settings=settings,
            root=root,
        )
        yield Retention(store, client, models.service, files, settings)


class _Models(NamedTuple):
    """The services of a gateway's models."""

    service: ModelService
    weights: WeightService
    checkpoints: CheckpointModels
    chat: ChatService


def _open_models(
    stack: AsyncExitStack,
    store: GatewayStore,
    client: AsyncTrainingClient,
    tasks: TaskGroup,
    *,
    backend: str,
    catalogue: Catalogue,
    settings: GatewaySettings,
    root: Path,
    interpreter: Interpreter | None = None,
) -> _Models:
    """Open the services of models; `stack` closes them."""
    use = ModelUse(store)
    weights = WeightService(store, client, backend=backend, catalogue=catalogue, use=use, root=root)
    checkpoints = CheckpointModels(
        store,
        client,
        organization_id=settings.organization_id,
        directory=root / "checkpoints",
    )
    chat = ChatService(
        store,
        tasks,
        checkpoints,
        interpreter=interpreter,
        catalogue=catalogue,
        weights=weights,
        use=use,
        settings=settings,
        root=root,
    )
    stack.push_async_callback(chat.aclose)
    service = ModelService(
        store,
        client,
        backend=backend,
        catalogue=catalogue,
        organization_id=settings.organization_id,
        opened_at=time.time(),
        weights=weights,
        chat=chat,
        checkpoints=checkpoints,
        use=use,
    )
    return _Models(service, weights, checkpoints, chat)


def object_settings(settings: GatewaySettings) -> ObjectSettings:
    """Return how the client of a gateway reads objects: the uploaded files too."""
    found = load_settings(ObjectSettings)
    if not settings.blob_options or not is_object_url(settings.blobs or ""):
        return found
    scheme = scheme_of(str(settings.blobs))
    return found.model_copy(update={"options": {**found.options, scheme: settings.blob_options}})


def open_blobs(settings: GatewaySettings, root: Path) -> BlobStore:
    """Return the storage of uploaded files that the settings choose. Blocking.

    Raises:
        ConfigError: The URL or an option is invalid.
        BackendNotInstalled: The package of the store is not installed.
    """
    url = settings.blobs
    if url is None:
        return BlobStore(root)
    if not is_object_url(url):
        return BlobStore(Path(unquote(urlsplit(url).path)), is_shared=True)
    options = object_settings(settings).options.get(scheme_of(url))
    return ObjectBlobStore(ObjectStore(url, options), root, ObjectCache(objects_directory(root)))


async def _open_database(
    stack: AsyncExitStack,
    settings: GatewaySettings,
    root: Path,
    vault: CredentialVault,
    backends: Mapping[str, TrainingBackend] | None,
    *,
    is_locked: bool = True,
) -> tuple[GatewayStore, AsyncTrainingClient]:
    """Open the gateway's tables, and the client of the runs in the same database.

    Args:
        is_locked: This process holds the lock of the home.
    """
    url = database_url(root, settings.store_url)
    make_client = partial(
        AsyncTrainingClient,
        home=root,
        store_url=url,
        credentials=vault,
        backends=backends,
        objects=await to_thread.run_sync(object_settings, settings),
    )
    client = await stack.enter_async_context(await to_thread.run_sync(make_client))
    await _check_run_store(client, root)
    store = await to_thread.run_sync(GatewayStore, url)
    stack.callback(store.close)
    if settings.store_url is None:
        take_over = import_legacy_locked if is_locked else import_legacy
        await to_thread.run_sync(take_over, store, root)
    return store, client


async def _webhooks(
    store: GatewayStore, settings: GatewaySettings, vault: CredentialVault
) -> Webhooks | None:
    """Return what reports finished jobs; None without a URL in the settings.

    Raises:
        ConfigError: The secret cannot be used.
        CredentialNotFound: There is none.
    """
    if settings.webhook_url is None:
        return None
    secret = settings.webhook_secret or await vault.get("webhook")
    key = signing_key(secret.get_secret_value())
    return Webhooks(store, str(settings.webhook_url), key)


async def _start_jobs(
    stack: AsyncExitStack,
    store: GatewayStore,
    client: AsyncTrainingClient,
    files: FileService,
    *,
    models: ModelService,
    webhooks: Webhooks | None,
    backend: str,
    catalogue: Catalogue,
    secrets: SecretKeeper,
    settings: GatewaySettings,
) -> JobService:
    """Resume all jobs in tasks that end with the stack."""
    tasks = await stack.enter_async_context(beside())
    stack.callback(tasks.cancel_scope.cancel)
    ending = JobEnding(files, secrets, webhooks)
    leases = None
    if shares_home(settings.store_url):
        leases = Leases(store, client.home / "leases")
        stack.push_async_callback(to_thread.run_sync, leases.close)
    runner = JobRunner(
        store,
        client,
        files,
        tasks,
        organization_id=settings.organization_id,
        max_steps=settings.max_training_steps,
        results=ResultFiles(store, files, settings.openai_result_csv),
        on_end=ending,
        leases=leases,
    )
    await runner.start()
    tasks.start_soon(files.sweep)
    tasks.start_soon(AuditLog(store).sweep, settings.audit_days)
    tasks.start_soon(Retention(store, client, models, files, settings).run, leases)
    if webhooks is not None:
        tasks.start_soon(webhooks.run, leases)
    # Another gateway may be creating a job at this moment.
    patience = timedelta(0) if leases is None else _CREATING
    tasks.start_soon(partial(ending.forget_orphans, store, before=utc_now() - patience))
    return JobService(
        store,
        client,
        files,
        runner,
        ending,
        models=models,
        backend=backend,
        catalogue=catalogue,
        secrets=secrets,
        settings=settings,
    )


async def _check_run_store(client: AsyncTrainingClient, root: Path) -> None:
    """Fail at start if the run store is damaged, which would block every job."""
    if problems := await client.check_store(within=_CHECKING):
        raise StoreError(
            f"The gateway's run store in {root} cannot be used: {problems[0]}",
            hint=f"Run `TRAINING_BACKENDS_HOME={root} training-backends doctor --recover` to "
            "recover what is readable.",
        )
