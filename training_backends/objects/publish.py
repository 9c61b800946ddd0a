"""Copies of a result in an object store: the files first, then a manifest with their digests."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final
from uuid import uuid4

from training_backends.core.errors import BackendUnavailable, ConfigError, RunNotFound
from training_backends.core.files import digest_of
from training_backends.objects.store import BLOCK, ObjectStore

__all__ = ["MANIFEST", "fetch", "publish"]

MANIFEST: Final = "manifest.json"
"""Written last: without it, a copy is incomplete."""
_BEGUN: Final = "manifest.begun.json"
"""The files that an incomplete copy has: another attempt continues after them."""


def publish(
    source: Path,
    store: ObjectStore,
    about: Mapping[str, str],
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Copy a file or the files of a directory, unless a complete copy of them is there. Blocking.

    Args:
        about: Stored in the manifest, for example the run.
        on_progress: Called with a name, the bytes copied and all bytes.

    Raises:
        ConfigError: There is a copy of something else.
        BackendUnavailable: The store cannot be used, or has not received a file completely.
    """
    root = source if source.is_dir() else source.parent
    paths = sorted(path for path in source.rglob("*") if path.is_file()) or [source]
    found = {path.relative_to(root).as_posix(): (path, digest_of(path)) for path in paths}
    files = [
        {"name": name, "size": digest.size, "sha256": digest.sha256}
        for name, (_, digest) in found.items()
    ]
    known = _read(store, MANIFEST)
    if known is not None:
        if known.get("files") == files:
            return
        raise ConfigError(
            f"{store.url} has another result.", hint="Choose a URL with nothing below it."
        )
    before = (_read(store, _BEGUN) or {}).get("files", [])
    copied: list[dict[str, Any]] = []
    done, total = 0, sum(digest.size for _, digest in found.values())
    for entry, (path, digest) in zip(files, found.values(), strict=True):
        name = str(entry["name"])
        if entry not in before:
            store.put(name, path)
        if store.info(name).size != digest.size:
            raise BackendUnavailable(f"{store.place(name)}: the object is incomplete.")
        copied.append(entry)
        if entry not in before and len(copied) < len(files):
            store.write(_BEGUN, json.dumps({"files": copied}).encode())
        done += digest.size
        if on_progress:
            on_progress(name, done, total)
    store.write(MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())
    store.remove(_BEGUN)


def fetch(store: ObjectStore, target: Path) -> None:
    """Copy the files of a complete copy to a new directory, atomically. Blocking.

    Raises:
        RunNotFound: There is no complete copy.
        ConfigError: The directory is not empty.
        BackendUnavailable: The store cannot be used, or a file has another digest.
    """
    manifest = _read(store, MANIFEST)
    if manifest is None:
        raise RunNotFound(f"There is no complete copy of a result at {store.url}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty.", hint="Choose a new directory.")
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        for entry in manifest["files"]:
            name = PurePosixPath(entry["name"])
            if name.is_absolute() or ".." in name.parts:
                raise BackendUnavailable(f"{store.place(MANIFEST)}: invalid name of a file.")
            _fetch(store, str(name), partial / name, entry["sha256"])
        with suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(store: ObjectStore, name: str, path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size, digest = store.info(name).size, hashlib.sha256()
    with path.open("xb") as file:
        for start in range(0, size, BLOCK):
            block = store.read(name, start, min(start + BLOCK, size))
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha256:
        raise BackendUnavailable(f"{store.place(name)}: the content is not that of the result.")


def _read(store: ObjectStore, name: str) -> dict[str, Any] | None:
    try:
        content = store.read(name, 0, store.info(name).size)
    except RunNotFound:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
