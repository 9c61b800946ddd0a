"""This package as a zip file, which a cluster unpacks into the working directory of a job."""

import hashlib
import io
import zipfile
from functools import lru_cache
from pathlib import Path

import training_backends

__all__ = ["package_zip"]

_EPOCH = (1980, 1, 1, 0, 0, 0)


@lru_cache(maxsize=1)
def package_zip() -> tuple[str, bytes]:
    """Return the name and the content of the package; the same files give the same name."""
    root = Path(training_backends.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                entry = zipfile.ZipInfo(str(path.relative_to(root.parent)), _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
    content = buffer.getvalue()
    # Ray's own form of names, by which it recognises a package.
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip", content
