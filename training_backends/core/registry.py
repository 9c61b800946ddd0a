"""Load a backend by name from the installed entry points, without loading others."""

from dataclasses import replace

from training_backends.core.backend import BackendContext, TrainingBackend
from training_backends.core.errors import BackendNotInstalled, ConfigError, Issue, suggest
from training_backends.core.plugins import backend_entries, installed_backends, owner_of
from training_backends.core.redaction import redact
from training_backends.core.settings import load_settings

__all__ = ["backend_class", "create_backend"]


def backend_class(name: str) -> type[TrainingBackend]:
    """Load the class of the backend registered as `name`.

    Raises:
        ConfigError: No backend has this name, or several packages register it.
        BackendNotInstalled: The package that provides it cannot be imported.
    """
    claims = {entry.value: entry for entry in backend_entries() if entry.name == name}
    if not claims:
        raise _unknown(name)
    if len(claims) > 1:
        owners = " and ".join(sorted(owner_of(entry) for entry in claims.values()))
        raise ConfigError(
            f"Several packages provide a backend named {name!r}: {owners}.",
            hint="Uninstall all but one of them.",
        )
    entry = next(iter(claims.values()))
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # third-party modules may raise anything
        reason = redact(str(error)) or type(error).__name__
        raise BackendNotInstalled(
            f"The backend {name!r} of {owner_of(entry)} cannot be imported: {reason}", backend=name
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, TrainingBackend)):
        raise BackendNotInstalled(
            f"{entry.value} of {owner_of(entry)} is not a TrainingBackend.", backend=name
        )
    return loaded


def create_backend(name: str, context: BackendContext) -> TrainingBackend:
    """Create the backend registered as `name`, with its settings.

    Raises:
        ConfigError: No backend has this name, or its settings are invalid.
        BackendNotInstalled: The package that provides it cannot be imported.
        TypeError: Its settings section has another name than the backend.
    """
    kind = backend_class(name)
    model = kind.settings_model
    if model is not None:
        if model.section != name.replace("-", "_"):
            raise TypeError(
                f"{model.__name__}.section must be {name.replace('-', '_')!r}, the backend's name "
                f"with underscores, not {model.section!r}"
            )
        context = replace(context, settings=load_settings(model))
    return kind.create(context)


def _unknown(name: str) -> ConfigError:
    known = sorted(installed_backends())
    fix = suggest(name, known, f"installed: {', '.join(known)}")
    message = f"no backend named {name!r} is installed"
    issue = Issue(code="unknown_backend", message=message, field="backend", fix=fix)
    return ConfigError(
        f"Unknown backend {name!r}.",
        issues=[issue],
        hint="List installed backends with `training-backends backends`.",
    )
