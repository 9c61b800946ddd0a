"""The SHA-256 of data files, made where somebody needs it."""

import hashlib

from training_backends.core.dataset import DataFile

__all__ = ["digested"]


def digested(file: DataFile) -> DataFile:
    """Return what is known of a file with its digest.

    Raises:
        OSError: The file cannot be read.
    """
    if file.sha256 is not None:
        return file
    with file.path.open("rb", buffering=0) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return file.model_copy(update={"sha256": digest})
