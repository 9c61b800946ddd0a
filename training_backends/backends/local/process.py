"""Start a training process that outlives its parent."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread
from pydantic import SecretStr

from training_backends.backends.local.settings import LocalSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    CredentialNotFound,
    VaultLocked,
)
from training_backends.core.logging import get_logger
from training_backends.core.run import Failure, Reply
from training_backends.http.environment import proxy_environment, tls_context
from training_backends.http.urls import is_loopback, normalize_base_url
from training_backends.rundir.directory import ON_STDIN, ExitRecord, RunDir

__all__ = ["ENGINE", "Handed", "Hub", "ask_model", "sample_answer", "spawn", "took_lock"]

log = get_logger()

# No API key of the parent's gets into the child: it may run for days, and its environment
# can be read by everybody with the same user id.
_PASSED_ON: Final = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHON(PATH|HOME|UTF8)|LD_LIBRARY_PATH"
    r"|XDG_CACHE_HOME|HF_(HOME|ENDPOINT|HUB_OFFLINE|HUB_CACHE|HUB_DOWNLOAD_TIMEOUT)"
    r"|CUDA_\w+|NVIDIA_\w+|(OMP|MKL|OPENBLAS)_NUM_THREADS|PYTORCH_\w+"
    r"|(NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON|HSA|HIP|ROCR|CUBLAS|BNB|UCX|FI|HF_XET)_\w+"
    r"|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE",
    re.IGNORECASE,
)
# Whatever its prefix says.
_SECRET: Final = re.compile(
    r"(?:\w+_)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)", re.IGNORECASE
)
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})
"""What the hub's own library takes for yes."""


@dataclass(frozen=True, slots=True)
class Handed:
    """What a process starts with.

    Attributes:
        environment: All of it; no secret.
        token: Of the model hub, for its standard input.
    """

    environment: dict[str, str]
    token: SecretStr | None = None

    @property
    def is_offline(self) -> bool:
        """Whether the hub must not be asked."""
        return self.environment.get("HF_HUB_OFFLINE", "").upper() in _TRUE

    @property
    def stdin(self) -> bytes:
        """What is to be written to its standard input."""
        return f"{self.token.get_secret_value()}\n".encode() if self.token else b""


class Hub:
    """Access to the model hub, as settings, environment and vault say."""

    def __init__(
        self, settings: LocalSettings | None = None, credentials: CredentialSource | None = None
    ) -> None:
        self._settings = settings or LocalSettings.model_construct()
        self._credentials = credentials

    async def handed(self, model: str) -> Handed:
        """Return what a process needs that loads a model; a token only for one of the hub.

        Raises:
            ConfigError: A variable of the network cannot be used. The hub's library would quote it.
        """
        environment = self._environment()
        if Handed(environment).is_offline or await to_thread.run_sync(_is_here, model):
            return Handed(environment)
        endpoint = _checked_endpoint(environment.get("HF_ENDPOINT"))
        await to_thread.run_sync(tls_context)
        # Proxies may hold a password, so they are only for a process that needs the network.
        environment |= proxy_environment()
        token = await self._token(endpoint)
        if token is not None:
            environment[ON_STDIN] = "1"
        return Handed(environment, token)

    def _environment(self) -> dict[str, str]:
        ours = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if self._settings.offline:
            ours["HF_HUB_OFFLINE"] = "1"
        if self._settings.hub_url is not None:
            ours["HF_ENDPOINT"] = self._settings.hub_url
        return _matching(_PASSED_ON) | ours

    async def _token(self, endpoint: str) -> SecretStr | None:
        if self._credentials is None:
            return None
        if not endpoint.startswith("https:") and not is_loopback(endpoint):
            log.warning("no token for the model hub: it is asked over plain http", url=endpoint)
            return None
        try:
            return await self._credentials.get("huggingface", self._settings.profile)
        except CredentialNotFound:
            if self._settings.profile is not None:
                raise  # that one was asked for
            return None
        except VaultLocked as error:
            # Most models need none; where one does, the hub's refusal is the run's failure.
            log.warning("no token for the model hub", reason=error.message)
            return None


def _checked_endpoint(value: str | None) -> str:
    if not value:
        return "https:"  # the hub itself
    try:
        return normalize_base_url(value)
    except ConfigError as error:
        why = "; ".join(issue.message for issue in error.issues)
        raise ConfigError(
            f"HF_ENDPOINT cannot be used: {why}.", hint="Correct or unset HF_ENDPOINT."
        ) from None


def _is_here(model: str) -> bool:
    return model == TINY_MODEL or Path(model).expanduser().is_dir()


def _matching(pattern: re.Pattern[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if pattern.fullmatch(name) and not _SECRET.fullmatch(name)
    }


async def ask_model(
    model: str, prompt: str, *, seed: int = 0, max_tokens: int = 64, handed: Handed | None = None
) -> Reply:
    """Return what a model says to `prompt`, always choosing the likeliest token.

    Args:
        model: `tiny-mistral`, a directory, or a model of the hub.
        seed: Makes the weights of an untrained `tiny-mistral`.
        handed: What it takes to fetch the model; default what the environment gives.

    Raises:
        BackendUnavailable: The model cannot be loaded; the message is the engine's.
    """
    command = [sys.executable, "-P", "-m", "training_backends.trainer", "sample", model]
    options = ["--seed", str(seed), "--max-tokens", str(max_tokens)]
    handed = handed or await Hub().handed(model)
    # Not as an argument, which everybody sees, and of which the system takes 128 KiB at most.
    given = handed.stdin + prompt.encode("utf-8", "replace")
    done = await anyio.run_process(
        [*command, *options], input=given, check=False, env=handed.environment
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise BackendUnavailable(f"The model {model} cannot be asked: {said}", backend="local")
    return Reply.model_validate_json(done.stdout)


async def sample_answer(model: str, prompt: str) -> str:
    """Return the answer of a model that answers; see `ask_model`."""
    return str((await ask_model(model, prompt)).answer)


ENGINE: Final = (sys.executable, "-P", "-m", "training_backends.trainer", "train")
"""The training program; its last argument is the run directory."""


def spawn(run: RunDir, program: Sequence[str], handed: Handed) -> int:
    """Start the training process of a run directory; return its process id.

    Starting it twice is harmless: only one gets the directory's lock.
    """
    run.spec.touch()  # tells when it was started, see `state`
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own program and directory
            [*program, str(run.path)],
            stdin=subprocess.PIPE if handed.stdin else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=handed.environment,
            start_new_session=True,
        )
    if process.stdin is not None:
        # Far less than a pipe holds, so this waits for nobody.
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(handed.stdin)
    # Somebody must take its exit status, or it stays a zombie for as long as we live.
    threading.Thread(
        target=_reap, args=(process, run), name=f"reap-{process.pid}", daemon=True
    ).start()
    return process.pid


def _reap(process: "subprocess.Popen[bytes]", run: RunDir) -> None:
    """Wait for the end of a process, and tell of one that could not even begin."""
    code = process.wait()
    if took_lock(run) or run.is_active() or run.exit.is_file() or run.stop.exists():
        return
    if not run.path.is_dir():
        return  # deleted
    lines = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = f"The training process could not start: {lines[-1] if lines else f'exit {code}'}"
    failure = Failure(kind="internal", message=message)
    run.write_exit(ExitRecord(status="failed", code=code, failure=failure))


def took_lock(run: RunDir) -> bool:
    """Tell whether the process started last has held the directory's lock.

    The spec is touched right before the start, the lock is written once it is held. Until then
    the lock's file may be there already, empty and new.
    """
    try:
        lock = run.lock.stat()
        return lock.st_size > 0 and lock.st_mtime >= run.spec.stat().st_mtime
    except FileNotFoundError:
        return False
