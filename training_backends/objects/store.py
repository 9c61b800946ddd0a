"""Objects in a store that fsspec can reach, with the errors of this package.

All methods block: call them in a thread. fsspec and the package of a store are imported when the
first object is opened.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

from training_backends.core.errors import (
    BackendNotInstalled,
    BackendUnavailable,
    ConfigError,
    CredentialNotFound,
    PermissionDenied,
    RunNotFound,
    first_line,
)
from training_backends.objects.settings import StoreOptions, hide_secrets

__all__ = [
    "BLOCK",
    "SCHEMES",
    "ObjectInfo",
    "ObjectStore",
    "ObjectUpload",
    "is_object_url",
    "scheme_of",
]

BLOCK: Final = 8 * 2**20
"""Bytes of a part of an upload or a request for a range; S3 takes at most 10,000 parts."""
SCHEMES: Final[Mapping[str, tuple[str, str]]] = {
    "s3": ("s3", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."),
    "gs": (
        "gcs",
        "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
    ),
    "az": (
        "azure",
        "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with a key.",
    ),
    "hf": ("hf", "Run `hf auth login`, or set HF_TOKEN."),
}
"""Extra of this package and where credentials come from, by scheme."""
_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
_S3: Final[Mapping[str, Any]] = {
    "signature_version": "s3v4",
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": 4},
}
"""Version 4 is the only signature of newer regions and of most compatible servers."""
_NO_CREDENTIALS: Final = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "TokenRetrievalError",
        "DefaultCredentialsError",
        "ClientAuthenticationError",
        "LocalTokenNotFoundError",
    }
)
_NO_ACCOUNT: Final = "Must provide either a connection_string or account_name"
_LONGEST_SIGNED: Final = 7 * 24 * 3600
"""Seconds; the maximum of Signature Version 4 and of Google Cloud Storage."""


class ObjectInfo(NamedTuple):
    """What a store knows about an object.

    Attributes:
        version: Changes with the content: from an ETag, a generation or a digest.
        modified: Seconds since the epoch, or None.
    """

    name: str
    size: int
    version: str
    modified: float | None


def is_object_url(text: str) -> bool:
    """Return whether a text is a URL of a store."""
    return "://" in text and scheme_of(text) in SCHEMES


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, as in the options of stores."""
    scheme = url.partition("://")[0]
    return _ALIASES.get(scheme, scheme)


class ObjectUpload:
    """An object that is being written in parts; it does not exist before `finish`."""

    def __init__(self, store: "ObjectStore", name: str, file: Any) -> None:
        self._store = store
        self._file = file
        self.name = name

    @property
    def is_begun(self) -> bool:
        """Whether the store has received a part."""
        return self._file.offset is not None

    def write(self, data: bytes) -> None:
        """Append data; every `BLOCK` bytes are sent."""
        with self._store.errors(self.name):
            self._file.write(data)

    def finish(self) -> None:
        """Send the rest and create the object."""
        with self._store.errors(self.name):
            self._file.close()

    def abort(self) -> None:
        """Discard the parts, unless the object exists; safe to repeat.

        Parts that cannot be discarded now are removed by `ObjectStore.abort_uploads`.
        """
        if self._file.closed:
            return
        with suppress(Exception):  # the store is unavailable, or keeps no parts
            self._file.discard()
        self._file.closed = True  # its finalizer would create the object


class ObjectStore:
    """Objects whose names begin with one URL."""

    def __init__(self, url: str, options: StoreOptions | None = None) -> None:
        """Open the store without a request.

        Raises:
            ConfigError: The URL or an option is invalid.
            BackendNotInstalled: The package of the store is not installed.
        """
        parts = urlsplit(url)
        self.scheme = scheme_of(url)
        if self.scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ConfigError(f"{url.partition('?')[0]}: unknown scheme.", hint=f"Use {known}.")
        if ":" in parts.netloc.rpartition("@")[0]:
            raise ConfigError(
                f"A {self.scheme}:// URL must not contain credentials.",
                hint=SCHEMES[self.scheme][1],
            )
        if not parts.netloc:
            raise ConfigError(f"{url}: the name of the bucket is missing.")
        self.url = url.rstrip("/")
        self._options = dict(options or {})
        hide_secrets(self._options)
        with self.errors(""):
            self._fs = _open(self.scheme, dict(self._options))
            self._root = str(self._fs._strip_protocol(self.url)).rstrip("/")  # noqa: SLF001

    def below(self, directory: str) -> "ObjectStore":
        """Return the store of the objects below a directory."""
        return ObjectStore(self.place(directory), self._options)

    def place(self, name: str) -> str:
        """Return the URL of an object; the empty name is that of the store itself."""
        return f"{self.url}/{name}" if name else self.url

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def info(self, name: str = "") -> ObjectInfo:
        """Return what is known about an object.

        Raises:
            RunNotFound: There is no such object or bucket.
        """
        with self.errors(name):
            if self.scheme in {"s3", "hf"}:  # these keep listings in any case
                self._fs.invalidate_cache()
            found = self._fs.info(self._key(name))
            if found.get("type") == "directory":
                raise FileNotFoundError("it is a directory, not an object")
            return _info(name, found)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return a range of an object's bytes."""
        with self.errors(name):
            # The Hub's file system would read ahead.
            more = {"cache_type": "none"} if self.scheme == "hf" else {}
            return bytes(self._fs.cat_file(self._key(name), start=start, end=end, **more))

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a small object."""
        with self.errors(name):
            self._fs.pipe_file(self._key(name), data)

    def put(self, name: str, path: Path) -> None:
        """Upload a file, in parts if it is large."""
        with self.errors(name):
            self._fs.put_file(str(path), self._key(name))

    def get(self, name: str, path: Path) -> None:
        """Download an object to a file."""
        with self.errors(name):
            self._fs.get_file(self._key(name), str(path))

    def upload(self, name: str) -> ObjectUpload:
        """Begin to write an object in parts."""
        with self.errors(name):
            return ObjectUpload(self, name, self._fs.open(self._key(name), "wb", block_size=BLOCK))

    def copy(self, source: str, target: str, *, to: "ObjectStore | None" = None) -> None:
        """Copy an object within the store, without transferring it to this machine.

        Args:
            to: Where `target` is: another part of the same store.
        """
        with self.errors(source):
            self._fs.cp_file(self._key(source), (to or self)._key(target))  # noqa: SLF001

    def remove(self, name: str) -> None:
        """Remove an object; safe to repeat."""
        with self.errors(name), suppress(FileNotFoundError):
            self._fs.rm_file(self._key(name))

    def remove_all(self, directory: str = "") -> None:
        """Remove the objects below a directory; safe to repeat."""
        with self.errors(directory), suppress(FileNotFoundError):
            if self.scheme == "s3":
                self._fs.invalidate_cache()
            self._fs.rm(self._key(directory), recursive=True)

    def files(self, directory: str = "") -> Sequence[ObjectInfo]:
        """Return the objects directly below a directory, in one request up to 1,000."""
        return [
            _info(name, details)
            for name, details in self._children(directory)
            if details["type"] == "file"
        ]

    def list(self, directory: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects below a directory, by their names in this store."""
        with self.errors(directory):
            found = self._fs.find(self._key(directory), detail=True)
        for key, details in found.items():
            yield _info(key.removeprefix(f"{self._root}/"), details)

    def directories(self, directory: str) -> Sequence[str]:
        """Return the names of the directories directly below one."""
        return [
            name for name, details in self._children(directory) if details["type"] == "directory"
        ]

    def _children(self, directory: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        with self.errors(directory):
            if self.scheme == "s3":  # which keeps listings in any case
                self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._key(directory), detail=True)
            except FileNotFoundError:
                return
        for each in found:
            name = each["name"].rstrip("/").removeprefix(f"{self._root}/")
            if name != self._root:  # the placeholder of a directory
                yield name, each

    def check(self) -> None:
        """Make a request that fails if the store cannot be used.

        Raises:
            RunNotFound: The bucket does not exist.
        """
        bucket = self._root.partition("/")[0]
        with self.errors(""):
            if self.scheme == "s3":
                self._fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            elif self.scheme != "hf":
                self._fs.info(bucket)

    def sign(self, name: str, *, seconds: int, filename: str) -> str | None:
        """Return a URL that gives access to an object; None if the store makes none.

        Args:
            filename: Name under which browsers save it, where the store can set it.
        """
        if seconds > _LONGEST_SIGNED:
            return None
        more = {}
        if self.scheme == "s3":
            name_of_it = f"attachment; filename*=utf-8''{quote(filename, safe='')}"
            more["ResponseContentDisposition"] = name_of_it
        try:
            return str(self._fs.sign(self._key(name), expiration=seconds, **more))
        except Exception:  # credentials that cannot sign, such as a token
            return None

    def abort_uploads(self, directory: str, *, before: float) -> int:
        """Discard the parts of unfinished uploads; return their number.

        Google Cloud Storage and Azure discard them by themselves after a week.

        Args:
            before: Only uploads that began before this time, in seconds since the epoch.
        """
        if self.scheme != "s3":
            return 0
        bucket, _, prefix = self._key(directory).partition("/")
        count = 0
        with self.errors(directory):
            marker: dict[str, str] = {}
            while True:
                page = self._fs.call_s3(
                    "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker
                )
                for each in page.get("Uploads", ()):
                    if each["Initiated"].timestamp() < before:
                        self._fs.call_s3(
                            "abort_multipart_upload",
                            Bucket=bucket,
                            Key=each["Key"],
                            UploadId=each["UploadId"],
                        )
                        count += 1
                if not page.get("IsTruncated"):
                    return count
                marker = {
                    "KeyMarker": page["NextKeyMarker"],
                    "UploadIdMarker": page["NextUploadIdMarker"],
                }

    @contextmanager
    def errors(self, name: str) -> Iterator[None]:
        """Turn the errors of fsspec and of the store's package into those of this package."""
        try:
            yield
        except Exception as error:
            raise _translated(error, self.place(name), self.scheme) from error


def _open(scheme: str, options: dict[str, Any]) -> Any:
    extra = SCHEMES[scheme][0]
    try:
        import fsspec  # noqa: PLC0415  # of an extra

        if scheme == "s3":
            options["config_kwargs"] = {**_S3, **options.get("config_kwargs", {})}
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        install = f"pip install 'training-backends[{extra}]'"
        raise BackendNotInstalled(
            f"{scheme}:// needs a package that is not installed: {first_line(error)}.",
            install=install,
            hint=f"Install it with `{install}`.",
        ) from None


def _info(name: str, details: Mapping[str, Any]) -> ObjectInfo:
    modified = details.get("LastModified") or details.get("mtime") or details.get("last_modified")
    if isinstance(modified, str):
        with suppress(ValueError):
            modified = datetime.fromisoformat(modified)
    seconds = None
    if isinstance(modified, datetime):
        seconds = (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()
    lfs = details.get("lfs")
    marks = (
        lfs.get("sha256") if isinstance(lfs, Mapping) else None,
        details.get("ETag") or details.get("etag") or details.get("blob_id"),
        details.get("VersionId") or details.get("generation"),
    )
    version = " ".join(str(mark).strip('"') for mark in marks if mark)
    return ObjectInfo(name, int(details.get("size") or 0), version or str(seconds), seconds)


def _translated(error: Exception, url: str, scheme: str) -> Exception:
    """Return the error of this package for one of fsspec or of a store's package."""
    extra, credentials = SCHEMES[scheme]
    chain = [error, error.__cause__, error.__context__]
    names = {kind.__name__ for each in chain if each for kind in type(each).__mro__}
    said = first_line(error)
    if isinstance(error, BackendNotInstalled):
        return error
    if names & _NO_CREDENTIALS or said.startswith(_NO_ACCOUNT):
        return CredentialNotFound(f"{url}: no credentials found.", hint=credentials)
    if isinstance(error, FileNotFoundError):
        is_bucket = "bucket" in said.lower() and "exist" in said.lower()
        what = "the bucket does not exist" if is_bucket else "no such object"
        return RunNotFound(f"{url}: {what}.", hint="Check the URL.")
    if isinstance(error, PermissionError) or "GatedRepoError" in names:
        return PermissionDenied(f"{url}: access denied ({said}).", hint=credentials)
    if isinstance(error, ImportError):
        install = f"pip install 'training-backends[{extra}]'"
        return BackendNotInstalled(f"{url}: {said}.", install=install, hint=f"Run `{install}`.")
    if isinstance(error, TypeError | ValueError) and not isinstance(error, OSError):
        return ConfigError(f"{url}: {said}", hint="Check the URL and the options of the store.")
    return BackendUnavailable(f"{url}: the store is unavailable: {said}")
