"""Backends of other packages, laid out as pip installs them."""

from collections.abc import Callable
from pathlib import Path

__all__ = ["Install", "install_backend"]

Install = Callable[[str, str, str], Path]
"""Installs a package with one backend: package, backend, source with a class `Plugin`."""


def install_backend(site: Path, package: str, backend: str, source: str) -> None:
    """Install a package whose class `Plugin` is a backend."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{package}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[training_backends.backends]\n{backend} = {package}:Plugin\n"
    )
