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
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (packages gnome-keyring, dbus)"
)

ROUND_TRIP = """
import anyio, sys
from training_backends import CredentialNotFound
from training_backends.credentials.vault import CredentialVault

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
        print("SecretService" in (vault._ring.describe() or ""))

anyio.run(main)
"""

LOCKED = """
import anyio, subprocess, time
from training_backends import CredentialNotFound, VaultLocked
from training_backends.credentials.vault import CredentialVault

async def main():
    vault = CredentialVault(environ={}, timeout=3)
    await vault.set("mistral", "canary-1")
    subprocess.run(["gdbus", "call", "--session", "--dest", "org.freedesktop.secrets",
        "--object-path", "/org/freedesktop/secrets", "--method",
        "org.freedesktop.Secret.Service.Lock",
        "['/org/freedesktop/secrets/collection/login']"], check=True, capture_output=True)
    started = time.monotonic()
    for _ in range(3):
        try:
            await vault.get("mistral")
        except VaultLocked as error:
            print(type(error).__name__, time.monotonic() - started < 30)

anyio.run(main)
"""


def run(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own with a fresh, unlocked keyring."""
    script = tmp_path / "program.py"
    script.write_text(program)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    session = (
        "printf password | gnome-keyring-daemon --unlock --components=secrets >/dev/null 2>&1; "
        f'exec "{sys.executable}" "{script}"'
    )
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_RUNTIME_DIR": str(runtime),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.SecretService.Keyring",
    }
    return subprocess.run(
        ["dbus-run-session", "--", "sh", "-c", session],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_a_secret_survives_in_the_real_keyring(tmp_path: Path) -> None:
    """Stored, read by another vault, listed and deleted."""
    done = run(tmp_path, ROUND_TRIP)
    assert done.stdout.strip() == "True", done.stderr
    assert "canary" not in done.stderr


@pytest.mark.skipif(shutil.which("gdbus") is None, reason="gdbus is not installed (libglib2.0-bin)")
def test_a_locked_collection_does_not_hang(tmp_path: Path) -> None:
    """Nobody answers the unlock dialogue here; each call ends in time."""
    done = run(tmp_path, LOCKED)
    assert done.stdout.splitlines() == ["VaultLocked True"] * 3, done.stderr
