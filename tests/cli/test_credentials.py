"""`credentials`: keys go in unseen, the list tells the order, and a key can be tried."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.cli.conftest import read_until
from tests.waiting import wait_until
from training_backends.core.files import hold_lock
from training_backends.testing.provider import ScriptedProvider

CANARY = "k-4f1d0c9a7e2b"
PASSWORD = "correct horse"


class Done(Protocol):
    """What a command left behind."""

    code: int
    out: str
    err: str
    document: object


class Run(Protocol):
    """Runs a command."""

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Done: ...


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def file_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered_keys: None) -> Path:
    """Choose the encrypted file as keyring; returns the file with its password."""
    path = tmp_path / "password"
    path.touch(mode=0o600)
    path.write_text(PASSWORD)
    monkeypatch.setenv("TRAINING_BACKENDS_CREDENTIALS__KEYRING", "file")
    monkeypatch.setenv("TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE", str(path))
    return path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedProvider]:
    """Serve the protocol to whoever has the key."""
    with ScriptedProvider() as provider:
        provider.key = CANARY
        monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", provider.base_url)
        monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__ATTEMPTS", "1")
        yield provider


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training_backends", *arguments],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=directory,
            env={**os.environ, "HOME": str(directory)},
            start_new_session=True,
        )
        os.close(theirs)
        self.said = ""

    def until(self, text: str) -> None:
        """Read until the terminal shows a text that it did not show before."""
        self.said += read_until(self.end, text)

    @property
    def echoes(self) -> bool:
        """Whether what is typed is shown."""
        return bool(termios.tcgetattr(self.end)[3] & termios.ECHO)

    def until_hidden(self, text: str) -> None:
        """Read until a text is shown and nothing that is typed would be."""
        self.until(text)
        wait_until(lambda: not self.echoes)

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self.end, f"{text}\n".encode())

    def wait(self) -> int:
        """Wait for the end; everything said is read."""
        while True:
            try:
                piece = os.read(self.end, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            self.said += piece.decode(errors="replace")
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.end)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[list[Terminal]]:
    """Close all terminals that a test opens."""
    opened: list[Terminal] = []
    yield opened
    for one in opened:
        one.close()


def test_a_key_goes_in_on_standard_input_and_never_comes_out(
    run: Run, file_keyring: Path, home: Path
) -> None:
    """Stored, listed, deleted; no output and no file in the open has it."""
    stored = run("credentials", "set", "mistral", stdin=f"{CANARY}\n")
    listed = run("credentials", "list")
    deleted = run("credentials", "delete", "mistral")
    assert (stored.code, listed.code, deleted.code) == (0, 0, 0)
    assert "mistral" in listed.out
    assert CANARY not in "".join(one.out + one.err for one in (stored, listed, deleted))
    assert not [path for path in home.rglob("*") if path.is_file() and CANARY in path.read_text()]
    assert run("credentials", "delete", "mistral").code == 4


def test_the_list_tells_what_hides_what(run: Run, file_keyring: Path) -> None:
    """The order is written out, and with --json each entry names what comes before it."""
    run("credentials", "set", "mistral", stdin="stored")
    run("credentials", "set", "mistral", "--profile", "work", stdin="other")
    listed = run("credentials", "list", MISTRAL_API_KEY=CANARY)
    assert "the environment, the encrypted file" in listed.err
    rows = [line.split() for line in listed.out.splitlines()]
    assert ["mistral", "environment", "MISTRAL_API_KEY"] in rows
    (hidden,) = [line for line in listed.out.splitlines() if "not used" in line]
    assert hidden.split()[:2] == ["mistral", "keyring"]
    assert "environment takes precedence" in hidden
    document = run("credentials", "list", "--json", MISTRAL_API_KEY=CANARY).document
    assert isinstance(document, list)
    assert [(one["profile"], one["source"], one["hidden_by"]) for one in document] == [
        ("default", "environment", None),
        ("default", "keyring", "environment"),
        ("work", "keyring", None),
    ]
    assert CANARY not in listed.out + json.dumps(document)


def test_a_key_that_is_stored_behind_a_variable_is_said_to_be(run: Run, file_keyring: Path) -> None:
    """Otherwise the old one goes on being used and nobody knows why."""
    done = run("credentials", "set", "mistral", stdin="new", MISTRAL_API_KEY="old")
    assert done.code == 0
    assert "MISTRAL_API_KEY is set and takes precedence" in done.err


@pytest.mark.parametrize("arguments", [["mistral", CANARY], [f"sk-{CANARY * 3}"]])
def test_a_key_as_an_argument_is_refused_unrepeated(
    run: Run, file_keyring: Path, home: Path, arguments: list[str]
) -> None:
    """Neither the error nor a file shows what others could already see."""
    done = run("credentials", "set", *arguments, "--json", stdin="other")
    assert done.code in {2, 3}
    assert CANARY not in done.out + done.err
    assert "standard input" in done.err
    assert not (home / "credentials.keyring").exists()


def seen_by_others(process_id: int) -> str:
    """Return what the list of processes shows of a process and its children."""
    place = Path("/proc") / str(process_id)
    shown = (place / "cmdline").read_text() + (place / "environ").read_text()
    children = (place / "task" / str(process_id) / "children").read_text().split()
    return shown + "".join(seen_by_others(int(child)) for child in children)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
def test_the_list_of_processes_never_shows_a_key_that_is_piped_in(
    tmp_path: Path, home: Path, file_keyring: Path
) -> None:
    """It is looked at while the process has the key: it waits to write it into the index."""
    home.mkdir()
    with hold_lock(home / "credentials-file.lock"):
        process = subprocess.Popen(
            [sys.executable, "-m", "training_backends", "credentials", "set", "mistral"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        assert process.stdin
        process.stdin.write(CANARY.encode())
        process.stdin.close()
        wait_until((home / "credentials.keyring").exists)
        shown = seen_by_others(process.pid)
    assert process.wait(60) == 0
    assert "training_backends" in shown
    assert CANARY not in shown
    assert PASSWORD not in shown


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
def test_on_a_terminal_key_and_password_are_asked_for_without_an_echo(
    tmp_path: Path,
    home: Path,
    file_keyring: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminals: list[Terminal],
) -> None:
    """The new password twice, later once; neither terminal nor list of processes shows them."""
    monkeypatch.delenv("TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE")
    storing = Terminal(tmp_path, "credentials", "set", "mistral")
    terminals.append(storing)
    storing.until_hidden("Key for mistral")
    storing.type(CANARY)
    storing.until_hidden("New password for the encrypted keyring")
    storing.type(PASSWORD)
    storing.until_hidden("Repeat")
    shown = seen_by_others(storing.process.pid)
    storing.type(PASSWORD)
    assert storing.wait() == 0
    deleting = Terminal(tmp_path, "credentials", "delete", "mistral")
    terminals.append(deleting)
    deleting.until_hidden("Password of the encrypted keyring")
    deleting.type(PASSWORD)
    assert deleting.wait() == 0
    for text in (shown, storing.said, deleting.said):
        assert CANARY not in text
        assert PASSWORD not in text


def test_ctrl_c_at_the_password_ends_the_command(
    tmp_path: Path,
    run: Run,
    file_keyring: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminals: list[Terminal],
) -> None:
    """At once, with its own exit code, and the terminal echoes again."""
    run("credentials", "set", "mistral", stdin=CANARY)
    monkeypatch.delenv("TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE")
    asked = Terminal(tmp_path, "credentials", "test", "mistral")
    terminals.append(asked)
    asked.until_hidden("Password of the encrypted keyring")
    asked.process.send_signal(signal.SIGINT)
    assert asked.wait() == 130
    assert asked.echoes


def test_without_a_terminal_nobody_is_asked(run: Run, file_keyring: Path) -> None:
    """The command ends and says how to give the password."""
    run("credentials", "set", "mistral", stdin=CANARY)
    done = run("credentials", "delete", "mistral", TRAINING_BACKENDS_CREDENTIALS__PASSWORD_FILE="")
    assert done.code == 4
    assert "PASSWORD_FD" in done.err


def test_a_key_that_is_accepted_ends_with_0(
    run: Run, provider: ScriptedProvider, file_keyring: Path
) -> None:
    """It says which key was tried, and changes nothing at the provider."""
    tried = run("credentials", "test", "mistral", MISTRAL_API_KEY=CANARY)
    assert tried.code == 0
    assert "MISTRAL_API_KEY is accepted" in tried.out
    run("credentials", "set", "mistral", "--profile", "work", stdin=CANARY)
    stored = run("credentials", "test", "mistral", "--profile", "work", "--json")
    assert stored.document == {
        "provider": "mistral",
        "profile": "work",
        "accepted": True,
        "source": "keyring",
        "server": provider.base_url,
    }
    assert provider.base_url in tried.err  # where the key was sent
    assert {request.method for request in provider.requests} == {"GET"}
    assert CANARY not in tried.out + tried.err + stored.out + stored.err


def test_the_key_of_another_profile_is_not_tried(
    run: Run, provider: ScriptedProvider, file_keyring: Path
) -> None:
    """Also where the settings name another one for the backend."""
    profile = {"TRAINING_BACKENDS_MISTRAL__PROFILE": "work"}
    keys = {"MISTRAL_API_KEY": CANARY, "MISTRAL_WORK_API_KEY": "wrong"}
    assert run("credentials", "test", "mistral", **keys, **profile).code == 0
    assert run("credentials", "test", "mistral", "-p", "work", **keys).code == 4


def test_a_key_that_is_refused_or_missing_ends_with_4(run: Run, provider: ScriptedProvider) -> None:
    """The provider's word is passed on."""
    refused = run("credentials", "test", "mistral", MISTRAL_API_KEY="wrong-but-long")
    assert refused.code == 4
    assert "401" in refused.err
    assert "wrong-but-long" not in refused.err
    missing = run("credentials", "test", "mistral")
    assert missing.code == 4
    assert "credentials set mistral" in missing.err


def test_a_provider_that_is_not_reached_ends_with_8(run: Run, provider: ScriptedProvider) -> None:
    """Neither accepted nor refused."""
    nobody = {"TRAINING_BACKENDS_MISTRAL__BASE_URL": "http://127.0.0.1:9"}
    assert run("credentials", "test", "mistral", MISTRAL_API_KEY=CANARY, **nobody).code == 8


@pytest.mark.parametrize("name", ["wandb", "local"])
def test_a_key_that_no_backend_uses_ends_with_9(run: Run, name: str) -> None:
    """Said, and not taken for accepted."""
    done = run("credentials", "test", name, WANDB_API_KEY=CANARY, LOCAL_API_KEY=CANARY)
    assert done.code == 9
    assert "cannot be tested" in done.err
