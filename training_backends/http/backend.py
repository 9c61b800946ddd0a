"""What backends share that use one server."""

import time
from abc import ABC
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import ClassVar, Self

from training_backends.core.backend import BackendContext, Health, TrainingBackend
from training_backends.core.errors import CredentialNotFound, TrainingBackendError
from training_backends.http.auth import KeySource
from training_backends.http.client import HttpClient
from training_backends.http.settings import ServerSettings

__all__ = ["ServerBackend", "server_health"]


class ServerBackend(TrainingBackend, ABC):
    """A backend for one server with one key: its settings, client, health and closing.

    `settings_model` must be a `ServerSettings`. The key is the credential with the backend's name.
    """

    probe_path: ClassVar[str]
    """Path of a cheap request that needs the key, for `health`."""

    def __init__(self, settings: ServerSettings, key: KeySource) -> None:
        self.settings = settings
        self._key = key
        self._http: HttpClient | None = None

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from its section of the settings."""
        settings = context.settings
        if not isinstance(settings, ServerSettings):
            raise TypeError(f"{cls.__name__}.settings_model must be a ServerSettings")
        return cls(settings, partial(context.credentials.get, cls.name, settings.profile))

    def connect(self, key: KeySource) -> HttpClient:
        """Create the client; override for another key header, a fixed query or an error table."""
        return HttpClient(
            self.settings.base_url, key=key, policy=self.settings.policy(), backend=self.name
        )

    @property
    def http(self) -> HttpClient:
        """The client, with one connection pool.

        Raises:
            ConfigError: The key would travel unencrypted to another host.
        """
        if self._http is None:
            self._http = self.connect(self._key)
        return self._http

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Return the polling interval from the settings."""
        return self.settings.poll_interval

    async def health(self) -> Health:
        """Send a GET to `probe_path`."""

        async def probe() -> HttpClient:
            await self.http.json("GET", self.probe_path, shape="any")
            return self.http

        return await server_health(probe, configured=False)

    async def aclose(self) -> None:
        """Close the connections."""
        opened, self._http = self._http, None
        if opened is not None:
            await opened.aclose()


async def server_health(probe: Callable[[], Awaitable[HttpClient]], *, configured: bool) -> Health:
    """Return whether a server answers a cheap authenticated request.

    Args:
        probe: Sends the request and returns the client that it used.
        configured: Whether the backend counts as set up although its key is missing.
    """
    began = time.monotonic()
    try:
        http = await probe()
    except CredentialNotFound as error:
        return Health(ok=False, message=error.message, hint=error.hint, configured=configured)
    except TrainingBackendError as error:
        return Health(ok=False, message=error.message, hint=error.hint)
    return Health(
        ok=True,
        message=f"{http.base_url} responded in {time.monotonic() - began:.2f} s",
        clock_offset=http.clock_offset,
    )
