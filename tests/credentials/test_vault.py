"""Secrets come from the first source that has one, are never shown, and nothing hangs."""

import json
import logging
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import keyring.core
import pytest
from keyring.backend import KeyringBackend
from keyring.backends.chainer import ChainerBackend
from keyring.errors import KeyringLocked, PasswordDeleteError
from pydantic import SecretStr

from training_backends import ConfigError, CredentialNotFound, StoreError, VaultLocked
from training_backends.credentials.vault import CredentialVault, environment_names

pytestmark = pytest.mark.anyio

CANARY = "k-4f1d0c9a7e"


class MemoryKeyring(KeyringBackend):
    """Keeps secrets in a dictionary."""

    priority = 1

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        if self.kept.pop((service, username), None) is None:
            raise PasswordDeleteError("not found")


class WaitingKeyring(MemoryKeyring):
    """Answers only once it is let go, as one that waits for a password."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.asked = 0

    def get_password(self, service: str, username: str) -> str | None:
        self.asked += 1
        self.let_go.wait()
        return super().get_password(service, username)


class LockedKeyring(MemoryKeyring):
    """Refuses to open."""

    def get_password(self, *_: str) -> str | None:
        raise KeyringLocked("Failed to unlock the collection!")


class BrokenKeyring(MemoryKeyring):
    """Fails with a text that holds the secret."""

    def set_password(self, *secret: str) -> None:
        raise RuntimeError(f"cannot store {secret}")


class PlaintextKeyring(MemoryKeyring):
    """Named like those that write secrets into an open file."""


def backend(name: str) -> KeyringBackend:
    """Make one of keyring's own backends."""
    made: KeyringBackend = keyring.core.load_keyring(name)
    return made


@pytest.fixture
def ring() -> MemoryKeyring:
    return MemoryKeyring()


def make(
    home: Path,
    ring: KeyringBackend | None = None,
    *,
    explicit: Mapping[str, str | SecretStr] | None = None,
    environ: Mapping[str, str] | None = None,
    timeout: float = 5.0,
) -> CredentialVault:
    return CredentialVault(
        explicit,
        home=home,
        environ=environ or {},
        timeout=timeout,
        keyring_backend=ring or backend("keyring.backends.fail.Keyring"),
    )


@pytest.fixture
def waiting() -> Iterator[WaitingKeyring]:
    """A keyring that waits, let go at the end so that no thread is left."""
    ring = WaitingKeyring()
    yield ring
    ring.let_go.set()


async def test_the_first_source_that_has_a_secret_gives_it(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """What is given by hand comes before the environment, that before the keyring."""
    await make(tmp_path, ring).set("mistral", "ring")
    variables = {"MISTRAL_API_KEY": "variable"}
    vault = make(tmp_path, ring, explicit={"mistral": "given"}, environ=variables)
    assert (await vault.get("mistral")).get_secret_value() == "given"
    vault = make(tmp_path, ring, environ=variables)
    assert (await vault.get("mistral")).get_secret_value() == "variable"
    vault = make(tmp_path, ring)
    assert (await vault.get("mistral")).get_secret_value() == "ring"


async def test_the_process_environment_is_read_anew_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is changed while the program runs is picked up."""
    vault = CredentialVault(home=tmp_path)
    monkeypatch.setenv("MISTRAL_API_KEY", "old")
    assert (await vault.get("mistral")).get_secret_value() == "old"
    monkeypatch.setenv("MISTRAL_API_KEY", "new")
    assert (await vault.get("mistral")).get_secret_value() == "new"


@pytest.mark.parametrize(
    ("provider", "profile", "names"),
    [
        ("mistral", "default", ("MISTRAL_API_KEY",)),
        ("mistral", "work", ("MISTRAL_WORK_API_KEY",)),
        ("open-ai", "my-team", ("OPEN_AI_MY_TEAM_API_KEY",)),
        ("wandb", "default", ("WANDB_API_KEY",)),
        (
            "huggingface",
            "default",
            ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_API_KEY"),
        ),
    ],
)
def test_each_provider_has_its_variables(
    provider: str, profile: str, names: tuple[str, ...]
) -> None:
    """The names follow one pattern, beside those that others made known."""
    assert environment_names(provider, profile) == names


async def test_a_profile_never_gets_another_profiles_secret(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """With two accounts the wrong one is worse than none."""
    vault = make(tmp_path, ring, environ={"MISTRAL_API_KEY": "mine"})
    await vault.set("mistral", "ring")
    with pytest.raises(CredentialNotFound) as caught:
        await vault.get("mistral", "work")
    assert "MISTRAL_WORK_API_KEY" in (caught.value.hint or "")
    assert "mistral --profile work" in (caught.value.hint or "")


async def test_provider_and_profile_may_stand_in_one_word(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """A configuration names its key as provider/profile."""
    vault = make(tmp_path, ring)
    await vault.set("wandb", "one", "team")
    assert (await vault.get("wandb/team")).get_secret_value() == "one"
    assert (await vault.get("WandB", "Team")).get_secret_value() == "one"


async def test_a_missing_key_names_three_ways_on(tmp_path: Path) -> None:
    """The variable, the command, and how to do without a key."""
    with pytest.raises(CredentialNotFound) as caught:
        await make(tmp_path).get("mistral")
    hint = caught.value.hint or ""
    assert "MISTRAL_API_KEY" in hint
    assert "training-backends credentials set mistral" in hint
    assert "--backend local" in hint


async def test_white_space_around_a_secret_is_dropped(tmp_path: Path, ring: MemoryKeyring) -> None:
    """A line break that came with the key does not spoil every request."""
    vault = make(
        tmp_path, ring, explicit={"openai": f" {CANARY}\n"}, environ={"WANDB_API_KEY": "w\r\n"}
    )
    await vault.set("mistral", f"{CANARY}\n")
    assert list(ring.kept.values()) == [CANARY]
    assert (await vault.get("mistral")).get_secret_value() == CANARY
    assert (await vault.get("openai")).get_secret_value() == CANARY
    assert (await vault.get("wandb")).get_secret_value() == "w"


async def test_a_secret_that_others_stored_with_a_line_break_is_read_without(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """The keyring's own command line stores what it is given."""
    ring.set_password("training-backends", "mistral/default", "key\n")
    assert (await make(tmp_path, ring).get("mistral")).get_secret_value() == "key"


@pytest.mark.parametrize(
    "secret", ["", " \n", "two words", "two\nlines", "sch\N{LATIN SMALL LETTER O WITH DIAERESIS}n"]
)
async def test_what_cannot_be_a_key_is_refused_unseen(
    tmp_path: Path, ring: MemoryKeyring, secret: str
) -> None:
    """Nothing is stored and the message does not repeat it."""
    with pytest.raises(ConfigError) as caught:
        await make(tmp_path, ring).set("mistral", secret)
    assert ring.kept == {}
    assert not secret.strip() or secret not in str(caught.value)


async def test_an_empty_variable_is_no_key(tmp_path: Path, ring: MemoryKeyring) -> None:
    """An empty variable does not hide the keyring."""
    vault = make(tmp_path, ring, environ={"MISTRAL_API_KEY": " "})
    await vault.set("mistral", "ring")
    assert (await vault.get("mistral")).get_secret_value() == "ring"


@pytest.mark.parametrize("name", ["", "a/b/c", "mis tral", "../x", "mistral/"])
async def test_names_are_checked(tmp_path: Path, name: str) -> None:
    """A name that could not be a variable is refused."""
    with pytest.raises(ConfigError):
        await make(tmp_path).get(name)


async def test_a_keyring_that_waits_is_not_waited_for(
    tmp_path: Path, waiting: WaitingKeyring
) -> None:
    """A hidden password dialogue ends in a clear error, and a later try succeeds."""
    vault = make(tmp_path, waiting, timeout=0.05)
    waiting.kept["training-backends", "mistral/default"] = "key"
    with pytest.raises(VaultLocked, match="mistral") as caught:
        await vault.get("mistral")
    assert caught.value.retryable
    assert "MISTRAL_API_KEY" in (caught.value.hint or "")


async def test_retries_pile_up_no_threads(tmp_path: Path, waiting: WaitingKeyring) -> None:
    """While one call hangs, no second one is started; once it ends, the next one works."""
    vault = make(tmp_path, waiting, timeout=0.02)
    for _ in range(5):
        with pytest.raises(VaultLocked):
            await vault.get("mistral")
    hanging = [thread for thread in threading.enumerate() if thread.name == "keyring"]
    assert waiting.asked == 1
    assert len(hanging) == 1
    assert hanging[0].daemon
    waiting.kept["training-backends", "mistral/default"] = "key"
    waiting.let_go.set()
    hanging[0].join(5)
    assert (await vault.get("mistral")).get_secret_value() == "key"


async def test_a_locked_keyring_says_so(tmp_path: Path) -> None:
    """Locked is not the same as empty."""
    with pytest.raises(VaultLocked, match="locked"):
        await make(tmp_path, LockedKeyring()).get("mistral")


@pytest.mark.parametrize(
    "ring",
    [
        backend("keyring.backends.fail.Keyring"),
        backend("keyring.backends.null.Keyring"),
        PlaintextKeyring(),
    ],
    ids=lambda ring: type(ring).__module__ + "." + type(ring).__name__,
)
async def test_a_keyring_that_keeps_nothing_safely_is_refused(
    tmp_path: Path, ring: KeyringBackend
) -> None:
    """A secret is never thought stored when it is not, nor put into an open file."""
    vault = make(tmp_path, ring)
    with pytest.raises(VaultLocked) as caught:
        await vault.set("mistral", CANARY)
    assert not caught.value.retryable
    assert "environment variable" in (caught.value.hint or "")
    assert not getattr(ring, "kept", None)
    with pytest.raises(CredentialNotFound):
        await vault.get("mistral")


async def test_a_chain_of_keyrings_uses_only_the_systems_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file keyring that happens to be installed gets no secret."""
    surprise = MemoryKeyring()
    monkeypatch.setattr(ChainerBackend, "backends", [surprise])
    with pytest.raises(VaultLocked, match="no keyring"):
        await make(tmp_path, backend("keyring.backends.chainer.ChainerBackend")).set(
            "mistral", CANARY
        )
    assert surprise.kept == {}


async def test_a_failing_keyring_gives_nothing_away(tmp_path: Path) -> None:
    """The text of its error may hold the secret and is not passed on."""
    with pytest.raises(VaultLocked) as caught:
        await make(tmp_path, BrokenKeyring()).set("mistral", CANARY)
    assert CANARY not in f"{caught.value!r} {caught.value} {caught.value.hint}"
    assert caught.value.__suppress_context__


async def test_no_secret_is_shown(
    tmp_path: Path, ring: MemoryKeyring, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in a repr, nor in the list, the index or a log."""
    caplog.set_level(logging.DEBUG)
    vault = make(tmp_path, ring, explicit={"openai": CANARY}, environ={"TOGETHER_API_KEY": CANARY})
    await vault.set("mistral", CANARY)
    shown = [repr(vault), repr(await vault.list()), repr(await vault.get("mistral")), caplog.text]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in shown if CANARY in text]


async def test_the_list_says_where_each_secret_comes_from(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """Sources that are hidden by an earlier one are shown as such."""
    variables = {"MISTRAL_API_KEY": "a", "HF_TOKEN": "b", "UNRELATED_API_KEY": "c"}
    vault = make(tmp_path, ring, explicit={"openai/team": "d"}, environ=variables)
    await vault.set("mistral", "e")
    await vault.set("mistral", "f", "work")
    found = [(one.provider, one.profile, one.source, one.hidden_by) for one in await vault.list()]
    assert found == [
        ("huggingface", "default", "environment", None),
        ("mistral", "default", "environment", None),
        ("mistral", "default", "keyring", "environment"),
        ("mistral", "work", "keyring", None),
        ("openai", "team", "explicit", None),
    ]


async def test_the_list_asks_no_keyring(tmp_path: Path, waiting: WaitingKeyring) -> None:
    """Listing needs nothing unlocked."""
    assert await make(tmp_path, waiting).list() == ()
    assert waiting.asked == 0


async def test_a_deleted_secret_is_gone_everywhere(tmp_path: Path, ring: MemoryKeyring) -> None:
    """It leaves the keyring and the list; deleting again says that there is none."""
    vault = make(tmp_path, ring)
    await vault.set("mistral", "a")
    await vault.delete("mistral")
    assert ring.kept == {}
    assert await vault.list() == ()
    with pytest.raises(CredentialNotFound):
        await vault.delete("mistral")


async def test_a_variable_is_not_ours_to_delete(tmp_path: Path, ring: MemoryKeyring) -> None:
    """The error names the variable that goes on giving the key."""
    vault = make(tmp_path, ring, environ={"MISTRAL_API_KEY": "a"})
    with pytest.raises(CredentialNotFound) as caught:
        await vault.delete("mistral")
    assert "MISTRAL_API_KEY" in (caught.value.hint or "")


async def test_a_secret_is_replaced(tmp_path: Path, ring: MemoryKeyring) -> None:
    """The last one counts, and it is listed once."""
    vault = make(tmp_path, ring)
    await vault.set("mistral", "old")
    await vault.set("mistral", SecretStr("new"))
    assert (await vault.get("mistral")).get_secret_value() == "new"
    assert len(await vault.list()) == 1


async def test_the_index_is_for_its_owner_only(tmp_path: Path, ring: MemoryKeyring) -> None:
    """It holds names and times, and other users need not know them."""
    home = tmp_path / "new" / "home"
    await make(home, ring).set("mistral", "a")
    index = home / "credentials.json"
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    (entry,) = json.loads(index.read_text())["credentials"]
    assert sorted(entry) == ["profile", "provider", "stored_at"]
    assert not list(home.glob("*.tmp"))


async def test_a_damaged_index_is_an_error_with_a_way_on(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """It is not overwritten silently, and `get` does not need it."""
    vault = make(tmp_path, ring)
    await vault.set("mistral", "a")
    (tmp_path / "credentials.json").write_text("{")
    with pytest.raises(StoreError) as caught:
        await vault.list()
    assert "Move it away" in (caught.value.hint or "")
    assert (await vault.get("mistral")).get_secret_value() == "a"


def test_keyring_is_imported_only_when_it_is_reached() -> None:
    """A key from the environment costs no keyring."""
    program = (
        "import anyio, sys\n"
        "from training_backends.credentials.vault import CredentialVault\n"
        "vault = CredentialVault(environ={'MISTRAL_API_KEY': 'a'})\n"
        "anyio.run(vault.get, 'mistral')\n"
        "assert 'keyring' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
