"""One call with its retries: rate limits, deadlines and outcome."""

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import SystemRandom
from typing import Any, Final

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from training_backends.core.errors import BackendUnavailable, RateLimited, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.core.tracing import Span
from training_backends.http.limits import Limiter
from training_backends.http.policy import HttpPolicy
from training_backends.http.retry import RetryRule, read_retry_after
from training_backends.http.upload import CHUNK_BYTES

__all__ = ["Call", "TransferDeadline", "pacing"]


class TransferDeadline:
    """Extends a deadline by the same time for every `CHUNK_BYTES` that are transferred."""

    def __init__(self, scope: anyio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self._allow("no response", seconds)

    def _allow(self, failing: str, seconds: float) -> None:
        self.failing: str = f"{failing} within {seconds:g} s"
        self._scope.deadline = anyio.current_time() + seconds

    async def over(
        self, pieces: AsyncIterator[bytes], *, then: float
    ) -> AsyncGenerator[bytes, None]:
        """Pass pieces through; a piece counts as transferred when the next one is requested.

        Args:
            then: Seconds allowed after the last piece.
        """
        failing = f"fewer than {CHUNK_BYTES} bytes transferred"
        self._allow(failing, self._seconds)
        moved = 0
        async for piece in pieces:
            yield piece
            moved += len(piece)
            if moved >= CHUNK_BYTES:
                moved = 0
                self._allow(failing, self._seconds)
        self._allow("no complete response to the request", then)


@contextmanager
def pacing(seconds: float, late: Callable[[str], Exception]) -> Iterator[TransferDeadline]:
    """Cancel the block when a transfer is slower than its pace.

    Args:
        seconds: Time for each `CHUNK_BYTES`, and for everything before the first of them.
        late: Makes the error from a description of what did not happen in time.
    """
    with anyio.CancelScope() as scope:
        pace = TransferDeadline(scope, seconds)
        yield pace
    if scope.cancelled_caught:
        raise late(pace.failing)


_LONG_WAIT: Final = 5.0
"""Seconds; longer pauses are logged as warnings."""
_REQUEST_IDS: Final = ("x-request-id", "mistral-correlation-id")
_spread = SystemRandom().uniform


class Call:
    """State of one call and the rules for its attempts.

    Args:
        name: Method and path, for example `GET /v1/models`.
        repeatable: Whether the request is safe to repeat.
        seconds: Deadline of the call; None if its attempts have a pace instead.

    Attributes:
        sent: Whether the first byte of the current attempt was sent.
        retry_after: Seconds from the response's Retry-After.
        request_id: Request id assigned by the server.
        hidden: Secrets of the current attempt, which a server may repeat.
        span: Of the current attempt.
    """

    def __init__(
        self,
        name: str,
        policy: HttpPolicy,
        *,
        repeatable: bool,
        seconds: float | None,
        backend: str | None,
    ) -> None:
        self.name = name
        self.sent = False
        self.retry_after: float | None = None
        self.request_id: str | None = None
        self.hidden: Sequence[str] = ()
        self.span = Span()
        self._seconds = math.inf if seconds is None else seconds
        self._latest = time.monotonic() + self._seconds
        self._longest_pause = policy.call_timeout
        self._retries = RetryRule(
            repeatable=repeatable,
            attempts=policy.attempts,
            retry_pause=policy.retry_pause,
            patience=policy.call_timeout,
            latest=self._latest,
        )
        self._backend = backend
        self._may_have_arrived = False
        self._log = get_logger()

    def attempts(self) -> AsyncRetrying:
        """Return the attempts, to be entered in turn until one succeeds."""
        # Not stamina: its hooks are process-wide, and by default it prints every retry.
        return AsyncRetrying(
            retry=retry_if_exception(self._retries),
            wait=lambda _: self._retries.wait,
            before_sleep=self._log_retry,
            sleep=anyio.sleep,
        )

    def begin(self) -> None:
        """Reset the state of the previous attempt."""
        self.sent = False
        self.retry_after = self.request_id = None

    def progressed(self) -> None:
        """Record that a part arrived that the next attempt does not ask for again."""
        self._retries.begin_again()

    def failed(self, error: TrainingBackendError) -> None:
        """Record a failed attempt, and make its error account for all attempts."""
        self._retries.retry_after = self.retry_after
        if isinstance(error, BackendUnavailable):
            self._may_have_arrived = error.sent = error.sent or self._may_have_arrived
        self._log.debug("http.failed", call=self.name, error=error.message, **self.identity)

    @property
    def identity(self) -> dict[str, str]:
        """The server's request id, if any, as fields of a log line."""
        return {} if self.request_id is None else {"request_id": self.request_id}

    @contextmanager
    def within_its_time(self) -> Iterator[None]:
        """Cancel the block at the call's deadline."""
        left = self._latest - time.monotonic()
        with anyio.CancelScope(deadline=anyio.current_time() + left) as scope:
            yield
        if scope.cancelled_caught:
            raise self.late(f"no response within {self._seconds:g} s")

    def late(self, what: str) -> BackendUnavailable:
        """Return the error of a call that timed out."""
        sent = self.sent or self._may_have_arrived
        return BackendUnavailable(f"{self.name}: {what}.", sent=sent, backend=self._backend)

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Record when the first byte is sent."""
        del info
        if event.endswith("send_request_headers.started"):
            self.sent = True

    async def admitted(self, limiter: Limiter) -> None:
        """Wait until the account's rate limit allows the call.

        Raises:
            RateLimited: The wait is longer than this call may take; nothing was sent.
            BackendUnavailable: Likewise, and the server had reported itself unavailable.
        """
        latest = min(self._latest, time.monotonic() + self._longest_pause)
        at = limiter.turn(latest)
        while (wait := at - time.monotonic()) > 0:
            if at >= latest:
                raise self._rate_limited(limiter, wait)
            self._log_pause("http.held_back", wait, reason="rate limit of the server")
            await anyio.sleep(wait * _spread(1.0, 1.1))
            # Another call may have received a longer pause in the meantime.
            at = limiter.paused_until

    def _rate_limited(self, limiter: Limiter, wait: float) -> TrainingBackendError:
        self.retry_after = wait
        asked = f"{self.name}: not sent; the server asked to wait {wait:.0f} s"
        if limiter.is_failing:
            message = f"{asked} (503 Service Unavailable)."
            return BackendUnavailable(message, sent=False, backend=self._backend)
        return RateLimited(
            f"{asked}, longer than this call may take.",
            retry_after=wait,
            backend=self._backend,
        )

    def answered(self, status: int, headers: Mapping[str, str], limiter: Limiter) -> None:
        """Record the status and headers of a response."""
        limiter.told(status, headers, longest=self._longest_pause)
        self.retry_after = read_retry_after(headers.get("retry-after"))
        given = (headers.get(name) for name in _REQUEST_IDS)
        self.request_id = next((each[:100] for each in given if each), None)

    def _log_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._log_pause("http.retry", self._retries.wait, reason=str(error))

    def _log_pause(self, event: str, seconds: float, *, reason: str) -> None:
        say = self._log.warning if seconds >= _LONG_WAIT else self._log.info
        say(event, call=self.name, seconds=round(seconds, 1), reason=reason, **self.identity)
