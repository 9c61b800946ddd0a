"""An encrypted file as keyring: real cryptography, real processes, no plaintext anywhere."""

import json
import os
import stat
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.forking import Program
from training_backends import ConfigError, CredentialNotFound, VaultLocked
from training_backends.credentials.choice import CredentialSettings
from training_backends.credentials.vault import CredentialVault

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("remembered_keys")]

CANARY = "k-4f1d0c9a7e"
PASSWORD = "correct horse"

MakeVault = Callable[..., CredentialVault]
Writer = subprocess.Popen[str]


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    """Write the password for its owner only."""
    path = tmp_path / "password"
    path.touch(mode=0o600)
    path.write_text(f"{PASSWORD}\nthe rest is for people\n")
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def make(home: Path) -> MakeVault:
    """Make vaults that keep their secrets in the file, as separate processes would."""

    def make(
        password_file: Path | None = None, ask: Callable[[bool], SecretStr | None] | None = None
    ) -> CredentialVault:
        settings = CredentialSettings(keyring="file", password_file=password_file)
        return CredentialVault(home=home, environ={}, settings=settings, ask=ask)

    return make


async def test_a_secret_is_kept_from_one_process_to_the_next(
    make: MakeVault, password_file: Path
) -> None:
    """Stored, read by another vault, listed, deleted."""
    await make(password_file).set("mistral", f"{CANARY}\n")
    await make(password_file).set("mistral", "other", "work")
    vault = make(password_file)
    assert (await vault.get("mistral")).get_secret_value() == CANARY
    assert (await vault.get("mistral", "work")).get_secret_value() == "other"
    assert [(one.profile, one.source) for one in await vault.list()] == [
        ("default", "keyring"),
        ("work", "keyring"),
    ]
    await make(password_file).delete("mistral")
    with pytest.raises(CredentialNotFound):
        await vault.get("mistral")


async def test_nothing_on_the_disk_shows_secret_or_password(
    make: MakeVault, password_file: Path, home: Path
) -> None:
    """The file is for its owner, and holds neither values nor, in the open, names."""
    await make(password_file).set("mistral", CANARY)
    path = home / "credentials.keyring"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert sorted(json.loads(path.read_text())) == ["data", "nonce", "salt", "version"]
    written = b"".join(one.read_bytes() for one in home.rglob("*") if one.is_file())
    for text in (CANARY, PASSWORD, b64encode(CANARY.encode()).decode()):
        assert text.encode() not in written
    assert not list(home.glob("*.tmp"))


async def test_a_wrong_password_opens_nothing(make: MakeVault, password_file: Path) -> None:
    """It is told from a missing one, and neither it nor the right one is shown."""
    await make(password_file).set("mistral", CANARY)
    password_file.write_text("battery staple")
    for call in (make(password_file).get("mistral"), make(password_file).set("mistral", "new")):
        with pytest.raises(VaultLocked, match="Wrong password") as caught:
            await call
        assert not caught.value.retryable
        shown = f"{caught.value!r} {caught.value.hint}"
        assert "battery" not in shown
        assert PASSWORD not in shown
    password_file.write_text(PASSWORD)
    assert (await make(password_file).get("mistral")).get_secret_value() == CANARY


async def test_a_file_that_was_changed_is_refused(
    make: MakeVault, password_file: Path, home: Path
) -> None:
    """One flipped bit is enough, in the content and in what stands in the open."""
    await make(password_file).set("mistral", CANARY)
    path = home / "credentials.keyring"
    whole = json.loads(path.read_text())
    for name in ("data", "nonce", "salt"):
        part = bytearray(b64decode(whole[name]))
        part[-1] ^= 1
        path.write_text(json.dumps(whole | {name: b64encode(part).decode()}))
        with pytest.raises(VaultLocked, match="Wrong password"):
            await make(password_file).get("mistral")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 2}'])
async def test_a_damaged_or_newer_file_is_left_alone(
    make: MakeVault, password_file: Path, home: Path, content: str
) -> None:
    """It is never taken for an empty one and written over."""
    home.mkdir()
    path = home / "credentials.keyring"
    path.write_text(content)
    with pytest.raises(VaultLocked) as caught:
        await make(password_file).set("mistral", CANARY)
    assert caught.value.hint
    assert path.read_text() == content


async def test_without_a_password_the_file_stays_shut(make: MakeVault, password_file: Path) -> None:
    """The error names the ways to give it; where nothing was stored there is nothing to open."""
    with pytest.raises(CredentialNotFound):
        await make().get("mistral")
    with pytest.raises(VaultLocked):
        await make().set("mistral", CANARY)
    await make(password_file).set("mistral", CANARY)
    with pytest.raises(VaultLocked, match="locked") as caught:
        await make().get("mistral")
    assert "PASSWORD_FILE" in (caught.value.hint or "")
    assert "MISTRAL_API_KEY" in (caught.value.hint or "")


async def test_a_vault_is_unlocked_and_locked(make: MakeVault) -> None:
    """Open until it is locked; then only `unlock` opens it again."""
    vault = make()
    assert not await vault.is_unlocked()
    await vault.unlock(PASSWORD)
    assert await vault.is_unlocked()
    await vault.set("mistral", CANARY)
    await vault.lock()
    assert not await vault.is_unlocked()
    with pytest.raises(VaultLocked):
        await vault.get("mistral")
    with pytest.raises(VaultLocked, match="Wrong password"):
        await vault.unlock("wrong")
    await vault.unlock(SecretStr(PASSWORD))
    assert (await vault.get("mistral")).get_secret_value() == CANARY


async def test_what_its_password_file_opens_is_not_locked(
    make: MakeVault, password_file: Path
) -> None:
    """Nobody has to be asked; a password file that does not open it is told, not passed over."""
    assert await make(password_file).is_unlocked()
    await make(password_file).set("mistral", CANARY)
    found = await make(password_file).keyring()
    assert found.unlocked
    assert "credentials.keyring" in (found.name or "")
    password_file.write_text("wrong")
    with pytest.raises(VaultLocked, match="Wrong password"):
        await make(password_file).is_unlocked()
    assert not (await make().keyring()).unlocked


async def test_a_lock_outlasts_the_password_file(make: MakeVault, password_file: Path) -> None:
    """Locked on purpose, it is not opened again behind one's back."""
    vault = make(password_file)
    await vault.set("mistral", CANARY)
    await vault.lock()
    with pytest.raises(VaultLocked):
        await vault.unlock("wrong")
    with pytest.raises(VaultLocked):
        await vault.get("mistral")
    await vault.unlock()
    assert (await vault.get("mistral")).get_secret_value() == CANARY


async def test_a_person_is_asked_once_and_only_if_needed(
    make: MakeVault, password_file: Path
) -> None:
    """For a new password when the first secret is stored, for the known one later."""
    asked: list[bool] = []

    def ask(new: bool) -> SecretStr:
        asked.append(new)
        return SecretStr(PASSWORD)

    vault = make(ask=ask)
    with pytest.raises(CredentialNotFound):
        await vault.get("mistral")
    assert asked == []
    await vault.set("mistral", CANARY)
    assert asked == [True]
    later = make(ask=ask)
    await later.list()
    assert asked == [True]
    await later.get("mistral")
    await later.get("mistral")
    assert asked == [True, False]
    assert (await make(password_file, ask=ask).get("mistral")).get_secret_value() == CANARY
    assert asked == [True, False]


async def test_a_person_who_does_not_answer_leaves_it_locked(
    make: MakeVault, password_file: Path
) -> None:
    """Nobody there is not an empty password."""
    await make(password_file).set("mistral", CANARY)
    with pytest.raises(VaultLocked, match="locked"):
        await make(ask=lambda _: None).get("mistral")
    with pytest.raises(VaultLocked, match="empty"):
        await make(ask=lambda _: SecretStr(" ")).get("mistral")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
async def test_a_password_file_open_to_others_is_refused(
    make: MakeVault, password_file: Path, mode: int
) -> None:
    """The error says what to do about it."""
    password_file.chmod(mode)
    with pytest.raises(VaultLocked, match="others") as caught:
        await make(password_file).set("mistral", CANARY)
    assert "chmod 600" in (caught.value.hint or "")


async def test_a_password_file_without_a_password_is_refused(
    make: MakeVault, password_file: Path, tmp_path: Path
) -> None:
    """Missing, empty, binary, a directory, a pipe: each ends at once."""
    with pytest.raises(VaultLocked, match="cannot be read"):
        await make(tmp_path / "none").set("mistral", CANARY)
    for content in (b"", b"\nsecond line", b"\xff\xfe", b"x" * 5000):
        password_file.write_bytes(content)
        with pytest.raises(VaultLocked, match=r"no password|not contain text"):
            await make(password_file).set("mistral", CANARY)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (pipe, tmp_path):
        with pytest.raises(VaultLocked, match="regular file"):
            await make(path).set("mistral", CANARY)


async def test_a_home_that_cannot_be_made_is_told(
    make: MakeVault, password_file: Path, home: Path
) -> None:
    """The error names the file and the setting."""
    home.write_text("in the way")
    with pytest.raises(VaultLocked, match="keyring file") as caught:
        await make(password_file).set("mistral", CANARY)
    assert caught.value.hint


async def test_the_systems_keyring_takes_no_password(home: Path) -> None:
    """A password meant for the file is not silently dropped."""
    with pytest.raises(ConfigError):
        await CredentialVault(home=home, environ={}).unlock(PASSWORD)


async def test_a_new_password_shuts_out_those_who_know_the_old_one(
    make: MakeVault, password_file: Path, home: Path
) -> None:
    """A vault that was open notices that the file is another one."""
    vault = make()
    await vault.unlock(PASSWORD)
    await vault.set("mistral", CANARY)
    (home / "credentials.keyring").unlink()
    password_file.write_text("another")
    await make(password_file).set("mistral", "new")
    assert not await vault.is_unlocked()
    with pytest.raises(VaultLocked, match="locked"):
        await vault.get("mistral")


WRITER = """
import anyio, sys
from pathlib import Path
from training_backends.credentials.choice import CredentialSettings
from training_backends.credentials.vault import CredentialVault

async def main():
    settings = CredentialSettings(keyring="file", password_file=Path(sys.argv[2]))
    vault = CredentialVault(home=Path(sys.argv[1]), environ={}, settings=settings, timeout=60)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(sys.argv[4])):
        await vault.set(sys.argv[3], f"{sys.argv[3]}-{number}", f"n{number}")
        print(number, flush=True)

anyio.run(main)
"""


def start_writer(
    program: Program, home: Path, password_file: Path, name: str, secrets: int
) -> Writer:
    """Start a process that is ready to store secrets, one after the other."""
    writer = subprocess.Popen(
        [program.python, "-c", WRITER, home, password_file, name, str(secrets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout
    assert writer.stdout.readline() == "ready\n"
    return writer


async def test_processes_that_write_at_once_lose_nothing(
    make: MakeVault, password_file: Path, home: Path, program: Program
) -> None:
    """The first of them make the file at the same moment."""
    writers = [start_writer(program, home, password_file, f"writer{one}", 3) for one in range(3)]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    vault = make(password_file)
    for one in range(3):
        for secret in range(3):
            found = await vault.get(f"writer{one}", f"n{secret}")
            assert found.get_secret_value() == f"writer{one}-{secret}"
    assert len(await vault.list()) == 9


async def test_a_writer_that_is_killed_leaves_the_file_whole(
    make: MakeVault, password_file: Path, home: Path, program: Program
) -> None:
    """What was stored until then is there, and the next writer finds the way free."""
    for one in range(2):
        writer = start_writer(program, home, password_file, f"writer{one}", 1000)
        assert writer.stdin
        assert writer.stdout
        writer.stdin.write("go\n")
        writer.stdin.flush()
        for stored in range(one + 1):
            assert writer.stdout.readline() == f"{stored}\n"
        writer.kill()
        writer.communicate()
        found = await make(password_file).get(f"writer{one}", f"n{one}")
        assert found.get_secret_value() == f"writer{one}-{one}"
    await make(password_file).set("mistral", CANARY)
    assert (await make(password_file).get("writer0", "n0")).get_secret_value() == "writer0-0"


READER = """
import anyio, os, sys
from training_backends import VaultLocked
from training_backends.credentials.vault import CredentialVault

async def main():
    for _ in range(2):
        vault = CredentialVault()
        try:
            print((await vault.get("mistral")).get_secret_value())
        except VaultLocked as error:
            print(error.message)
    try:
        os.fstat(int(os.environ["TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FD"]))
    except OSError:
        print("closed")

anyio.run(main)
"""


def read_with(home: Path, descriptor: int, *passed: int) -> list[str]:
    """Read the secret twice in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", READER],
        env={
            **os.environ,
            "TRAINING_BACKENDS_HOME": str(home),
            "TRAINING_BACKENDS_CREDENTIALS__KEYRING": "file",
            "TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FD": str(descriptor),
        },
        pass_fds=passed,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("ending", ["", "\r\n"])
async def test_a_descriptor_gives_the_password_once(
    make: MakeVault, password_file: Path, home: Path, ending: str
) -> None:
    """It is read and closed, and serves every vault of the process."""
    await make(password_file).set("mistral", CANARY)
    reading, writing = os.pipe()
    os.write(writing, f"{PASSWORD}{ending}".encode())
    os.close(writing)
    assert read_with(home, reading, reading) == [CANARY, CANARY, "closed"]
    os.close(reading)


async def test_a_descriptor_that_was_not_passed_on_is_not_touched(
    make: MakeVault, password_file: Path, home: Path
) -> None:
    """Its number may be that of anything which the process has opened by itself."""
    await make(password_file).set("mistral", CANARY)
    lines = read_with(home, 3)
    assert len(lines) >= 2
    assert all("was not passed to this process" in line for line in lines[:2])


@pytest.mark.parametrize("number", [0, 1, 2, -1])
def test_the_standard_streams_give_no_password(number: int) -> None:
    """The key itself comes on standard input."""
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        CredentialSettings(password_fd=number)
