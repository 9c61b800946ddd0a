"""Copies of a result in an object store: the files first, then a manifest with their digests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from training_backends.core.errors import BackendUnavailable, ConfigError, RunNotFound
from training_backends.core.files import digest_of
from training_backends.objects.store import ObjectStore

__all__ = ["MANIFEST", "publish"]

MANIFEST: Final = "manifest.json"
"""Written last: without it, a copy is incomplete."""


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
    known = _manifest(store)
    if known is not None:
        if known.get("files") == files:
            return
        raise ConfigError(
            f"{store.url} has another result.", hint="Choose a URL with nothing below it."
        )
    done, total = 0, sum(digest.size for _, digest in found.values())
    for name, (path, digest) in found.items():
        store.put(name, path)
        if store.info(name).size != digest.size:
            raise BackendUnavailable(f"{store.place(name)}: the object is incomplete.")
        done += digest.size
        if on_progress:
            on_progress(name, done, total)
    store.write(MANIFEST, json.dumps({**about, "files": files}, indent=2).encode())


def _manifest(store: ObjectStore) -> dict[str, Any] | None:
    try:
        content = store.read(MANIFEST, 0, store.info(MANIFEST).size)
    except RunNotFound:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
