"""Settings that all backends over HTTP share."""

from datetime import timedelta

from pydantic import Field, PositiveFloat, PositiveInt

from training_backends.core.settings import SectionSettings
from training_backends.http.policy import HttpPolicy
from training_backends.http.urls import is_loopback

__all__ = ["ServerSettings"]


class ServerSettings(SectionSettings):
    """A server, its key, timeouts and polling. Times in seconds."""

    base_url: str
    profile: str | None = Field(default=None, description="Credential profile of the API key.")
    connect_timeout: PositiveFloat = Field(
        default=10.0, description="Timeout for opening a connection."
    )
    read_timeout: PositiveFloat = Field(default=30.0, description="Timeout without data.")
    write_timeout: PositiveFloat = Field(
        default=30.0, description="Timeout for sending a part of a request."
    )
    call_timeout: PositiveFloat = Field(
        default=120.0, description="Timeout of a call with retries."
    )
    upload_timeout: PositiveFloat = Field(
        default=600.0,
        description="Timeout of the response to an upload, which includes validation.",
    )
    attempts: PositiveInt = Field(default=5, description="Maximum attempts per request.")
    retry_pause: PositiveFloat = Field(
        default=0.5,
        description="Longest pause before the second attempt; doubles with each further one.",
    )
    poll_min: PositiveFloat = Field(default=0.5, description="Shortest polling interval.")
    poll_max: PositiveFloat | None = Field(
        default=None, description="Longest polling interval; default: 2 on loopback, else 10."
    )
    settle_timeout: PositiveFloat | None = Field(
        default=None,
        description="How long to look for a job after a lost create response before creating it "
        "again; default: 3 on loopback, else 60.",
    )

    @property
    def longest_poll(self) -> float:
        """Longest polling interval in seconds."""
        if self.poll_max is not None:
            return self.poll_max
        return 2.0 if is_loopback(self.base_url) else 10.0

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Shortest and longest polling interval, for `TrainingBackend.poll_interval`."""
        return timedelta(seconds=self.poll_min), timedelta(seconds=self.longest_poll)

    @property
    def settling(self) -> float:
        """Seconds within which a create request without a response takes effect, if ever."""
        if self.settle_timeout is not None:
            return self.settle_timeout
        # Proxies on the way time out after 30 or 60 seconds.
        return 3.0 if is_loopback(self.base_url) else 60.0

    @property
    def scope(self) -> str:
        """Server and account that ids belong to; contains no secret."""
        return f"{self.base_url}#{self.profile or ''}"

    def policy(self) -> HttpPolicy:
        """Return the timeouts as an `HttpPolicy`."""
        return HttpPolicy(
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            write_timeout=self.write_timeout,
            call_timeout=self.call_timeout,
            upload_timeout=self.upload_timeout,
            attempts=self.attempts,
            retry_pause=self.retry_pause,
        )
