"""Copies of directories in an object store: the files first, then a manifest with their digests."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from training_backends.core.errors import BackendUnavailable, ConfigError, RunNotFound
from training_backends.core.files import digest_of, make_private_directory
from training_backends.objects.store import ObjectStore

__all__ = ["MANIFEST", "fetch", "path_below", "publish"]

MANIFEST: Final = "manifest.json"
"""Written last: without it, a copy is incomplete."""
_BEGUN: Final = "manifest.begun.json"
"""The files that an incomplete copy has."""


def publish(
    source: Path,
    store: ObjectStore,
    about: Mapping[str, str],
    on_progress: Callable[[str, int, int], None] | None = None,
    *,
    replace: bool = False,
) -> None:
    """Copy a file or the files of a directory, unless a complete copy of them is there. Blocking.

    A copy that was interrupted is continued.

    Args:
        about: Stored in the manifest, for example the run.
        on_progress: Called with a name, the bytes copied and all bytes.
        replace: Replace a copy of something else.

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
        if not replace:
            raise ConfigError(
                f"{store.url} has another result.", hint="Choose a URL with nothing below it."
            )
        store.remove(MANIFEST)
    before = (_read(store, _BEGUN) or {}).get("files", [])
    if any(entry not in files for entry in before):  # of something else
        store.remove(_BEGUN)
        before = []
    copied: list[dict[str, Any]] = []
    done, total = 0, sum(digest.size for _, digest in found.values())
    for entry, (name, (path, digest)) in zip(files, found.items(), strict=True):
        if entry not in before:
            store.put(name, path)
        copied.append(entry)
        if entry not in before and len(copied) < len(files):
            store.write(_BEGUN, json.dumps({"files": copied}).encode())
        if store.info(name).size != digest.size:
            raise BackendUnavailable(f"{store.place(name)}: the object is incomplete.")
        done += digest.size
        if on_progress:
            on_progress(name, done, total)
    store.write(MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())
    if len(files) > 1:
        store.remove(_BEGUN)


def fetch(store: ObjectStore, target: Path) -> bool:
    """Copy a published directory to this machine; return False if there is none. Blocking.

    A copy that was interrupted is continued. One process at a time.

    Raises:
        BackendUnavailable: The store cannot be used, or a file differs from the manifest.
    """
    manifest = _read(store, MANIFEST)
    if manifest is None:
        return False
    temporary = target.with_name(f".{target.name}.tmp")
    make_private_directory(temporary)
    for each in manifest.get("files", ()):
        path = path_below(temporary, each["name"])
        if path.is_file() and digest_of(path).sha256 == each["sha256"]:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        store.get(each["name"], path)
        if digest_of(path).sha256 != each["sha256"]:
            path.unlink()
            raise BackendUnavailable(f"{store.place(each['name'])}: differs from the manifest.")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return True


def path_below(directory: Path, name: str) -> Path:
    """Return the path of a file whose name comes from a store.

    Raises:
        ConfigError: It would be outside of the directory.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"The object store has a file with an unexpected name, {name!r}.")
    return directory / path


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
