"""Parts for orchestrators and programs; each module needs the package that it is named after."""

from collections.abc import Iterator
from contextlib import contextmanager

from training_backends.core.errors import BackendNotInstalled

__all__ = ["requires"]


@contextmanager
def requires(package: str, module: str) -> Iterator[None]:
    """Import a package's modules in this block, which explains why they cannot be imported.

    Raises:
        BackendNotInstalled: The package is not installed, or lacks the module.
    """
    try:
        yield
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, and something that it needs is not
        raise BackendNotInstalled(
            f"This integration needs {package}, which is not installed.",
            install=f"pip install '{package}'",
            hint=f"Install it with `pip install '{package}'`.",
        ) from error
