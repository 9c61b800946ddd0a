"""Start training processes that outlive their parent."""

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread
from anyio.abc import ByteReceiveStream
from pydantic import SecretStr

from training_backends.backends.local.interpreter import THIS_INTERPRETER, Interpreter
from training_backends.backends.local.settings import LocalSettings
from training_backends.backends.local.spec import base_of
from training_backends.core.backend import CredentialSource
from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    CredentialNotFound,
    VaultLocked,
)
from training_backends.core.integrations import Integration
from training_backends.core.logging import get_logger
from training_backends.core.run import Failure, Prompt, Reply
from training_backends.core.tracing import trace_environment
from training_backends.http.environment import proxy_environment, tls_context
from training_backends.http.urls import is_loopback, normalize_base_url
from training_backends.rundir.directory import ExitRecord, RunDir
from training_backends.rundir.handover import KEYS_ON_STDIN, ON_STDIN, safe_environment

__all__ = [
    "ChildEnvironment",
    "Hub",
    "ask_model",
    "communicate",
    "run_trainer",
    "spawn",
    "took_lock",
]

log = get_logger()

_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})
"""What huggingface_hub accepts as true."""


@dataclass(frozen=True, slots=True)
class ChildEnvironment:
    """Environment and standard input of a new process.

    Attributes:
        variables: All environment variables; no secrets.
        token: Hub token, passed on standard input.
        keys: Keys of the run's integrations by their numbers, passed likewise.
    """

    variables: dict[str, str]
    token: SecretStr | None = None
    keys: Mapping[int, SecretStr] = field(default_factory=dict)

    @property
    def is_offline(self) -> bool:
        """Whether the Hub must not be contacted."""
        return self.variables.get("HF_HUB_OFFLINE", "").upper() in _TRUE

    @property
    def stdin(self) -> bytes:
        """Bytes to write to standard input."""
        lines = [self.token.get_secret_value()] if self.token else []
        if self.keys:
            keys = {number: key.get_secret_value() for number, key in self.keys.items()}
            lines.append(json.dumps(keys))
        return "".join(f"{line}\n" for line in lines).encode()


class Hub:
    """Access to the Hugging Face Hub, from settings, environment and stored credentials."""

    def __init__(
        self,
        settings: LocalSettings | None = None,
        credentials: CredentialSource | None = None,
        interpreter: Interpreter = THIS_INTERPRETER,
    ) -> None:
        self._settings = settings or LocalSettings.model_construct()
        self._credentials = credentials
        self._interpreter = interpreter

    async def child_environment(
        self, model: str, integrations: Sequence[Integration] = ()
    ) -> ChildEnvironment:
        """Return what a process needs to load a model; a token only for models on the Hub.

        Args:
            integrations: Where it reports; their keys are added.

        Raises:
            ConfigError: A network variable is invalid. The Hub's library would print its value.
            CredentialNotFound: The key of an integration does not exist.
        """
        child_env = await self._for_model(model)
        if not integrations:
            return child_env
        keys = {
            number: key
            for number, entry in enumerate(integrations)
            if (key := await self.tracker_key(entry)) is not None
        }
        variables = child_env.variables | proxy_environment()
        if keys:
            variables[KEYS_ON_STDIN] = "1"
        return replace(child_env, variables=variables, keys=keys)

    async def tracker_key(self, entry: Integration) -> SecretStr | None:
        """Return the key that an integration names; None if it needs none.

        Raises:
            CredentialNotFound: There is no such key.
        """
        name = getattr(entry, "credential", None)
        if not name or self._credentials is None or getattr(entry, "mode", "") == "offline":
            return None
        provider, _, profile = name.partition("/")
        return await self._credentials.get(provider, profile or None)

    async def _for_model(self, model: str) -> ChildEnvironment:
        environment = self._environment()
        if ChildEnvironment(environment).is_offline or await to_thread.run_sync(_is_here, model):
            return ChildEnvironment(environment)
        endpoint = _checked_endpoint(environment.get("HF_ENDPOINT"))
        await to_thread.run_sync(tls_context)
        # Proxy URLs may contain a password: set them only if the process needs the network.
        environment |= proxy_environment()
        token = await self._token(endpoint)
        if token is not None:
            environment[ON_STDIN] = "1"
        return ChildEnvironment(environment, token)

    def _environment(self) -> dict[str, str]:
        variables = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if self._settings.offline:
            variables["HF_HUB_OFFLINE"] = "1"
        if self._settings.hub_url is not None:
            variables["HF_ENDPOINT"] = self._settings.hub_url
        variables |= trace_environment()
        return self._interpreter.variables(safe_environment()) | variables

    async def _token(self, endpoint: str) -> SecretStr | None:
        if self._credentials is None:
            return None
        if not endpoint.startswith("https:") and not is_loopback(endpoint):
            log.warning("not sending the Hub token over plain HTTP", url=endpoint)
            return None
        try:
            return await self._credentials.get("huggingface", self._settings.profile)
        except CredentialNotFound:
            if self._settings.profile is not None:
                raise  # that profile was requested explicitly
            return None
        except VaultLocked as error:
            # Most models need no token; if this one does, the run fails with the Hub's error.
            log.warning("no Hub token available", reason=error.message)
            return None


def _checked_endpoint(value: str | None) -> str:
    if not value:
        return "https:"  # the default endpoint
    try:
        return normalize_base_url(value)
    except ConfigError as error:
        why = "; ".join(issue.message for issue in error.issues)
        raise ConfigError(
            f"Invalid HF_ENDPOINT: {why}.", hint="Correct or unset HF_ENDPOINT."
        ) from None


def _is_here(model: str) -> bool:
    try:
        base = base_of(model)
    except ValueError:
        return True  # the trainer reports it
    return base == TINY_MODEL or Path(base).expanduser().is_dir()


def sendable(prompt: Prompt) -> Prompt:
    """Return a prompt without lone surrogates, which are no text."""
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "replace").decode()
    return [{**each, "content": str(sendable(each["content"]))} for each in prompt]


async def ask_model(
    model: str,
    prompt: Prompt,
    *,
    seed: int = 0,
    max_tokens: int = 64,
    child_env: ChildEnvironment | None = None,
    interpreter: Interpreter = THIS_INTERPRETER,
) -> Reply:
    """Return a model's answer to `prompt`, with greedy decoding.

    Args:
        model: `tiny-mistral`, a directory, or a model on the Hub.
        seed: Seeds the weights of an untrained `tiny-mistral`.
        child_env: Environment of the process; default: built from the current environment.

    Raises:
        BackendUnavailable: The model cannot be loaded; includes the trainer's message.
    """
    command = interpreter.command("sample", model)
    options = ["--seed", str(seed), "--max-tokens", str(max_tokens)]
    child_env = child_env or await Hub().child_environment(model)
    # Not as an argument: those are visible to all users and limited to 128 KiB.
    asked = sendable(prompt)
    if not isinstance(asked, str):
        asked = json.dumps(asked)
        options.append("--messages")
    given = child_env.stdin + asked.encode()
    out = await run_trainer([*command, *options], f"Cannot generate with {model}", child_env, given)
    return Reply.model_validate_json(out)


async def run_trainer(
    command: Sequence[str],
    failure: str,
    child_env: ChildEnvironment,
    given: bytes | None = None,
) -> bytes:
    """Run a command of the trainer to its end; return its standard output.

    Args:
        failure: What its failure means, for the message.
        given: Its standard input; None: what `child_env` has for it.

    Raises:
        BackendUnavailable: It failed; includes its message.
    """
    given = child_env.stdin if given is None else given
    code, out, said = await communicate(command, given, child_env.variables)
    if code:
        reason = said.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"exit code {code}"
        raise BackendUnavailable(f"{failure}: {reason}", backend="local")
    return out


async def communicate(
    command: Sequence[str], given: bytes, variables: Mapping[str, str]
) -> tuple[int, bytes, bytes]:
    """Run a command to its end; return its exit code, standard output and standard error.

    Unlike `anyio.run_process`, also if it ends without having read its input.

    Args:
        given: Its standard input.
        variables: All of its environment variables.
    """
    out, said = bytearray(), bytearray()

    async def read(stream: ByteReceiveStream | None, target: bytearray) -> None:
        if stream is not None:
            async for part in stream:
                target.extend(part)

    async with await anyio.open_process(command, env=variables) as process:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, process.stdout, out)
            tasks.start_soon(read, process.stderr, said)
            if process.stdin is not None:
                with suppress(anyio.BrokenResourceError, ConnectionError):
                    await process.stdin.send(given)
                with suppress(anyio.BrokenResourceError, ConnectionError):
                    await process.stdin.aclose()
        return await process.wait(), bytes(out), bytes(said)


def spawn(run: RunDir, program: Sequence[str], child_env: ChildEnvironment) -> int:
    """Start the training process of a run directory; return its process id.

    Safe to repeat: only one process gets the directory's lock.
    """
    run.spec.touch()  # its mtime is the start time, see `state`
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own program and directory
            [*program, str(run.path)],
            stdin=subprocess.PIPE if child_env.stdin else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=child_env.variables,
            start_new_session=True,
        )
    if process.stdin is not None:
        # Fits into the pipe's buffer, so this does not block.
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(child_env.stdin)
    # Without a wait, the exited process would stay a zombie while this one lives.
    threading.Thread(
        target=_reap, args=(process, run), name=f"reap-{process.pid}", daemon=True
    ).start()
    return process.pid


def _reap(process: "subprocess.Popen[bytes]", run: RunDir) -> None:
    """Wait for a process to exit, and record the failure if it could not even start."""
    code = process.wait()
    if took_lock(run) or run.is_active() or run.exit.is_file() or run.stop.exists():
        return
    lines = []
    with suppress(FileNotFoundError):
        lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = f"The training process could not start: {lines[-1] if lines else f'exit {code}'}"
    failure = Failure(kind="internal", message=message)
    with suppress(FileNotFoundError):  # the run was deleted
        run.write_exit(ExitRecord(status="failed", code=code, failure=failure))


def took_lock(run: RunDir) -> bool:
    """Return whether the most recently started process has held the directory's lock.

    The spec is touched right before each start, and the lock file is written once the lock is held;
    before that, the lock file may already exist, empty and new.
    """
    try:
        lock = run.lock.stat()
        return lock.st_size > 0 and lock.st_mtime >= run.spec.stat().st_mtime
    except FileNotFoundError:
        return False
