"""The one place that secrets come from: given by hand, the environment, the keyring."""

import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeVar

import anyio.to_thread
from pydantic import SecretStr

from training_backends.core.errors import ConfigError, CredentialNotFound, VaultLocked
from training_backends.core.run import utc_now
from training_backends.core.settings import Settings, load_settings
from training_backends.credentials.index import CredentialIndex
from training_backends.credentials.ring import Keyring

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

__all__ = [
    "DEFAULT_PROFILE",
    "KEYRING_TIMEOUT",
    "CredentialInfo",
    "CredentialVault",
    "environment_names",
]

DEFAULT_PROFILE: Final = "default"

KEYRING_TIMEOUT: Final = 10.0
"""Seconds to wait for the keyring; long enough to type a password into its dialogue."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "huggingface": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
}
"""Variables that are not called <PROVIDER>_API_KEY."""
_COMMON: Final = ("huggingface", "mistral", "openai", "together", "wandb")
"""Providers whose variables `list` looks for even if nothing was ever stored for them."""

Source = Literal["explicit", "environment", "keyring"]
_T = TypeVar("_T")


class CredentialInfo(NamedTuple):
    """Where one secret would come from; never the secret.

    Attributes:
        name: The environment variable, or `provider/profile` in the keyring.
        stored_at: When it was put into the keyring.
        hidden_by: The source that comes first, where this one is not reached.
    """

    provider: str
    profile: str
    source: Source
    name: str
    stored_at: datetime | None = None
    hidden_by: Source | None = None


def environment_names(provider: str, profile: str = DEFAULT_PROFILE) -> tuple[str, ...]:
    """Return the environment variables that are looked at, the first one set counts."""
    if profile != DEFAULT_PROFILE:
        return (f"{_upper(provider)}_{_upper(profile)}_API_KEY",)
    return (*_VARIABLES.get(provider, ()), f"{_upper(provider)}_API_KEY")


class CredentialVault:
    """Secrets by provider and profile, from the first source that has one.

    The order is: what was given to the constructor, the environment, the keyring.
    A named profile is never answered with another profile's secret.

    Args:
        explicit: Secrets by `provider` or `provider/profile`.
        home: Where the index lies; None for the home of the settings.
        environ: Read instead of the process's environment.
        timeout: Seconds to wait for one answer of the keyring.
        keyring_backend: Used instead of the system's keyring.
    """

    def __init__(
        self,
        explicit: Mapping[str, str | SecretStr] | None = None,
        *,
        home: Path | None = None,
        environ: Mapping[str, str] | None = None,
        timeout: float = KEYRING_TIMEOUT,
        keyring_backend: "KeyringBackend | None" = None,
    ) -> None:
        self._explicit = {
            _key(*_split(name)): SecretStr(_cleaned(_plain(value)))
            for name, value in (explicit or {}).items()
        }
        self._home = home
        self._environ: Mapping[str, str] = os.environ if environ is None else environ
        self._ring = Keyring(timeout=timeout, backend=keyring_backend)

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the secret of `provider`, or of `provider/profile`; asks the sources anew.

        Raises:
            CredentialNotFound: No source has one; the hint says how to give one.
            VaultLocked: The keyring did not open in time.
        """
        provider, profile = _checked(provider, profile)
        given = self._explicit.get(_key(provider, profile))
        if given is not None:
            return given
        if found := self._from_environment(provider, profile):
            return SecretStr(found[1])
        try:
            secret = await _in_thread(lambda: self._ring.get(_key(provider, profile)))
        except VaultLocked as error:
            variable = environment_names(provider, profile)[0]
            raise VaultLocked(
                f"{error.message} It was asked for the key of {_label(provider, profile)}.",
                hint=f"Unlock the keyring, or set {variable}.",
                retryable=error.retryable,
            ) from None
        if not secret or not secret.strip():
            raise _not_found(provider, profile)
        return SecretStr(secret.strip())

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Put a secret into the keyring and read it back; replaces an earlier one.

        White space around the secret is dropped.

        Raises:
            ConfigError: The secret is empty or cannot be a key.
            VaultLocked: The keyring is locked, or keeps nothing.
            StoreError: The secret is stored; the index that lists it cannot be written.
        """
        provider, profile = _checked(provider, profile)
        value = _cleaned(_plain(secret))
        await _in_thread(lambda: self._ring.set(_key(provider, profile), value))
        await _in_thread(lambda: self._index().add(provider, profile, utc_now()))

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Delete a secret from the keyring.

        Raises:
            CredentialNotFound: The keyring has none; one from the environment is not ours
                to delete.
            VaultLocked: The keyring did not open in time.
        """
        provider, profile = _checked(provider, profile)
        deleted = await _in_thread(lambda: self._ring.delete(_key(provider, profile)))
        await _in_thread(lambda: self._index().remove(provider, profile))
        if not deleted:
            found = self._from_environment(provider, profile)
            raise CredentialNotFound(
                f"The keyring holds no key for {_label(provider, profile)}.",
                hint=f"It comes from {found[0]}; unset that variable." if found else None,
            )

    async def list(self) -> tuple[CredentialInfo, ...]:
        """Say which secrets there are and where each comes from, without reading any.

        The keyring is not asked, so that nothing needs to be unlocked: what it holds is
        known from the index.
        """
        stored = await _in_thread(lambda: self._index().read())
        by_key: dict[str, datetime | None] = dict.fromkeys((*self._explicit, *_COMMON))
        by_key = {_key(*_split(name)): None for name in by_key}
        by_key |= {_key(one.provider, one.profile): one.stored_at for one in stored}
        return tuple(info for key in sorted(by_key) for info in self._infos(key, by_key[key]))

    def _infos(self, key: str, stored_at: datetime | None) -> tuple[CredentialInfo, ...]:
        provider, profile = _split(key)
        found: tuple[CredentialInfo, ...] = ()
        if key in self._explicit:
            found += (CredentialInfo(provider, profile, "explicit", key),)
        if variable := self._from_environment(provider, profile):
            found += (CredentialInfo(provider, profile, "environment", variable[0]),)
        if stored_at:
            found += (CredentialInfo(provider, profile, "keyring", key, stored_at),)
        return found[:1] + tuple(one._replace(hidden_by=found[0].source) for one in found[1:])

    def _from_environment(self, provider: str, profile: str) -> tuple[str, str] | None:
        for name in environment_names(provider, profile):
            value = self._environ.get(name, "").strip()
            if value:
                return name, value
        return None

    def _index(self) -> CredentialIndex:
        home = self._home or load_settings(Settings).home.expanduser()
        return CredentialIndex(home / "credentials.json")

    def __repr__(self) -> str:
        return f"CredentialVault({len(self._explicit)} given)"


async def _in_thread(call: Callable[[], _T]) -> _T:
    # The call is bounded by itself, so a cancelled waiter leaves nothing behind for long.
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


def _plain(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _cleaned(value: str) -> str:
    text = value.strip()
    if not text:
        raise ConfigError("The key is empty.", hint="Give the key itself on standard input.")
    if not text.isascii() or not text.isprintable() or " " in text:
        # Never say which character: what was pasted may hold half of a real key.
        raise ConfigError(
            "This cannot be a key: it holds a space, a line break or a special character.",
            hint="Copy the key again, alone.",
        )
    return text


def _checked(provider: str, profile: str | None) -> tuple[str, str]:
    if profile is None and "/" in provider:  # a configuration names both in one word
        provider, _, profile = provider.partition("/")
    names = (provider.lower(), (DEFAULT_PROFILE if profile is None else profile).lower())
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name a provider or profile.",
                hint="Use letters, digits, - and _; for example `mistral` or `mistral/work`.",
            )
    return names


def _split(name: str) -> tuple[str, str]:
    return _checked(name, None)


def _key(provider: str, profile: str) -> str:
    return f"{provider}/{profile}"


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")


def _label(provider: str, profile: str) -> str:
    return provider if profile == DEFAULT_PROFILE else f"{provider} (profile {profile})"


def _not_found(provider: str, profile: str) -> CredentialNotFound:
    variable = environment_names(provider, profile)[0]
    option = "" if profile == DEFAULT_PROFILE else f" --profile {profile}"
    return CredentialNotFound(
        f"There is no key for {_label(provider, profile)}, neither in the environment nor in "
        "the keyring.",
        hint=f"Set {variable}, or store it with `training-backends credentials set "
        f"{provider}{option}`. Without a key: `--backend local` trains on this machine, and "
        "`training-backends serve` answers the same protocol here.",
    )
