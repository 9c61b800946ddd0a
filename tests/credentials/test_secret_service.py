"""The vault against the desktop's own keyring, started without a desktop."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = [
    name for name in ("dbus-run-session", "gnome-keyring-daemon") if shutil.which(name) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (packages gnome-keyring, dbus)"
    ),
]

PASSWORD = "correct horse"
UNLOCKED = f"printf '{PASSWORD}' | gnome-keyring-daemon --unlock --components=secrets"
NEVER_UNLOCKED = "gnome-keyring-daemon --start --components=secrets"

COMMON = f"""
import anyio, threading, time
from contextlib import closing
from training_backends import CredentialNotFound, VaultLocked
from training_backends.credentials.vault import CredentialVault

async def refused(call):
    started = time.monotonic()
    try:
        await call
    except VaultLocked as error:
        assert time.monotonic() - started < 20, "it held the program up"
        return error
    raise AssertionError("not refused")

def waiting():
    return [one for one in threading.enumerate() if one.name == "keyring"]

async def none_waits():
    with anyio.fail_after(20):
        while waiting():
            await anyio.sleep(0.01)

def unlock_from_elsewhere():
    "As the login of the user does it; only the tests know this door."
    import secretstorage
    from secretstorage.util import DBusAddressWrapper, format_secret, open_session
    with closing(secretstorage.dbus_init()) as connection:
        session = open_session(connection)
        DBusAddressWrapper("/org/freedesktop/secrets",
            "org.gnome.keyring.InternalUnsupportedGuiltRiddenInterface", connection).call(
            "UnlockWithMasterPassword", "o(oayays)",
            "/org/freedesktop/secrets/collection/login",
            format_secret(session, b"{PASSWORD}", "text/plain"))
"""

ROUND_TRIP = """
async def main():
    vault = CredentialVault(environ={})
    await vault.set("mistral", "canary-1\\n")
    await vault.set("mistral", "canary-2", "work")
    other = CredentialVault(environ={})
    assert (await other.get("mistral")).get_secret_value() == "canary-1"
    assert (await other.get("mistral", "work")).get_secret_value() == "canary-2"
    assert [(one.profile, one.source) for one in await other.list()] == [
        ("default", "keyring"), ("work", "keyring")]
    await other.delete("mistral")
    try:
        await vault.get("mistral")
    except CredentialNotFound:
        print(tuple(await vault.keyring()))

anyio.run(main)
"""

LOCKED = """
async def main():
    vault = CredentialVault(environ={}, timeout=5)
    await vault.set("mistral", "canary-1")
    assert await vault.is_unlocked()
    await vault.unlock()
    await vault.lock()
    assert not await CredentialVault(environ={}).is_unlocked()
    for call in (vault.get("mistral"), vault.set("mistral", "new"), vault.delete("mistral"),
                 vault.unlock(), vault.get("mistral")):
        error = await refused(call)
        assert "locked" in error.message, error.message
        assert error.retryable
    assert "MISTRAL_API_KEY" in error.hint
    assert len(await vault.list()) == 1
    assert not await vault.is_unlocked()
    await none_waits()
    unlock_from_elsewhere()
    assert await vault.is_unlocked()
    print((await vault.get("mistral")).get_secret_value())

anyio.run(main)
"""

UNANSWERED = """
async def main():
    vault = CredentialVault(environ={}, timeout=1)
    await vault.set("mistral", "canary-1")
    await vault.lock()
    assert not await vault.is_unlocked()
    for _ in range(3):
        error = await refused(vault.get("mistral"))
        assert "was not answered" in error.message, error.message
        assert len(waiting()) <= 1
    await refused(vault.unlock())
    await none_waits()
    unlock_from_elsewhere()
    print((await vault.get("mistral")).get_secret_value())

anyio.run(main)
"""

NOTHING_THERE = """
async def main():
    vault = CredentialVault(environ={}, timeout=5)
    try:
        await vault.get("mistral")
    except CredentialNotFound:
        print("nothing stored")
    error = await refused(vault.set("mistral", "canary-1"))
    assert "environment variable" in error.hint
    assert await vault.list() == ()
    print("nothing kept")

anyio.run(main)
"""


def run(
    tmp_path: Path, program: str, *, daemon: str = UNLOCKED
) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own with a keyring of its own."""
    script = tmp_path / "program.py"
    script.write_text(COMMON + program)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_RUNTIME_DIR": str(runtime),
    }
    # The vault has to find the keyring by itself; a display would really show its dialogue.
    for name in ("PYTHON_KEYRING_BACKEND", "DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(name, None)
    session = f'{daemon} >/dev/null 2>&1; exec "{sys.executable}" "{script}"'
    return subprocess.run(
        ["dbus-run-session", "--", "sh", "-c", session],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_a_secret_survives_in_the_real_keyring(tmp_path: Path) -> None:
    """Stored, read by another vault, listed and deleted."""
    done = run(tmp_path, ROUND_TRIP)
    assert done.stdout == "('Secret Service', True)\n", done.stderr
    assert "canary" not in done.stderr


def test_a_locked_keyring_is_said_to_be_locked(tmp_path: Path) -> None:
    """No dialogue can be shown here: each call is refused at once, until it is unlocked."""
    done = run(tmp_path, LOCKED)
    assert done.stdout == "canary-1\n", done.stderr


def test_a_dialogue_that_nobody_answers_holds_nothing_up(tmp_path: Path) -> None:
    """Each call ends in time, leaves no thread, and the same vault works once it is unlocked."""
    services = tmp_path / "data" / "dbus-1" / "services"
    services.mkdir(parents=True)
    (services / "org.gnome.keyring.SystemPrompter.service").write_text(
        "[D-BUS Service]\nName=org.gnome.keyring.SystemPrompter\n"
        "Exec=/bin/sh -c 'exec sleep 20 >/dev/null 2>&1'\n"
    )
    done = run(tmp_path, UNANSWERED)
    assert done.stdout == "canary-1\n", done.stderr


def test_a_keyring_that_was_never_opened_is_empty(tmp_path: Path) -> None:
    """Reading asks for no password; storing, which has to, is refused in time."""
    done = run(tmp_path, NOTHING_THERE, daemon=NEVER_UNLOCKED)
    assert done.stdout == "nothing stored\nnothing kept\n", done.stderr
