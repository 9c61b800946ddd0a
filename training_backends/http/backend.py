"""What all backends over HTTP share: settings, a key, one connection pool, polling."""

from abc import abstractmethod
from datetime import timedelta
from typing import Any, Generic, Protocol, Self, TypeVar, cast

from pydantic import SecretStr

from training_backends.core.backend import BackendContext, CredentialSource, TrainingBackend
from training_backends.core.settings import load_settings
from training_backends.http.client import HttpClient
from training_backends.http.error_table import ErrorDecoder
from training_backends.http.settings import ServerSettings

__all__ = ["ServerBackend"]


class _API(Protocol):
    @property
    def http(self) -> HttpClient: ...


S = TypeVar("S", bound=ServerSettings)
A = TypeVar("A", bound=_API)


class ServerBackend(TrainingBackend, Generic[S, A]):
    """A backend of one server, with its settings in a section of the backend's name."""

    def __init__(self, *, credentials: CredentialSource, settings: S | None = None) -> None:
        self._credentials = credentials
        model = cast("type[S]", self.settings_model)
        self._settings = load_settings(model) if settings is None else settings
        self._opened: A | None = None

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from its section of the settings."""
        return cls(credentials=context.credentials, settings=cast("S | None", context.settings))

    @property
    def api(self) -> A:
        """The client of the server, with one connection pool.

        Raises:
            ConfigError: The key would travel unencrypted to another host.
        """
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    @abstractmethod
    def _open(self) -> A:
        """Create the client of the server, over `_http`."""

    def _http(self, decode_error: ErrorDecoder, **more: Any) -> HttpClient:
        return HttpClient(
            self._settings.base_url,
            key=self._key,
            decode_error=decode_error,
            policy=self._settings.policy(),
            backend=self.name,
            **more,
        )

    async def _key(self) -> SecretStr:
        return await self._credentials.get(self.name, self._settings.profile)

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """The polling interval from the settings."""
        chosen = self._settings
        return timedelta(seconds=chosen.poll_min), timedelta(seconds=chosen.longest_poll)

    async def aclose(self) -> None:
        """Close the connections."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.http.aclose()
