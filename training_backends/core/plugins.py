"""Discovery of installed backends by entry point, without loading them."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

__all__ = ["ENTRY_POINT_GROUP", "installed_backends", "owner_of"]

ENTRY_POINT_GROUP = "training_backends.backends"


def installed_backends() -> Mapping[str, str]:
    """Return the registered backend names with the distributions that provide them."""
    return MappingProxyType(
        {entry.name: owner_of(entry) for entry in sorted(entry_points(group=ENTRY_POINT_GROUP))}
    )


def owner_of(entry: EntryPoint) -> str:
    """Return the name of the package that provides an entry point."""
    return entry.dist.name if entry.dist else "an unknown package"
