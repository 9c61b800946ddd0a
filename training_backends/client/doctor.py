"""Health checks of settings, keyring, run store, clock, backends and extras."""

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Final, Literal, NamedTuple

from anyio import to_thread
from pydantic import SecretStr

from training_backends.client.boundary import make_backend
from training_backends.client.client import AsyncTrainingClient
from training_backends.client.observe import WatchSettings
from training_backends.core.backend import BackendContext, CredentialSource, RemoteFilters
from training_backends.core.errors import TrainingBackendError, UnsupportedOperation
from training_backends.core.escape import plural
from training_backends.core.estimate import format_duration
from training_backends.core.plugins import installed_backends
from training_backends.core.registry import backend_class
from training_backends.core.run import utc_now
from training_backends.core.settings import (
    Effective,
    SectionSettings,
    Settings,
    config_file,
    effective_settings,
    ignored_variables,
    load_settings,
)
from training_backends.credentials.choice import CredentialSettings
from training_backends.credentials.vault import CredentialVault, check_names
from training_backends.objects.settings import ObjectSettings

__all__ = [
    "PACKAGE",
    "Check",
    "check_clock",
    "check_extras",
    "diagnose",
    "known_settings",
    "server_of",
    "try_key",
]

_UNUSED_SUFFIX: Final = "credentials-test"
"""Filter for the job list that tests a key; it matches no jobs, so one request suffices."""
PACKAGE: Final = "training-backends"
_CLOCKS_AGREE: Final = timedelta(seconds=30)
"""Leases and signed URLs tolerate a minute."""
_EXTRA: Final = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")

State = Literal["ok", "unused", "failed"]


class Check(NamedTuple):
    """The result of one check.

    Attributes:
        state: `unused` is a part that is not set up and need not work.
        hint: How to fix it.
    """

    name: str
    state: State
    message: str
    hint: str | None = None


def known_settings(*more: type[SectionSettings]) -> list[Effective]:
    """Return the effective settings of this package and of the installed backends.

    Args:
        more: Additional sections.

    Raises:
        ConfigError: A setting is invalid or unknown.
    """
    kinds: list[type[SectionSettings]] = [Settings, CredentialSettings, WatchSettings]
    kinds += [ObjectSettings, *more]
    for name in installed_backends():
        try:
            model = backend_class(name).settings_model
        except TrainingBackendError:
            continue  # reported by the check of this backend
        kinds += [model] if model else []
    return [entry for kind in kinds for entry in effective_settings(kind)]


async def diagnose(client: AsyncTrainingClient, vault: CredentialVault) -> list[Check]:
    """Check keyring, store, clock, backends and extras, without changing anything."""
    ignored = await to_thread.run_sync(_ignored_settings)
    checks = [*ignored, await _keyring(vault), *await _store(client)]
    for name in installed_backends():
        checks += await _backend(client, name)
    return [*checks, *await to_thread.run_sync(check_extras)]


def _ignored_settings() -> list[Check]:
    names = ignored_variables()
    if not names:
        return []
    message = f"{Path.cwd() / '.env'} is not read; ignored: {', '.join(names)}"
    hint = (
        f"Export the variables, or put the settings into {config_file()}. A file from a repository "
        "must not decide where your keys are sent."
    )
    return [Check(".env", "unused", message, hint)]


async def _keyring(vault: CredentialVault) -> Check:
    try:
        found = await vault.keyring()
    except TrainingBackendError as error:
        return Check("keyring", "failed", error.message, error.hint)
    stored = [entry for entry in await vault.list() if entry.source == "keyring"]
    if found.name is None:
        hint = "Set keys in the environment; docs/credentials.md lists the alternatives."
        state: State = "failed" if stored else "unused"
        return Check("keyring", state, "no secure keyring available", hint)
    if not found.unlocked:
        state = "failed" if stored else "unused"
        hint = "Unlock it, or set the keys in the environment."
        return Check("keyring", state, f"{found.name} is locked", hint)
    return Check("keyring", "ok", f"{found.name} is unlocked, {len(stored)} keys stored")


async def _store(client: AsyncTrainingClient) -> list[Check]:
    problems = await client.check_store()
    if problems:
        hint = (
            "Stop all programs that use it, then run `training-backends doctor --recover` to "
            "rebuild it from what is still readable."
        )
        return [Check("run store", "failed", "; ".join(problems), hint)]
    try:
        runs = await client.list()
    except TrainingBackendError as error:
        return [Check("run store", "failed", error.message, error.hint)]
    live = [run for run in runs if not run.status.is_terminal]
    doubtful = sum(run.stale is not None for run in live)
    summary = f"{plural(len(runs), 'run')}, {len(live)} in progress"
    summary += f", {doubtful} of these stale" if doubtful else ""
    newest = max((run.last_seen_at or run.created_at for run in runs), default=None)
    checks = [Check("run store", "ok", summary)]
    if newest is not None:
        # Only a time in the future shows that the clocks differ.
        ahead = max(newest - utc_now(), timedelta(0))
        checks.append(check_clock("the run store", ahead))
    return checks


def check_clock(of: str, ahead: timedelta) -> Check:
    """Check this machine's clock against another.

    Args:
        of: Name of the other clock's owner.
        ahead: How far the other clock is ahead of ours.
    """
    if abs(ahead) <= _CLOCKS_AGREE:
        return Check("clock", "ok", f"in sync with {of}")
    way = "behind" if ahead > timedelta(0) else "ahead of"
    return Check(
        "clock",
        "failed",
        f"this machine's clock is {format_duration(abs(ahead))} {way} that of {of}",
        "Synchronize it with NTP: leases and signed URLs depend on it.",
    )


async def _backend(client: AsyncTrainingClient, name: str) -> list[Check]:
    try:
        backend = await to_thread.run_sync(client.backend, name)
        _ = backend.capabilities  # every command needs them
        health = await backend.health()
    except TrainingBackendError as error:
        return [Check(name, "failed", error.message, error.hint)]
    if not health.ok:
        state: State = "failed" if health.configured else "unused"
        return [Check(name, state, health.message, health.hint)]
    checks = [Check(name, "ok", health.message)]
    if health.clock_offset is not None:
        checks.append(check_clock(f"the server of {name}", health.clock_offset))
    return checks


def check_extras(is_installed: Callable[[str], bool] | None = None) -> Sequence[Check]:
    """Check which extras declared in the package metadata are installed."""
    is_installed = is_installed or _is_installed
    package = distribution(PACKAGE)
    needs: dict[str, list[str]] = {
        extra: [] for extra in package.metadata.get_all("Provides-Extra") or ()
    }
    for line in package.requires or ():
        extra, name = _EXTRA.search(line), _NAME.match(line)
        if extra and name and extra[1] in needs:
            needs[extra[1]].append(name[0])
    return [_extra(extra, names, is_installed) for extra, names in sorted(needs.items())]


def _extra(extra: str, names: Sequence[str], is_installed: Callable[[str], bool]) -> Check:
    missing = [name for name in names if not is_installed(name)]
    title = f"extra {extra}"
    if not missing:
        return Check(title, "ok", "installed")
    hint = f"pip install '{PACKAGE}[{extra}]'"
    return Check(title, "unused", f"not installed: {', '.join(missing)}", hint)


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def server_of(provider: str) -> str | None:
    """Return the base URL to which a provider's key is sent, or None if it has no such setting.

    Raises:
        ConfigError: The settings are invalid.
    """
    if provider not in installed_backends():
        return None
    model = backend_class(provider).settings_model
    return getattr(load_settings(model), "base_url", None) if model else None


async def try_key(vault: CredentialVault, provider: str, profile: str | None) -> None:
    """Test a key with a read-only request to its provider.

    Raises:
        CredentialNotFound: There is no key.
        AuthenticationFailed: The provider rejects the key.
        BackendUnavailable: The provider cannot be reached.
        UnsupportedOperation: No installed backend uses this key.
    """
    name, profile = check_names(provider, profile)
    if name not in installed_backends():
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: no backend with this name is installed.",
            hint="List installed backends with `training-backends backends`.",
        )
    key = _OneKey(vault, name, profile)
    context = BackendContext(home=load_settings(Settings).home.expanduser(), credentials=key)
    backend = await to_thread.run_sync(make_backend, name, context)
    try:
        if backend.capabilities.lists_remote:
            await backend.list_remote(RemoteFilters(suffix=_UNUSED_SUFFIX))
    finally:
        await backend.aclose()
    if not key.was_asked:
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: the backend did not use it.", backend=name
        )


class _OneKey(CredentialSource):
    """Provides a backend with the key under test, whatever profile it is set to use."""

    def __init__(self, vault: CredentialVault, provider: str, profile: str) -> None:
        self._vault = vault
        self._provider = provider
        self._profile = profile
        self.was_asked = False

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the key under test, or another provider's key from the vault."""
        if provider != self._provider:
            return await self._vault.get(provider, profile)
        self.was_asked = True
        return await self._vault.get(provider, self._profile)
