"""Data that is elsewhere: fetched once into a cache of this home, and identified by its content."""

import hashlib
import json
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio
from anyio import to_thread

from training_backends.core.backoff import Backoff
from training_backends.core.config import DataSource, TrainingConfig
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    DatasetError,
    Issue,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.files import hold_lock, make_private_directory, write_atomic
from training_backends.core.logging import get_logger
from training_backends.core.redaction import redact, register_secret
from training_backends.http.urls import is_loopback
from training_backends.objects.cache import ObjectCache
from training_backends.objects.settings import ObjectSettings
from training_backends.objects.store import BLOCK, ObjectStore, is_object_url, scheme_of

__all__ = ["DataProgress", "RemoteData", "located", "require_plain_uris", "without_query"]

log = get_logger()

DataProgress = Callable[[str, int, int], None]
"""Called with what is fetched, the bytes so far and its size."""
_PART: Final = ".part"
_TRIES: Final = 5
"""Attempts without a new byte."""
_HTTP: Final = ("https", "http")
_WRITTEN: Final = 2**20
"""Bytes per write to disk."""


class _Version(NamedTuple):
    """A version of an object.

    Attributes:
        mark: Changes with the content; None if the server has none.
        size: In bytes, or None.
    """

    mark: str | None
    size: int | None


class _Opened(NamedTuple):
    """An object that is being read.

    Attributes:
        version: None: the cached content is still that of the object.
        offset: Where the pieces begin.
    """

    version: _Version | None
    offset: int
    pieces: AsyncIterator[bytes]


def without_query(uri: str) -> str:
    """Return a URL without what may be a credential: its query and fragment."""
    return re.split(r"[?#]", uri, maxsplit=1)[0] if uri.startswith(_HTTP) else uri


class RemoteData:
    """Fetches the data of configurations, once for all runs of a home.

    An object is downloaded to `<cache>/<sha256>/<name>`; for each URL the cache remembers which
    content it had, and the ETag or version by which a later call recognizes that it still has it.
    """

    def __init__(self, cache: ObjectCache, settings: ObjectSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._index = cache.directory / "index"
        self._incoming = cache.directory / "incoming"

    async def recorded(
        self, config: TrainingConfig, *, on_progress: DataProgress | None = None
    ) -> TrainingConfig:
        """Return a configuration as it is recorded, after fetching its data.

        Each source by URI has the digest of its content, and no query.

        Raises:
            DatasetError: There is no such object, it is too large, or it has another digest.
            TrainingBackendError: It cannot be fetched.
        """
        parts: dict[str, tuple[DataSource, ...]] = {}
        for part in ("train", "validation"):
            sources: tuple[DataSource, ...] = getattr(config.data, part)
            fetched = []
            for number, source in enumerate(sources):
                if source.uri is not None:
                    field = f"data.{part}.{number}"
                    source = await self._recorded(source, field, on_progress)  # noqa: PLW2901
                fetched.append(source)
            parts[part] = tuple(fetched)
        return config.model_copy(update={"data": config.data.model_copy(update=parts)})

    def local(self, config: TrainingConfig) -> TrainingConfig:
        """Return a recorded configuration with the paths of its fetched data."""

        def placed(source: DataSource) -> DataSource:
            if source.uri is None or source.sha256 is None:
                return source
            path = self._cache.path(source.sha256, _name(source.uri))
            rest = {"weight": source.weight} if "weight" in source.model_fields_set else {}
            return DataSource(path=path, **rest)

        parts = {
            part: tuple(map(placed, getattr(config.data, part))) for part in ("train", "validation")
        }
        return config.model_copy(update={"data": config.data.model_copy(update=parts)})

    def trim(self, keep: Iterable[str]) -> None:
        """Remove what was used longest ago, if the cache is too large. Blocking.

        Args:
            keep: Digests of data that is needed.
        """
        self._cache.trim(self._settings.cache_bytes, frozenset(keep))

    def is_full(self) -> bool:
        """Return whether there is something to trim. Blocking."""
        return self._cache.size() > self._settings.cache_bytes

    async def _recorded(
        self, source: DataSource, field: str, on_progress: DataProgress | None
    ) -> DataSource:
        uri = str(source.uri)
        shown = without_query(uri)
        for _, value in parse_qsl(urlsplit(uri).query):
            register_secret(value)
        name = _name(uri)
        try:
            sha256 = source.sha256
            if sha256 is None or await to_thread.run_sync(self._cache.find, sha256, name) is None:
                sha256 = await self._fetch(uri, shown, source.sha256, on_progress)
        except RunNotFound as error:
            raise _unusable(
                shown, field, "missing_object", error.message, "check the URL"
            ) from None
        except _UnusableObject as error:
            raise _unusable(shown, field, error.code, error.message, error.fix) from None
        except OSError as error:
            if isinstance(error, TrainingBackendError):
                raise
            reason = f"Cannot keep {shown} on this machine: {error.strerror or error}."
            raise TrainingBackendError(reason) from error
        return source.model_copy(update={"uri": shown, "sha256": sha256})

    async def _fetch(
        self, uri: str, shown: str, wanted: str | None, on_progress: DataProgress | None
    ) -> str:
        """Return the digest of an object's content, which is in the cache afterwards."""
        await to_thread.run_sync(self._prepare)
        key = hashlib.sha256(shown.encode()).hexdigest()
        async with self._alone(key):
            known = await to_thread.run_sync(self._known, key, _name(uri))
            fetch = _Fetch(self, key, uri, known=known, on_progress=on_progress)
            try:
                sha256 = await fetch.run()
            except BackendUnavailable as error:
                if known is None or wanted not in {None, known[1]}:
                    raise
                log.warning("fetched data not checked", uri=shown, reason=error.message)
                return known[1]
        if wanted not in {None, sha256}:
            message = f"the object has changed: its SHA-256 is {sha256}, not {wanted}"
            raise _UnusableObject(
                "changed_object", message, "restore the object, or launch a new run"
            )
        return sha256

    def _prepare(self) -> None:
        for directory in (self._index, self._incoming):
            make_private_directory(directory)

    @asynccontextmanager
    async def _alone(self, key: str) -> AsyncGenerator[None, None]:
        """Exclude other processes that fetch the same object."""
        polls = Backoff(0.05, 1.0)
        while True:
            lock = hold_lock(self._incoming / f"{key}.lock", 0.0)
            try:
                await to_thread.run_sync(lock.__enter__)
                break
            except BlockingIOError:
                await anyio.sleep(polls.next())
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(lock.__exit__, None, None, None)

    def _known(self, key: str, name: str) -> tuple[str, str] | None:
        """Return version and digest of the content that an object had, if it is in the cache."""
        found = _read_json(self._index / key)
        with suppress(KeyError, TypeError):
            version, sha256 = str(found["version"]), str(found["sha256"])
            if self._cache.find(sha256, name) is not None:
                return version, sha256
        return None

    @property
    def options(self) -> Mapping[str, Mapping[str, Any]]:
        """Options of stores by scheme."""
        return self._settings.options

    def require_room(self, size: int, received: int) -> None:
        """Require that an object may be so large, and that the rest of it fits on the disk."""
        most = self._settings.max_object_bytes
        if size > most:
            message = f"the object has {size:,} bytes; the limit is {most:,}"
            raise _UnusableObject("too_large", message, "raise objects.max_object_bytes")
        if size - received > (free := shutil.disk_usage(self._incoming).free):
            message = f"the object has {size:,} bytes, and {free:,} are free for it"
            raise _UnusableObject(
                "disk_full", message, "free disk space, or set TRAINING_BACKENDS_HOME"
            )

    def part(self, key: str) -> Path:
        """Return the path of a download in progress."""
        return self._incoming / f"{key}{_PART}"

    def keep(self, key: str, uri: str, version: str | None, sha256: str) -> None:
        """Move a complete download into the cache."""
        self._cache.adopt(self.part(key), sha256, _name(uri))
        if version is not None:
            write_atomic(self._index / key, json.dumps({"version": version, "sha256": sha256}))


class _UnusableObject(Exception):
    """An object that cannot be used as data."""

    def __init__(self, code: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix


class _Fetch:
    """One download, continued after a cut and after a crash of an earlier process."""

    def __init__(
        self,
        data: RemoteData,
        key: str,
        uri: str,
        *,
        known: tuple[str, str] | None,
        on_progress: DataProgress | None,
    ) -> None:
        self._data = data
        self._key = key
        self._uri = uri
        self._shown = without_query(uri)
        self._known = known
        self._on_progress = on_progress
        self._part = data.part(key)
        self._mark = self._part.with_suffix(".version")
        self._digest = hashlib.sha256()
        self._size = 0

    async def run(self) -> str:
        await to_thread.run_sync(self._continue)
        backoff, tries = Backoff(0.5, 15.0), 0
        while True:
            before = self._size
            try:
                return await self._attempt()
            except BackendUnavailable:
                tries = 1 if self._size > before else tries + 1
                if tries >= _TRIES or self._size == before == 0:
                    raise  # opening it was retried already
                await anyio.sleep(backoff.next())

    def _continue(self) -> None:
        """Take over the bytes of an interrupted download."""
        with suppress(OSError), self._part.open("rb") as file:
            while block := file.read(BLOCK):
                self._digest.update(block)
                self._size += len(block)

    def _restart(self, version: _Version) -> None:
        self._part.unlink(missing_ok=True)
        self._digest, self._size = hashlib.sha256(), 0
        write_atomic(self._mark, json.dumps(version.mark))

    async def _attempt(self) -> str:
        mark = await to_thread.run_sync(_read_json, self._mark)
        known = self._known[0] if self._known else None
        async with self._open(known, mark if isinstance(mark, str) else None) as opened:
            if opened.version is None and self._known:
                return self._known[1]
            version = opened.version or _Version(None, None)
            if opened.offset != self._size or version.mark is None or version.mark != mark:
                await to_thread.run_sync(self._restart, version)
            await self._receive(opened.pieces, version.size)
        if version.size not in {None, self._size}:
            raise BackendUnavailable(
                f"{self._shown}: received {self._size} of {version.size} bytes."
            )
        sha256 = self._digest.hexdigest()
        await to_thread.run_sync(self._data.keep, self._key, self._uri, version.mark, sha256)
        return sha256

    async def _receive(self, pieces: AsyncIterator[bytes], size: int | None) -> None:
        await to_thread.run_sync(self._data.require_room, size or 0, self._size)
        waiting: list[bytes] = []
        length = 0
        async with await anyio.open_file(self._part, "ab", buffering=0) as file:
            write = partial(self._write, file.wrapped)
            try:
                async for piece in pieces:
                    waiting.append(piece)
                    length += len(piece)
                    if length >= _WRITTEN:
                        await to_thread.run_sync(write, b"".join(waiting))
                        waiting, length = [], 0
                        if size is None:
                            await to_thread.run_sync(
                                self._data.require_room, self._size, self._size
                            )
                        if self._on_progress:
                            what = f"fetch {self._shown}"
                            self._on_progress(what, self._size, size or self._size)
            except Exception as error:
                if isinstance(error, TrainingBackendError) or not isinstance(error, OSError):
                    await to_thread.run_sync(write, b"".join(waiting))  # the connection was lost
                raise
            await to_thread.run_sync(write, b"".join(waiting))

    def _write(self, file: Any, data: bytes) -> None:
        file.truncate(self._size)  # after a write that failed
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        self._digest.update(data)
        self._size += len(data)

    def _open(self, known: str | None, mark: str | None) -> Any:
        if is_object_url(self._uri):
            return self._open_object(known, mark)
        if urlsplit(self._uri).scheme in _HTTP:
            return self._open_url(known, mark)
        schemes = "s3, gs, az, hf and https"
        raise ConfigError(f"{self._shown}: unknown scheme.", hint=f"Known schemes are {schemes}.")

    @asynccontextmanager
    async def _open_object(
        self, known: str | None, mark: str | None
    ) -> AsyncGenerator[_Opened, None]:
        options = self._data.options.get(scheme_of(self._uri))
        store = await to_thread.run_sync(ObjectStore, self._uri, options)
        info = await to_thread.run_sync(store.info)
        version = _Version(info.version, info.size)
        offset = self._size if info.version == mark and self._size <= info.size else 0

        async def pieces() -> AsyncGenerator[bytes, None]:
            for start in range(offset, info.size, BLOCK):
                yield await to_thread.run_sync(store.read, "", start, min(start + BLOCK, info.size))
            if (await to_thread.run_sync(store.info)).version != info.version:
                raise BackendUnavailable(f"{self._shown}: the object changed while it was read.")

        yield _Opened(None if info.version == known else version, offset, pieces())

    @asynccontextmanager
    async def _open_url(self, known: str | None, mark: str | None) -> AsyncGenerator[_Opened, None]:
        headers = {}
        if self._size and mark:
            headers = {"Range": f"bytes={self._size}-", "If-Range": mark}
        elif known:
            headers = {"If-None-Match" if _is_etag(known) else "If-Modified-Since": known}
        from training_backends.http.client import HttpClient  # noqa: PLC0415  # slow to import
        from training_backends.http.policy import HttpPolicy  # noqa: PLC0415

        parts = urlsplit(self._uri)
        policy = HttpPolicy(attempts=_ATTEMPTS)
        if "@" in parts.netloc:
            raise ConfigError(
                f"{parts.scheme}://{parts.hostname}: a URL must not contain a user name.",
                hint="Use a presigned URL, or download the file.",
            )
        if parts.scheme == "http" and not is_loopback(self._uri):
            raise ConfigError(
                f"{self._shown}: data is not fetched over plain HTTP from another host.",
                hint="Use https.",
            )
        async with (
            aclosing(HttpClient(f"{parts.scheme}://{parts.netloc}", policy=policy)) as client,
            client.open_url(self._uri, headers, expect=_STATUSES) as opened,
        ):
            if opened.status == 304:
                yield _Opened(None, 0, opened.pieces)
                return
            found = opened.headers
            version = found.get("etag") or found.get("last-modified")
            plain = "content-encoding" not in found
            length = found.get("content-length", "") if plain else ""
            offset = self._size if opened.status == 206 and version == mark else 0
            if opened.status == 416 or (opened.status == 206 and not offset):
                await to_thread.run_sync(partial(self._part.unlink, missing_ok=True))
                self._size, self._digest = 0, hashlib.sha256()
                raise BackendUnavailable(f"{self._shown}: the object changed while it was read.")
            size = int(length) + offset if length.isdecimal() else None
            yield _Opened(_Version(version, size), offset, opened.pieces)


_ATTEMPTS: Final = 3
"""To open a URL."""
_STATUSES: Final = frozenset({200, 206, 304, 416})


def _is_etag(version: str) -> bool:
    return version.endswith('"')


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _name(uri: str) -> str:
    """Return the name of the file that an object becomes."""
    name = unquote(without_query(uri).rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^\w.+-]", "_", name)[-200:]
    return name if name.strip(".") else "data"


def require_plain_uris(config: TrainingConfig) -> None:
    """Require that no URL of data has credentials, for a backend that reads and records it.

    Raises:
        ConfigError: One has.
    """
    issues = [
        Issue(
            code="credentials_in_url",
            message="the URL has credentials, and this backend records it as it is",
            field=f"data.{part}.{number}",
            fix="use a URL without them, or download the file",
        )
        for part in ("train", "validation")
        for number, source in enumerate(getattr(config.data, part))
        if source.uri and redact(source.uri) != source.uri
    ]
    if issues:
        raise ConfigError("The data cannot be used.", issues=issues)


def _unusable(uri: str, field: str, code: str, message: str, fix: str) -> DatasetError:
    text = message.removeprefix(f"{uri}: ").rstrip(".")
    issue = Issue(code=code, message=text, path=uri, field=field, fix=fix)
    return DatasetError("The data cannot be used.", issues=[issue])


def located(
    issues: Iterable[Issue], config: TrainingConfig, local: TrainingConfig
) -> tuple[Issue, ...]:
    """Return issues that name the URL of data, not its path in the cache."""
    places = {
        str(here): str(source)
        for part in ("train", "validation")
        for source, here in zip(getattr(config.data, part), getattr(local.data, part), strict=True)
    }
    return tuple(
        replace(issue, path=places[issue.path]) if issue.path in places else issue
        for issue in issues
    )
