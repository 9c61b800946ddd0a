"""The one place that secrets come from: given by hand, the environment, the keyring."""

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from anyio import to_thread
from pydantic import SecretStr

from training_backends.core.errors import ConfigError, CredentialNotFound, VaultLocked
from training_backends.core.redaction import register_secret
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
"""Seconds to wait for the keyring; enough for a slow one, and for a quick person's password."""

_LONGEST_NAME: Final = 30
"""Characters; keys are longer."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "huggingface": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
}
"""Variables that are not called <PROVIDER>_API_KEY."""
_COMMON: Final = ("huggingface", "mistral", "openai", "together", "wandb")
"""Providers whose variables `list` looks for even if nothing was ever stored for them."""

Source = Literal["explicit", "environment", "keyring"]


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


class KeyringInfo(NamedTuple):
    """The keyring in use.

    Attributes:
        name: What it is; None where there is none that keeps secrets safely.
        unlocked: Whether it can be used without a password being asked for.
    """

    name: str | None
    unlocked: bool


def environment_names(provider: str, profile: str = DEFAULT_PROFILE) -> tuple[str, ...]:
    """Return the environment variables that are looked at, the first one set counts."""
    if profile != DEFAULT_PROFILE:
        return (f"{_upper(provider)}_{_upper(profile)}_API_KEY",)
    return (*_VARIABLES.get(provider, ()), f"{_upper(provider)}_API_KEY")


class CredentialVault:
    """Secrets by provider and profile, from the first source that has one.

    The order is: what was given to the constructor, the environment, the keyring.
    A named profile is never answered with another profile's secret. Nothing is remembered:
    each `get` asks anew, so that a key that was changed elsewhere is found.

    The keyring is the system's or, if section `credentials` of the settings says so, an
    encrypted file in `home`.

    Args:
        explicit: Secrets by `provider` or `provider/profile`.
        home: Where index and encrypted file lie; None for the home of the settings.
        environ: Read instead of the process's environment.
        timeout: Seconds to wait for one answer of the keyring.
        keyring_backend: Used instead of the keyring of the settings.
        settings: Used instead of section `credentials`.
        ask: Called, in the event loop, when nothing else gives the encrypted file's password.
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
        """Return the secret of `provider`, or of `provider/profile`; asks the sources anew.

        Raises:
            CredentialNotFound: No source has one; the hint says how to give one.
            VaultLocked: The keyring did not open in time.
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
                f"{error.message} It was asked for the key of {_label(provider, profile)}.",
                hint=" ".join(filter(None, (error.hint, f"The variable for it is {variable}."))),
                retryable=error.retryable,
            ) from None
        value = "" if secret is None else secret.get_secret_value().strip()
        if not value:
            raise _not_found(provider, profile)
        return _known(SecretStr(value))

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Put a secret into the keyring and read it back; replaces an earlier one.

        White space around the secret is dropped.

        Raises:
            ConfigError: The secret is empty or cannot be a key.
            VaultLocked: The keyring is locked, or keeps nothing.
            StoreError: The secret is stored; the index that lists it cannot be written.
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
            CredentialNotFound: The keyring has none; one from the environment is not ours
                to delete.
            VaultLocked: The keyring did not open in time.
        """
        provider, profile = check_names(provider, profile)
        ring = await self._choice.opened(to_write=False)
        deleted = await ring.delete(_key(provider, profile))
        index = (await self._choice.made()).index
        await to_thread.run_sync(index.remove, provider, profile)
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
        stored = await to_thread.run_sync((await self._choice.made()).index.read)
        by_key: dict[str, datetime | None] = dict.fromkeys((*self._explicit, *_COMMON))
        by_key = {_key(*_split(name)): None for name in by_key}
        by_key |= {_key(one.provider, one.profile): one.stored_at for one in stored}
        return tuple(info for key in sorted(by_key) for info in self._infos(key, by_key[key]))

    async def sources(self) -> tuple[str, ...]:
        """Say where a key is looked for, what comes first standing first; asks no keyring."""
        file = (await self._choice.made()).file
        keyring = f"the {file.name}" if file else "the system's keyring"
        return ("what the program was given", "the environment", keyring)

    async def keyring(self) -> KeyringInfo:
        """Say which keyring is in use and whether it is open; shows no dialogue.

        Raises:
            VaultLocked: See `is_unlocked`; or it cannot be loaded.
        """
        name = await (await self._choice.made()).ring.describe()
        return KeyringInfo(name, name is not None and await self.is_unlocked())

    async def is_unlocked(self) -> bool:
        """Tell whether the keyring can be used without asking a person for its password.

        False where there is no keyring. One that cannot be asked, as on macOS, is taken to
        be unlocked.

        Raises:
            VaultLocked: It did not answer in time, or the password that the settings name for
                the encrypted file cannot be had or is wrong.
        """
        return await (await self._choice.made()).ring.is_unlocked()

    async def unlock(self, password: str | SecretStr | None = None) -> None:
        """Open the keyring; safe to repeat.

        Args:
            password: Of the encrypted file, chosen with this if there is no file yet. Left
                out, it comes from where the settings say, or is asked for.

        Raises:
            ConfigError: The system's keyring takes no password from a program.
            VaultLocked: The password is wrong, nobody gave it in time, or there is no keyring.
        """
        given = None if password is None else SecretStr(_plain(password))
        choice = await self._choice.made()
        if given is not None and choice.file is None:
            raise ConfigError(
                "The system's keyring takes no password from a program; it asks for it itself."
            )
        if given is None:
            given = self._choice.typed_password(choice, to_write=True)
        await choice.ring.unlock(given)

    async def lock(self) -> None:
        """Close the keyring; only `unlock` opens it again.

        The encrypted file is closed for this vault, the desktop's keyring for all programs.

        Raises:
            UnsupportedOperation: This keyring cannot be closed from here.
            VaultLocked: It did not answer in time, or there is none.
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
        raise ConfigError("The key is empty.", hint="Give the key itself on standard input.")
    if not text.isascii() or not text.isprintable() or " " in text:
        # Never say which character: what was pasted may hold half of a real key.
        raise ConfigError(
            "This cannot be a key: it holds a space, a line break or a special character.",
            hint="Copy the key again, alone.",
        )
    return text


def check_names(provider: str, profile: str | None = None) -> tuple[str, str]:
    """Return provider and profile as they are stored; `provider/profile` names both.

    Raises:
        ConfigError: A name has other characters than it may, or is long enough to be a key.
    """
    if profile is None and "/" in provider:  # a configuration names both in one word
        provider, _, profile = provider.partition("/")
    names = (provider.lower(), (DEFAULT_PROFILE if profile is None else profile).lower())
    for name in names:
        if len(name) > _LONGEST_NAME:
            # Not repeated: it may be one.
            raise ConfigError(
                "A name that long is no provider or profile. Was the key given in its place?",
                hint="A key is given on standard input; one that was typed here is best replaced.",
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name a provider or profile.",
                hint="Use letters, digits, - and _; for example `mistral` or `mistral/work`.",
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


def _known(secret: SecretStr) -> SecretStr:
    """Have a secret taken out of every log line from now on, and return it."""
    register_secret(secret)
    return secret
