"""Look up secrets: explicit values, then environment variables, then the keyring."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from anyio import to_thread
from pydantic import SecretStr

from training_backends.core.errors import ConfigError, CredentialNotFound, VaultLocked
from training_backends.core.redaction import register_secret, split_secret
from training_backends.core.run import utc_now
from training_backends.credentials.choice import AskPassword, CredentialSettings, KeyringChoice

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

__all__ = [
    "DEFAULT_PROFILE",
    "KEYRING_TIMEOUT",
    "CredentialInfo",
    "CredentialVault",
    "KeyringInfo",
    "check_names",
    "environment_names",
]

DEFAULT_PROFILE: Final = "default"

KEYRING_TIMEOUT: Final = 10.0
"""Seconds to wait for the keyring, including typing a password."""

_LONGEST_NAME: Final = 30
"""Maximum characters of a name; API keys are longer."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "huggingface": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
}
"""Environment variables not named <PROVIDER>_API_KEY."""
_COMMON: Final = ("huggingface", "mistral", "openai", "together", "wandb")
"""Providers whose variables `list` checks even without a stored secret."""

Source = Literal["explicit", "environment", "keyring"]


class CredentialInfo(NamedTuple):
    """The source of a secret, without the secret.

    Attributes:
        name: Environment variable, or `provider/profile` in the keyring.
        stored_at: When it was stored in the keyring.
        hidden_by: Source that takes precedence over this one.
    """

    provider: str
    profile: str
    source: Source
    name: str
    stored_at: datetime | None = None
    hidden_by: Source | None = None


class KeyringInfo(NamedTuple):
    """The keyring in use.

    Attributes:
        name: Display name; None without a secure keyring.
        unlocked: Whether it can be used without a password prompt.
    """

    name: str | None
    unlocked: bool


def environment_names(provider: str, profile: str = DEFAULT_PROFILE) -> tuple[str, ...]:
    """Return the environment variables to check; the first one that is set is used."""
    if profile != DEFAULT_PROFILE:
        return (f"{_upper(provider)}_{_upper(profile)}_API_KEY",)
    return (*_VARIABLES.get(provider, ()), f"{_upper(provider)}_API_KEY")


class CredentialVault:
    """Secrets by provider and profile, from the first source that has one.

    The order is: values passed to the constructor, environment variables, the keyring. A profile
    never falls back to another profile's secret. Nothing is cached: each `get` reads the sources
    again, so a changed key takes effect.

    The keyring is the system's or, if section `credentials` of the settings says so, an
    encrypted file in `home`.

    Args:
        explicit: Secrets by `provider` or `provider/profile`.
        home: Directory of the index and the encrypted file; None: home from the settings.
        environ: Overrides the process environment.
        timeout: Seconds to wait for a response of the keyring.
        keyring_backend: Overrides the keyring from the settings.
        settings: Overrides section `credentials`.
        ask: Prompts for the encrypted file's password if the settings name no source for it;
            called in the event loop.
    """

    def __init__(
        self,
        explicit: Mapping[str, str | SecretStr] | None = None,
        *,
        home: Path | None = None,
        environ: Mapping[str, str] | None = None,
        timeout: float = KEYRING_TIMEOUT,
        keyring_backend: "KeyringBackend | None" = None,
        settings: CredentialSettings | None = None,
        ask: AskPassword | None = None,
    ) -> None:
        self._explicit = {
            _key(*_split(name)): SecretStr(_cleaned(_plain(value)))
            for name, value in (explicit or {}).items()
        }
        self._environ: Mapping[str, str] = os.environ if environ is None else environ
        self._choice = KeyringChoice(
            home=home, settings=settings, backend=keyring_backend, timeout=timeout, ask=ask
        )

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return the secret of `provider` or `provider/profile`.

        Raises:
            CredentialNotFound: No source has the secret; the hint says how to set it.
            VaultLocked: The keyring is locked or timed out.
        """
        provider, profile = check_names(provider, profile)
        given = self._explicit.get(_key(provider, profile))
        if given is not None:
            return _known(given)
        if found := self._from_environment(provider, profile):
            return _known(SecretStr(found[1]))
        try:
            ring = await self._choice.opened(to_write=False)
            secret = await ring.get(_key(provider, profile))
        except VaultLocked as error:
            variable = environment_names(provider, profile)[0]
            raise VaultLocked(
                f"{error.message} Needed for the API key of {_label(provider, profile)}.",
                hint=" ".join(filter(None, (error.hint, f"Alternatively, set {variable}."))),
                retryable=error.retryable,
            ) from None
        value = "" if secret is None else secret.get_secret_value().strip()
        if not value:
            raise _not_found(provider, profile)
        return _known(SecretStr(value))

    async def get_all(self, provider: str, profile: str | None = None) -> Mapping[str, SecretStr]:
        """Return the secrets of a provider that needs several; see `CredentialSource.get_all`.

        Raises:
            CredentialNotFound: No source has any; the hint says how to set it.
            VaultLocked: The keyring is locked or timed out.
        """
        return split_secret(await self.get(provider, profile))

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Store a secret in the keyring, replacing an existing one, and verify it.

        Surrounding white space is removed.

        Raises:
            ConfigError: The secret is empty or not a valid key.
            VaultLocked: The keyring is locked or did not store the secret.
            StoreError: The secret is stored, but the index cannot be written.
        """
        provider, profile = check_names(provider, profile)
        value = SecretStr(_cleaned(_plain(secret)))
        ring = await self._choice.opened(to_write=True)
        await ring.set(_key(provider, profile), value)
        index = (await self._choice.made()).index
        await to_thread.run_sync(index.add, provider, profile, utc_now())

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Delete a secret from the keyring.

        Raises:
            CredentialNotFound: The keyring has no such secret; environment variables cannot be
                deleted.
            VaultLocked: The keyring is locked or timed out.
        """
        provider, profile = check_names(provider, profile)
        ring = await self._choice.opened(to_write=False)
        deleted = await ring.delete(_key(provider, profile))
        index = (await self._choice.made()).index
        await to_thread.run_sync(index.remove, provider, profile)
        if not deleted:
            found = self._from_environment(provider, profile)
            raise CredentialNotFound(
                f"The keyring has no key for {_label(provider, profile)}.",
                hint=f"It comes from {found[0]}; unset that variable." if found else None,
            )

    async def list(self) -> tuple[CredentialInfo, ...]:
        """List secrets and their sources, without reading any.

        Uses the index instead of the keyring, so nothing needs to be unlocked.
        """
        stored = await to_thread.run_sync((await self._choice.made()).index.read)
        by_key: dict[str, datetime | None] = dict.fromkeys((*self._explicit, *_COMMON))
        by_key = {_key(*_split(name)): None for name in by_key}
        by_key |= {_key(one.provider, one.profile): one.stored_at for one in stored}
        return tuple(info for key in sorted(by_key) for info in self._infos(key, by_key[key]))

    async def sources(self) -> tuple[str, ...]:
        """Return the sources of keys in order of precedence, without opening the keyring."""
        file = (await self._choice.made()).file
        keyring = f"the {file.name}" if file else "the system keyring"
        return ("explicit values", "the environment", keyring)

    async def keyring(self) -> KeyringInfo:
        """Return which keyring is in use and whether it is unlocked, without a prompt.

        Raises:
            VaultLocked: See `is_unlocked`; or the keyring cannot be loaded.
        """
        name = await (await self._choice.made()).ring.describe()
        return KeyringInfo(name, name is not None and await self.is_unlocked())

    async def is_unlocked(self) -> bool:
        """Return whether the keyring can be used without a password prompt.

        False without a keyring. A keyring that cannot report its state, as on macOS, counts as
        unlocked.

        Raises:
            VaultLocked: The keyring timed out, or the configured password of the encrypted file
                cannot be read or is wrong.
        """
        return await (await self._choice.made()).ring.is_unlocked()

    async def unlock(self, password: str | SecretStr | None = None) -> None:
        """Unlock the keyring; safe to repeat.

        Args:
            password: Password of the encrypted file, or of a new one. Default: from the source
                named in the settings, else a prompt.

        Raises:
            ConfigError: A password was given for the system keyring, which accepts none.
            VaultLocked: The password is wrong or was not given in time, or there is no keyring.
        """
        given = None if password is None else SecretStr(_plain(password))
        choice = await self._choice.made()
        if given is not None and choice.file is None:
            raise ConfigError(
                "The system keyring accepts no password from a program; it prompts for it itself."
            )
        if given is None:
            given = self._choice.typed_password(choice, to_write=True)
        await choice.ring.unlock(given)

    async def lock(self) -> None:
        """Lock the keyring until `unlock` is called.

        The encrypted file is locked for this vault, a desktop keyring for all programs.

        Raises:
            UnsupportedOperation: The keyring does not support it.
            VaultLocked: The keyring timed out, or there is none.
        """
        await (await self._choice.made()).ring.lock()

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

    def __repr__(self) -> str:
        return f"CredentialVault({len(self._explicit)} given)"


def _plain(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _cleaned(value: str) -> str:
    text = value.strip()
    if not text:
        raise ConfigError("The key is empty.", hint="Pass the key on standard input.")
    if text.startswith("{"):
        with suppress(ValueError):  # several secrets: see `CredentialSource.get_all`
            return json.dumps(json.loads(text), separators=(",", ":"))
    if not text.isascii() or not text.isprintable() or " " in text:
        # Do not quote the text: it may contain part of a real key.
        raise ConfigError(
            "Invalid key: it contains a space, a line break or a special character.",
            hint="Copy the key again, without other text.",
        )
    return text


def check_names(provider: str, profile: str | None = None) -> tuple[str, str]:
    """Return provider and profile as they are stored; `provider/profile` gives both.

    Raises:
        ConfigError: A name has unsupported characters, or is long enough to be a key.
    """
    if profile is None and "/" in provider:  # as in configurations
        provider, _, profile = provider.partition("/")
    names = (provider.lower(), (DEFAULT_PROFILE if profile is None else profile).lower())
    for name in names:
        if len(name) > _LONGEST_NAME:
            # Do not quote it: it may be a key.
            raise ConfigError(
                "The provider or profile name is too long; it looks like an API key.",
                hint="Pass the key on standard input, and rotate a key that was typed here.",
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"Invalid provider or profile name {name!r}.",
                hint="Use letters, digits, - and _, for example `mistral` or `mistral/work`.",
            )
    return names


def _split(name: str) -> tuple[str, str]:
    return check_names(name)


def _key(provider: str, profile: str) -> str:
    return f"{provider}/{profile}"


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")


def _label(provider: str, profile: str) -> str:
    return provider if profile == DEFAULT_PROFILE else f"{provider} (profile {profile})"


_SERVED: Final = frozenset({"mistral", "openai"})
"""Providers whose protocol the gateway serves."""
_NOT_FOR_TRAINING: Final = frozenset({"huggingface", "wandb"})


def _not_found(provider: str, profile: str) -> CredentialNotFound:
    variable = environment_names(provider, profile)[0]
    option = "" if profile == DEFAULT_PROFILE else f" --profile {profile}"
    return CredentialNotFound(
        f"No API key for {_label(provider, profile)} found in the environment or the keyring.",
        hint=f"Set {variable}, or store the key with `training-backends credentials set "
        f"{provider}{option}`.{_alternative(provider)}",
    )


def _alternative(provider: str) -> str:
    """Return how to train without the key of a provider."""
    if provider in _NOT_FOR_TRAINING:
        return ""
    found = " Without a key, use `--backend local` to train on this machine"
    if provider in _SERVED:
        found += ", or `training-backends serve` for your own server of the same protocol"
    return f"{found}."


def _known(secret: SecretStr) -> SecretStr:
    """Register a secret for redaction in logs, and return it."""
    register_secret(secret)
    return secret
