"""Find backends by name among the installed entry points, loading only the one asked for."""

from difflib import get_close_matches
from importlib.metadata import entry_points

from training_backends.core.backend import TrainingBackend
from training_backends.core.errors import BackendNotInstalled, ConfigError, Issue
from training_backends.core.plugins import ENTRY_POINT_GROUP, installed_backends, owner_of
from training_backends.core.redaction import redact

__all__ = ["backend_class"]


def backend_class(name: str) -> type[TrainingBackend]:
    """Load the backend registered as `name`, and no other.

    Raises:
        ConfigError: No backend has this name, or two packages claim it.
        BackendNotInstalled: The package that brings it cannot be imported.
    """
    claims = {entry.value: entry for entry in entry_points(group=ENTRY_POINT_GROUP, name=name)}
    if not claims:
        raise _unknown(name)
    if len(claims) > 1:
        owners = " and ".join(sorted(owner_of(entry) for entry in claims.values()))
        raise ConfigError(
            f"Two packages bring a backend named {name!r}: {owners}.", hint="Uninstall one of them."
        )
    entry = next(iter(claims.values()))
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything
        reason = redact(str(error)) or type(error).__name__
        raise BackendNotInstalled(
            f"The backend {name!r} of {owner_of(entry)} cannot be loaded: {reason}", backend=name
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, TrainingBackend)):
        raise BackendNotInstalled(
            f"{entry.value} of {owner_of(entry)} is not a TrainingBackend.", backend=name
        )
    return loaded


def _unknown(name: str) -> ConfigError:
    known = sorted(installed_backends())
    near = get_close_matches(name, known, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(known)}"
    message = f"no backend named {name!r} is installed"
    issue = Issue(code="unknown_backend", message=message, field="backend", fix=fix)
    return ConfigError(
        f"There is no backend named {name!r}.",
        issues=[issue],
        hint="`training-backends backends` lists what is installed.",
    )
