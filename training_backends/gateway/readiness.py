"""Whether the gateway can serve: its database, its file storage and its backend."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import anyio
from anyio import to_thread

from training_backends.core.logging import get_logger
from training_backends.gateway.gateway import Gateway

__all__ = ["Readiness"]

log = get_logger()

READY_SECONDS: Final = 1.0
"""How long a result is cached."""
BACKEND_SECONDS: Final = 10.0
"""How long the result of the backend is cached, which may be a request to a provider."""
PATIENCE: Final = 2.0
"""Seconds for all checks together."""


class Readiness:
    """Checks each part, in bounded time; results are cached, because anybody may ask."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = anyio.Lock()
        self._found: dict[str, str] = {}
        self._until = self._backend_until = float("-inf")
        # A check that hangs keeps its thread.
        self._threads = anyio.CapacityLimiter(4)

    async def check(self) -> Mapping[str, str]:
        """Return `ok` or `unavailable` for each part; the reasons are in the log only."""
        async with self._lock:
            if anyio.current_time() >= self._until:
                await self._probe()
                self._until = anyio.current_time() + READY_SECONDS
            return dict(self._found)

    async def _probe(self) -> None:
        gateway = self._gateway
        probes: dict[str, Callable[[], Awaitable[object]]] = {
            "store": partial(self._in_thread, gateway.check_store),
            "files": partial(self._in_thread, gateway.files.check),
        }
        if anyio.current_time() >= self._backend_until:
            probes["backend"] = self._backend
        found = dict.fromkeys(probes, "unavailable")

        async def probe(name: str, check: Callable[[], Awaitable[object]]) -> None:
            try:
                await check()
            except Exception as error:
                log.error("not ready", part=name, reason=str(error))  # noqa: TRY400
            else:
                found[name] = "ok"

        with anyio.move_on_after(PATIENCE) as scope:
            async with anyio.create_task_group() as tasks:
                for name, check in probes.items():
                    tasks.start_soon(probe, name, check)
        if scope.cancelled_caught:
            late = [name for name, state in found.items() if state != "ok"]
            log.error("not ready", part=", ".join(late), reason=f"no answer within {PATIENCE:g} s")
        self._found.update(found)
        if "backend" in found:
            pause = BACKEND_SECONDS if found["backend"] == "ok" else READY_SECONDS
            self._backend_until = anyio.current_time() + pause

    async def _in_thread(self, check: Callable[[], Any]) -> None:
        await to_thread.run_sync(check, limiter=self._threads, abandon_on_cancel=True)

    async def _backend(self) -> None:
        gateway = self._gateway
        health = await gateway.client.backend(gateway.backend).health()
        if not health.ok:
            raise RuntimeError(health.message)
