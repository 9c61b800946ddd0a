"""A machine with secrets in every place for one, and the search for them everywhere else."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

API_KEY = "Zq8RkV3mXc7LpT2nWy6HbJ4sDf9GaE5u"
WANDB_KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
HUB_TOKEN = "hf_KjHgFdSaQwErTyUiOpLmNbVcXz1234567a"
GATEWAY_KEY = "wide-open-canary-door"
PROXY_PASSWORD = "proxy/canary pass"
STORE_PASSWORD = "st0re:canary@database"
FILE_PASSWORD = "file keyring canary phrase"
TLS_PASSWORD = "tls-canary-password"
STRANGE_KEY = "some-other-canary-key-77"
"""One that somebody types or sends where it does not belong, so that nothing here knows it."""

SECRETS: Mapping[str, str] = {
    "API key": API_KEY,
    "W&B key": WANDB_KEY,
    "hub token": HUB_TOKEN,
    "gateway key": GATEWAY_KEY,
    "proxy password": PROXY_PASSWORD,
    "store password": STORE_PASSWORD,
    "file keyring password": FILE_PASSWORD,
    "TLS password": TLS_PASSWORD,
    "key of somebody else": STRANGE_KEY,
}
MANY = str(Path(__file__).with_name("many_commands.py"))
PATIENCE = 60.0

_PROGRAMS = (b"-m\0training_backends\0", b"many_commands.py")
"""In the arguments of the processes that need secrets."""


def forms_of(secret: str) -> frozenset[bytes]:
    """Return every way in which a secret, or half of it, may be written, in lower case."""
    in_base64 = [
        base64.b64encode(b"\0" * before + secret.encode())[skip:-4]
        for before, skip in enumerate((0, 2, 3))
    ]
    half = len(secret) // 2 + 1
    parts = (secret[:half], secret[-half:])
    ways = (str, quote, quote_plus, partial(quote, safe=""))
    texts = {way(part) for part in parts for way in ways} | {secret.encode().hex()}
    return frozenset(form.lower() for form in (*map(str.encode, texts), *in_base64))


@dataclass(frozen=True)
class Command:
    """One command of a list, and with which codes it may end."""

    arguments: Sequence[str]
    codes: Sequence[int] = (0,)
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""

    @property
    def name(self) -> str:
        """What is typed, in short."""
        return " ".join(self.arguments)[:60]


def command(
    *arguments: str,
    code: int | Sequence[int] = 0,
    given: Mapping[str, str] | None = None,
    stdin: str = "",
) -> Command:
    """Write a command down."""
    codes = (code,) if isinstance(code, int) else code
    return Command(arguments, codes, given or {}, stdin)


def settings(**values: str) -> dict[str, str]:
    """Return the environment variables of settings."""
    return {f"TRAINING_BACKENDS_{name}": value for name, value in values.items()}


class World:
    """A user's machine with secrets on it, and all that the program leaves there.

    Attributes:
        seen: What may be looked at by anybody: state, results, logs, output.
        planted: Where commands run; the user's own files with secrets in them.
    """

    def __init__(self, base: Path, python: Path) -> None:
        """Run commands with an interpreter."""
        self._python = str(python)
        self.seen = base / "seen"
        self.planted = base / "planted"
        self.secrets = {name: forms_of(secret) for name, secret in SECRETS.items()}
        self.found: list[str] = []
        self._runs = 0
        for directory in (self.seen / "config", self.planted):
            directory.mkdir(parents=True)
        chat = {"messages": [{"role": "user", "content": "2 + 2?"}]}
        chat["messages"].append({"role": "assistant", "content": "4"})
        (self.planted / "train.jsonl").write_text(f"{json.dumps(chat)}\n" * 20)
        (self.planted / "password").write_text(FILE_PASSWORD)
        (self.planted / "password").chmod(0o600)

    @property
    def environment(self) -> dict[str, str]:
        """What every command is given, with a secret in every place for one."""
        proxy = f"http://user:{quote(PROXY_PASSWORD, safe='')}@127.0.0.1:9"
        return {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(self.planted),
            "XDG_CONFIG_HOME": str(self.seen / "config"),
            "PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring",
            "PYTHONWARNINGS": "always",
            "MISTRAL_API_KEY": API_KEY,
            "WANDB_API_KEY": WANDB_KEY,
            "HF_TOKEN": HUB_TOKEN,
            "HTTPS_PROXY": proxy,
            "ALL_PROXY": proxy,
            **settings(
                HOME=str(self.seen / "home"),
                GATEWAY__API_KEY=GATEWAY_KEY,
                GATEWAY__TLS_KEY_PASSWORD=TLS_PASSWORD,
                LOG_LEVEL="debug",
                MISTRAL__BASE_URL="http://127.0.0.1:9",
                # Nobody is there to be patient with.
                MISTRAL__ATTEMPTS="2",
                MISTRAL__CALL_TIMEOUT="3",
                MISTRAL__SETTLE_TIMEOUT="0.1",
                MISTRAL__POLL_MIN="0.05",
            ),
        }

    def config(self, name: str = "run.yaml", **fields: Any) -> str:
        """Write a configuration; JSON is YAML."""
        document = {
            "backend": "mistral",
            "model": "tiny-mistral",
            "data": {"train": "train.jsonl"},
            "hyperparameters": {"training_steps": 4},
            **fields,
        }
        (self.planted / name).write_text(json.dumps(document, indent=2))
        return name

    def run_all(self, commands: Sequence[Command], given: Mapping[str, str] | None = None) -> None:
        """Run commands one after the other, for people and for programs in turn."""
        self._runs += 1
        directory = self.seen / f"output-{self._runs}"
        directory.mkdir()
        typed = [
            {
                "arguments": list(each.arguments),
                "stdin": each.stdin,
                "environment": {
                    "TRAINING_BACKENDS_LOG_FORMAT": "json" if number % 2 else "console",
                    **each.environment,
                },
            }
            for number, each in enumerate(commands)
        ]
        done = subprocess.run(
            [self._python, MANY, str(directory)],
            input=json.dumps(typed),
            capture_output=True,
            text=True,
            cwd=self.planted,
            env={**self.environment, **(given or {})},
            timeout=100,
            check=False,
        )
        self.look_at(f"output of {commands[0].name} …", (done.stdout + done.stderr).encode())
        assert done.returncode == 0, done.stderr
        for number, (each, code) in enumerate(zip(commands, json.loads(done.stdout), strict=True)):
            err = (directory / f"{number}.err").read_text()
            assert code in each.codes, f"{each.name}: {code}\n{err}"
            self.look_at(f"output of {each.name}", directory / f"{number}.out")
            self.look_at(f"errors of {each.name}", directory / f"{number}.err")

    @contextmanager
    def started(
        self,
        *arguments: str,
        given: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> "Iterator[Started]":
        """Start a command as a process of its own, watched by its arguments."""
        python = sys.executable if pass_fds else self._python
        self._runs += 1
        directory = self.seen / f"output-{self._runs}"
        directory.mkdir()
        out, err = directory / "out", directory / "err"
        with (
            out.open("wb") as out_file,
            err.open("wb") as err_file,
            subprocess.Popen(
                [python, "-m", "training_backends", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                cwd=self.planted,
                env={**self.environment, **(given or {})},
                pass_fds=pass_fds,
            ) as process,
        ):
            try:
                yield Started(process, out, err)
            finally:
                process.kill()
        name = " ".join(arguments)[:60]
        self.look_at(f"output of {name}", out)
        self.look_at(f"errors of {name}", err)

    def look_at(self, where: str, what: bytes | Path) -> None:
        """Search for every secret."""
        content = (what.read_bytes() if isinstance(what, Path) else what).lower()
        for name, forms in self.secrets.items():
            if any(form in content for form in forms):
                lines = [line for line in content.splitlines() if any(f in line for f in forms)]
                self.found.append(f"{name} in {where}: {lines[0][:300]!r}")

    def look_everywhere(self) -> None:
        """Search everything that lies about now."""
        for path in self.seen.rglob("*"):
            place = str(path.relative_to(self.seen))
            self.look_at("a file's name", place.encode())
            with suppress(FileNotFoundError, IsADirectoryError):  # gone meanwhile
                self.look_at(place, path)

    def assert_clean(self) -> None:
        """Search everything that was left behind, and fail if anything was found at all."""
        self.look_everywhere()
        assert not self.found, "\n".join(dict.fromkeys(self.found))


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


@contextmanager
def watched_processes(world: World) -> Iterator[dict[int, bytes]]:
    """Read the arguments of all processes, and the environment of those that need no secret."""
    over = threading.Event()
    children: dict[int, bytes] = {}

    def look() -> None:
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                # In this order: a process that becomes another program changes both at once.
                arguments = (process / "cmdline").read_bytes()
                environment = (process / "environ").read_bytes()
            except OSError:
                continue  # ended meanwhile, or somebody else's
            if str(world.planted).encode() not in environment:
                continue
            world.look_at("arguments of a process", arguments)
            if not any(program in arguments for program in _PROGRAMS):
                children[int(process.name)] = environment
                world.look_at(f"environment of {arguments[:80]!r}", environment)

    def watch() -> None:
        while not over.wait(0.05):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield children
    finally:
        over.set()
        thread.join()
