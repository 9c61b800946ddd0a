"""Secrets come from the first source that has one, are never shown, and nothing hangs."""

import json
import logging
import os
import signal
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

from tests.forking import Program
from tests.waiting import until, wait_until
from training_backends import (
    ConfigError,
    CredentialNotFound,
    StoreError,
    UnsupportedOperation,
    VaultLocked,
)
from training_backends.core.redaction import redact
from training_backends.credentials.choice import CredentialSettings
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


class GoneKeyring(MemoryKeyring):
    """Has left its socket behind."""

    def get_password(self, *_: str) -> str | None:
        raise ConnectionRefusedError


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


@pytest.mark.parametrize(
    ("provider", "local", "served"),
    [
        ("mistral", True, True),
        ("openai", True, True),
        ("together", True, False),
        ("wandb", False, False),
    ],
)
async def test_the_hint_on_a_missing_key_names_only_what_replaces_its_provider(
    tmp_path: Path, provider: str, local: bool, served: bool
) -> None:
    """The gateway serves the protocols of two; a tracker has no replacement."""
    with pytest.raises(CredentialNotFound) as caught:
        await CredentialVault(home=tmp_path).get(provider)
    hint = caught.value.hint or ""
    assert f"credentials set {provider}" in hint
    assert ("--backend local" in hint, "serve" in hint) == (local, served)


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


async def test_a_provider_may_have_several_secrets(tmp_path: Path, ring: MemoryKeyring) -> None:
    """As a JSON object of texts; a plain key is the only one. Each of them is redacted."""
    vault = make(tmp_path, ring, environ={"OTHER_API_KEY": '{"a": "one", "b": {}}'})
    await vault.set("aws", '{"id": "id-0123456789",\n "pem": "-- BEGIN KEY --\\nabc"}')
    found = await vault.get_all("aws")
    assert found["id"].get_secret_value() == "id-0123456789"
    assert found["pem"].get_secret_value() == "-- BEGIN KEY --\nabc"
    assert "id-0123456789" not in redact("failed with id-0123456789")
    await vault.set("mistral", CANARY)
    assert (await vault.get_all("mistral"))["key"].get_secret_value() == CANARY
    assert [*await vault.get_all("other")] == ["key"]


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


async def test_a_key_in_the_place_of_a_name_is_not_stored_as_one(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """The list and the index show names; the error does not repeat it."""
    secret = "sk-" + "a1b2c3d4" * 4
    for call in (
        make(tmp_path, ring).set(secret, "x"),
        make(tmp_path, ring).get("mistral", secret),
    ):
        with pytest.raises(ConfigError, match="long") as caught:
            await call
        assert secret not in f"{caught.value!r} {caught.value.hint}"
    assert ring.kept == {}


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
    await until(lambda: not hanging[0].is_alive())
    assert (await vault.get("mistral")).get_secret_value() == "key"


async def test_a_locked_keyring_says_so(tmp_path: Path) -> None:
    """Locked is not the same as empty."""
    with pytest.raises(VaultLocked, match="locked"):
        await make(tmp_path, LockedKeyring()).get("mistral")


async def test_a_keyring_that_went_away_may_come_back(tmp_path: Path) -> None:
    """The bus is restarted, for example: whoever runs for long tries again."""
    with pytest.raises(VaultLocked, match="reached") as caught:
        await make(tmp_path, GoneKeyring()).get("mistral")
    assert caught.value.retryable


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


async def test_a_keyring_without_a_lock_is_taken_to_be_open(
    tmp_path: Path, ring: MemoryKeyring
) -> None:
    """Unlocking just asks it for something; locking it is not pretended."""
    vault = make(tmp_path, ring)
    assert await vault.is_unlocked()
    await vault.unlock()
    with pytest.raises(UnsupportedOperation, match="MemoryKeyring"):
        await vault.lock()
    assert (await vault.keyring()).unlocked


async def test_where_there_is_no_keyring_nothing_is_unlocked(tmp_path: Path) -> None:
    """It is not called open either."""
    vault = make(tmp_path)
    assert not await vault.is_unlocked()
    assert tuple(await vault.keyring()) == (None, False)
    for call in (vault.unlock(), vault.lock()):
        with pytest.raises(VaultLocked, match="no keyring"):
            await call


async def test_the_order_of_the_sources_is_told(tmp_path: Path) -> None:
    """For the list of keys and for whoever looks into what is wrong."""
    home = tmp_path / "home"
    system = CredentialVault(home=home)
    assert await system.sources() == (
        "explicit values",
        "the environment",
        "the system keyring",
    )
    file = CredentialVault(home=home, settings=CredentialSettings(keyring="file"))
    assert (await file.sources())[-1] == f"the encrypted file {home / 'credentials.keyring'}"


async def test_a_failing_keyring_gives_nothing_away(tmp_path: Path) -> None:
    """The text of its error may hold the secret and is not passed on."""
    with pytest.raises(VaultLocked) as caught:
        await make(tmp_path, BrokenKeyring()).set("mistral", CANARY)
    assert CANARY not in f"{caught.value!r} {caught.value} {caught.value.hint}"
    assert caught.value.__cause__ is caught.value.__context__ is None


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


ASK = """
import anyio
from training_backends import CredentialNotFound, VaultLocked
from training_backends.credentials.vault import CredentialVault

async def main():
    vault = CredentialVault(environ={}, timeout=20)
    for call in (vault.get("mistral"), vault.set("mistral", "canary")):
        try:
            await call
        except (CredentialNotFound, VaultLocked) as error:
            print(f"{type(error).__name__}: {error.message}")

anyio.run(main)
"""


def ask(program: Program, tmp_path: Path, **environment: str) -> list[str]:
    """Ask a vault of another process, in a session without a bus."""
    (tmp_path / "runtime").mkdir()
    taken = ("PYTHON_KEYRING_BACKEND", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY")
    done = subprocess.run(
        [program.python, "-c", ASK],
        env={
            **{name: value for name, value in os.environ.items() if name not in taken},
            "HOME": str(tmp_path),
            "XDG_RUNTIME_DIR": str(tmp_path / "runtime"),
            **environment,
        },
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=True,
    )
    assert "canary" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def install(tmp_path: Path, name: str, content: str) -> str:
    """Write a package that brings a keyring, and return the directory it is installed in."""
    site = tmp_path / "site"
    about = site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (site / f"{name}.py").write_text(content)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[keyring.backends]\n{name} = {name}\n")
    return str(site)


HANGING = """
import pathlib, time
from keyring.backend import KeyringBackend

class Keyring(KeyringBackend):
    priority = 1
    def get_password(self, service, username):
        pathlib.Path("asked").touch()
        time.sleep(1000)
    set_password = delete_password = get_password
"""

WAIT = """
import anyio
from training_backends.credentials.vault import CredentialVault

anyio.run(CredentialVault(environ={}, timeout=1000).get, "mistral")
"""


def test_an_interrupt_does_not_wait_for_a_keyring(tmp_path: Path) -> None:
    """Ctrl-C ends a program whose keyring waits for a password that nobody types."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        env={
            **os.environ,
            "PYTHONPATH": install(tmp_path, "hanging", HANGING),
            "PYTHON_KEYRING_BACKEND": "hanging.Keyring",
        },
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until((tmp_path / "asked").exists)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in said


ASKING = """
import getpass, pathlib
from keyring.backend import KeyringBackend

class Keyring(KeyringBackend):
    priority = 2.5
    def get_password(self, service, username):
        pathlib.Path("asked").touch()
        return getpass.getpass()
    set_password = delete_password = get_password
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a keyring")
def test_without_a_bus_there_is_no_keyring(tmp_path: Path, program: Program) -> None:
    """A key is then missing, not locked; storing one says what to do."""
    first, second = ask(program, tmp_path)
    assert first.startswith("CredentialNotFound: No API key for mistral")
    assert second.startswith("VaultLocked: This machine has no keyring")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a keyring")
def test_a_keyring_that_just_happens_to_be_installed_is_nobodys_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    """The only one there would ask for a password in the middle of a program."""
    monkeypatch.chdir(tmp_path)
    site = install(tmp_path, "surprise", ASKING)
    first, second = ask(program, tmp_path, PYTHONPATH=site)
    assert first.startswith("CredentialNotFound")
    assert second.startswith("VaultLocked: This machine has no keyring")
    assert not (tmp_path / "asked").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the Secret Service is of Linux")
@pytest.mark.parametrize(
    ("named", "word"),
    [
        ("nowhere.Keyring", "ModuleNotFoundError"),
        ("keyring.backends.SecretService.Keyring", "DBUS_SESSION_BUS_ADDRESS"),
    ],
)
def test_a_keyring_that_was_named_and_is_not_there_is_told(
    tmp_path: Path, named: str, word: str, program: Program
) -> None:
    """Another one is not quietly taken instead."""
    for line in ask(program, tmp_path, PYTHON_KEYRING_BACKEND=named):
        assert line.startswith(f"VaultLocked: Cannot load the keyring {named}")
        assert word in line


def test_a_broken_keyring_library_is_told(tmp_path: Path, program: Program) -> None:
    """It cannot be imported: the error says so and is no traceback."""
    site = install(tmp_path, "keyring", "raise ImportError('built for another machine')")
    for line in ask(program, tmp_path, PYTHONPATH=site):
        assert line.startswith("VaultLocked: Cannot load the keyring library")
        assert "built for another machine" in line


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
