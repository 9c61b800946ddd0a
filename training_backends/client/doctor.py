"""What works here, what does not, and what to do about it."""

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
from training_backends.core.backend import BackendContext, RemoteFilters
from training_backends.core.errors import TrainingBackendError, UnsupportedOperation
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

_NOBODYS_SUFFIX: Final = "credentials-test"
"""Runs of this name are listed to try a key: none, so that one request tells all."""
PACKAGE: Final = "training-backends"
_CLOCKS_AGREE: Final = timedelta(seconds=30)
"""Leases and signed links bear with a minute."""
_EXTRA: Final = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")

State = Literal["ok", "unused", "failed"]


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        state: `unused` is what nobody has set up here, and need not work.
        hint: What to do about it.
    """

    name: str
    state: State
    message: str
    hint: str | None = None


def known_settings(*more: type[SectionSettings]) -> list[Effective]:
    """Return every setting of this package and of the installed backends as it counts.

    Args:
        more: Further sections.

    Raises:
        ConfigError: A setting does not fit, or a name is not known.
    """
    kinds: list[type[SectionSettings]] = [Settings, CredentialSettings, WatchSettings, *more]
    for name in installed_backends():
        try:
            model = backend_class(name).settings_model
        except TrainingBackendError:
            continue  # its own check says so
        kinds += [model] if model else []
    return [entry for kind in kinds for entry in effective_settings(kind)]


async def diagnose(client: AsyncTrainingClient, vault: CredentialVault) -> list[Check]:
    """Look at keyring, store, clock, backends and extras; changes and costs nothing."""
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
        f"Export the variables, or write the settings into {config_file()}: a file that comes with "
        "a repository must not decide where your keys are sent."
    )
    return [Check(".env", "unused", message, hint)]


async def _keyring(vault: CredentialVault) -> Check:
    try:
        found = await vault.keyring()
    except TrainingBackendError as error:
        return Check("keyring", "failed", error.message, error.hint)
    stored = [entry for entry in await vault.list() if entry.source == "keyring"]
    if found.name is None:
        hint = "Keys can come from the environment; docs/credentials.md names the other ways."
        state: State = "failed" if stored else "unused"
        return Check("keyring", state, "there is none that keeps secrets safely", hint)
    if not found.unlocked:
        state = "failed" if stored else "unused"
        hint = "Unlock it, or set the keys in the environment."
        return Check("keyring", state, f"{found.name} is locked", hint)
    return Check("keyring", "ok", f"{found.name} is open and holds {len(stored)} keys")


async def _store(client: AsyncTrainingClient) -> list[Check]:
    problems = await client.check_store()
    if problems:
        hint = (
            "End all programs that use it, then `training-backends doctor --recover` saves what "
            "can still be read and makes a new store."
        )
        return [Check("run store", "failed", "; ".join(problems), hint)]
    try:
        runs = await client.list()
    except TrainingBackendError as error:
        return [Check("run store", "failed", error.message, error.hint)]
    live = [run for run in runs if not run.status.is_terminal]
    doubtful = sum(run.stale is not None for run in live)
    told = f"{len(runs)} runs, {len(live)} of them not over"
    told += f", {doubtful} of these stale" if doubtful else ""
    newest = max((run.last_seen_at or run.created_at for run in runs), default=None)
    checks = [Check("run store", "ok", told)]
    if newest is not None:
        # That the newest time in it lies behind is natural.
        ahead = max(newest - utc_now(), timedelta(0))
        checks.append(check_clock("the run store", ahead))
    return checks


def check_clock(of: str, ahead: timedelta) -> Check:
    """Say whether our clock agrees with a time that somebody else told.

    Args:
        of: Who told it.
        ahead: How far it is ahead of ours.
    """
    if abs(ahead) <= _CLOCKS_AGREE:
        return Check("clock", "ok", f"agrees with that of {of}")
    way = "behind" if ahead > timedelta(0) else "ahead of"
    return Check(
        "clock",
        "failed",
        f"this machine's clock is {format_duration(abs(ahead))} {way} that of {of}",
        "Have it set by the network (NTP): leases and signed links depend on it.",
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
    """Say which extras of this package are installed, as its own metadata names them."""
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
    """Return the base URL to which a provider's key is sent, or None if it has no setting for it.

    Raises:
        ConfigError: The settings cannot be used.
    """
    if provider not in installed_backends():
        return None
    model = backend_class(provider).settings_model
    return getattr(load_settings(model), "base_url", None) if model else None


async def try_key(vault: CredentialVault, provider: str, profile: str | None) -> None:
    """Ask the provider for something that changes nothing, with this key.

    Raises:
        CredentialNotFound: There is no key.
        AuthenticationFailed: The provider does not accept it.
        BackendUnavailable: The provider cannot be reached.
        UnsupportedOperation: No installed backend works with this key.
    """
    name, profile = check_names(provider, profile)
    if name not in installed_backends():
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: no backend of this name is installed.",
            hint="`training-backends backends` lists what is installed.",
        )
    key = _OneKey(vault, name, profile)
    context = BackendContext(home=load_settings(Settings).home.expanduser(), credentials=key)
    backend = await to_thread.run_sync(make_backend, name, context)
    try:
        if backend.capabilities.lists_remote:
            await backend.list_remote(RemoteFilters(suffix=_NOBODYS_SUFFIX))
    finally:
        await backend.aclose()
    if not key.was_asked:
        raise UnsupportedOperation(
            f"The key for {name} cannot be tested: the backend asked for none.", backend=name
        )


class _OneKey:
    """Gives a backend the key that is to be tried, whichever profile it is set to use."""

    def __init__(self, vault: CredentialVault, provider: str, profile: str) -> None:
        self._vault = vault
        self._provider = provider
        self._profile = profile
        self.was_asked = False

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the key, and any other as the vault has it."""
        if provider != self._provider:
            return await self._vault.get(provider, profile)
        self.was_asked = True
        return await self._vault.get(provider, self._profile)
