"""Check the integrations of a configuration before a run is queued."""

from anyio import to_thread

from training_backends.backends.local.interpreter import Interpreter
from training_backends.backends.local.process import Hub
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import ConfigError, CredentialNotFound, Issue, VaultLocked
from training_backends.core.integrations import Integration
from training_backends.trackers.tracker import tracker_class

__all__ = ["tracker_issues"]


async def tracker_issues(
    config: TrainingConfig, hub: Hub, interpreter: Interpreter | None
) -> tuple[Issue, ...]:
    """Return issues with trackers that cannot run and keys that do not exist.

    Args:
        interpreter: Python environment that trains; None: one that is not on this machine.
    """
    issues = []
    for number, entry in enumerate(config.integrations):
        place = f"integrations.{number}"
        if issue := await to_thread.run_sync(_missing, entry, place, interpreter):
            issues.append(issue)
            continue
        if interpreter is None:
            continue  # a cluster has keys of its own
        try:
            await hub.tracker_key(entry)
        except (CredentialNotFound, VaultLocked) as error:
            place = f"{place}.credential"
            issues.append(
                Issue(code="no_credential", message=error.message, field=place, fix=error.hint)
            )
    return tuple(issues)


def _missing(entry: Integration, place: str, interpreter: Interpreter | None) -> Issue | None:
    """Return an issue for a tracker that is not installed where the run trains, if known."""
    try:
        tracker = tracker_class(entry.type)
    except ConfigError as error:
        return Issue(code="unknown_tracker", message=error.message, field=place, fix=error.hint)
    if interpreter is None or not interpreter.is_this:
        return None
    if missing := [name for name in tracker.requires if not interpreter.has(name)]:
        message = f"the package {', '.join(missing)} is not installed"
        return Issue(code="not_installed", message=message, field=place, fix=tracker.install)
    return None
