"""An OpenAI-compatible inference server that the operator runs, such as vLLM."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

import anyio

from training_backends.core.errors import ProtocolError, RunNotFound, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.http.client import HttpClient
from training_backends.http.urls import is_loopback

__all__ = ["ExternalServer", "Find", "Merge", "Seen"]

log = get_logger()

_LOAD: Final = "/load_lora_adapter"
_UNLOAD: Final = "/unload_lora_adapter"
_FRESH: Final = 10.0
"""Seconds for which the list of the server's models is cached."""

Find = Callable[[], Awaitable[Path | None]]
Merge = Callable[[], Awaitable[Path]]


class Seen(NamedTuple):
    """What an inference server had.

    Attributes:
        at: When.
        names: Its models; None if it does not list them.
        loads: Whether it loads adapters.
        failure: Why it could not be asked.
    """

    at: float = float("-inf")
    names: frozenset[str] | None = frozenset()
    loads: bool = False
    failure: TrainingBackendError | None = None


class ExternalServer:
    """Finds a model on the server; adapters are loaded with vLLM's operations for that.

    vLLM has them with `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
    """

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self._lock = anyio.Lock()
        self._seen = Seen()
        self._directories: dict[str, str] = {}

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def doubt(self) -> None:
        """Look again before the next chat: the server may have been restarted."""
        self._seen = Seen()

    async def look(self, *, again: bool = False) -> Seen:
        """Return what the server has, as of some seconds ago at most."""
        async with self._lock:
            now = anyio.current_time()
            if again or now - self._seen.at >= _FRESH:
                self._seen = await self._ask(now)
            return self._seen

    async def _ask(self, now: float) -> Seen:
        try:
            found = (await self.client.json("GET", "/models")).get("data")
        except (RunNotFound, ProtocolError):
            found = None
        except TrainingBackendError as error:
            log.warning("inference server unavailable", reason=error.message)
            return Seen(now, failure=error)
        if not isinstance(found, list):
            return Seen(now, names=None)
        names = frozenset(str(each.get("id")) for each in found if isinstance(each, dict))
        # Nothing is loaded: a name and a path are missing.
        probe = await self.client.send("POST", _LOAD, body={}, expect=range(200, 600))
        return Seen(now, names=names, loads=probe.status not in {404, 405} and probe.status < 500)

    async def name_of(self, name: str, find: Find, merge: Merge) -> str:
        """Return the server's name of a fine-tuned model, which is loaded if necessary.

        Args:
            find: Returns the directory of its weights, if they are on this machine.
            merge: Returns a directory with the complete model.

        Raises:
            RunNotFound: The server does not have it and cannot load it.
            TrainingBackendError: The server cannot be reached.
        """
        seen = self._seen
        if name not in (seen.names or ()):
            seen = await self.look(again=seen.failure is not None)
        if seen.failure is not None:
            raise seen.failure
        if seen.names is None or name in seen.names:
            return name
        if name in self._directories:
            return self._directories[name]
        weights = await find()
        if weights is None:
            raise RunNotFound(f"The inference server does not have {name!r}.")
        if seen.loads and await anyio.Path(weights / "adapter_config.json").exists():
            await self._load(name, weights)
            return name
        if not is_loopback(self.client.base_url):
            raise RunNotFound(f"The inference server does not have {name!r}.")
        # `transformers serve` takes directories for names, and so may others here.
        directory = self._directories[name] = str(await merge())
        return directory

    async def _load(self, name: str, weights: Path) -> None:
        body = {"lora_name": name, "lora_path": str(weights)}
        answer = await self.client.send("POST", _LOAD, body=body, expect=range(200, 500))
        if name not in ((await self.look(again=True)).names or ()):
            said = answer.body[:500].decode("utf-8", "replace")
            log.error("adapter not loaded", model=name, status=answer.status, reason=said)
            raise RunNotFound(f"The inference server did not load the adapter of {name!r}.")

    async def forget(self, name: str, *, exactly: bool = False) -> None:
        """Unload the adapters of a model that is deleted, and of its checkpoints.

        Args:
            exactly: Only that of this name.
        """

        def is_gone(each: str) -> bool:
            return each == name or (not exactly and each.startswith(name))

        self._directories = {
            each: path for each, path in self._directories.items() if not is_gone(each)
        }
        seen = await self.look(again=True)
        loaded = [each for each in seen.names or () if is_gone(each)]
        for each in loaded if seen.loads else ():
            try:
                await self.client.send("POST", _UNLOAD, body={"lora_name": each})
            except TrainingBackendError as error:
                log.warning("adapter not unloaded", model=each, reason=error.message)
        self.doubt()
