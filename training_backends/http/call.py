"""One call with all its attempts: when each may begin, how long it may take, how it ended."""

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from random import SystemRandom
from typing import Any, Final

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from training_backends.core.errors import BackendUnavailable, RateLimited, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.http.limits import Breaker, Limiter, Refusal
from training_backends.http.policy import HttpPolicy
from training_backends.http.retry import Backoff, read_retry_after
from training_backends.http.upload import CHUNK_BYTES

__all__ = ["Call", "Pace", "pacing"]


class Pace:
    """Gives every `CHUNK_BYTES` of a transfer, and what is left at its end, the same time."""

    def __init__(self, scope: anyio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self._allow("nothing came of it", seconds)

    def _allow(self, failing: str, seconds: float) -> None:
        self.failing = f"{failing} within {seconds:g} s"
        self._scope.deadline = anyio.current_time() + seconds

    async def over(
        self, pieces: AsyncIterator[bytes], *, then: float
    ) -> AsyncGenerator[bytes, None]:
        """Pass pieces on; one is moved when the next is asked for.

        Args:
            then: Seconds for all that comes after the last one.
        """
        failing = f"fewer than {CHUNK_BYTES} bytes moved"
        self._allow(failing, self._seconds)
        moved = 0
        async for piece in pieces:
            yield piece
            moved += len(piece)
            if moved >= CHUNK_BYTES:
                moved = 0
                self._allow(failing, self._seconds)
        self._allow("no whole answer came to what was sent", then)


@contextmanager
def pacing(seconds: float, late: Callable[[str], Exception]) -> Iterator[Pace]:
    """End what is done inside when it takes longer than its pace allows.

    Args:
        seconds: For `CHUNK_BYTES`, and for all that comes before the first of them.
        late: Makes the error, from what did not come in time.
    """
    with anyio.CancelScope() as scope:
        pace = Pace(scope, seconds)
        yield pace
    if scope.cancelled_caught:
        raise late(pace.failing)


_LONG_WAIT: Final = 5.0
"""From here on somebody would wonder at the silence."""
_REQUEST_IDS: Final = ("x-request-id", "mistral-correlation-id")
_spread = SystemRandom().uniform


class Call:
    """What is known of one call on its way, and the rules that it keeps.

    Args:
        name: What is asked, for example `GET /v1/models`.
        repeatable: Whether doing it twice does no harm.
        seconds: For all of it; None where its attempts keep a pace instead.

    Attributes:
        sent: Whether the first byte of the attempt under way has left.
        retry_after: Seconds that its answer asked for.
        request_id: What the server calls it.
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
        self._seconds = math.inf if seconds is None else seconds
        self._latest = time.monotonic() + self._seconds
        self._longest_pause = policy.call_timeout
        self._backoff = Backoff(
            repeatable=repeatable,
            attempts=policy.attempts,
            patience=policy.call_timeout,
            latest=self._latest,
        )
        self._backend = backend
        self._asked = self._answered = self._may_have_arrived = False
        self._log = get_logger()

    def attempts(self) -> AsyncRetrying:
        """Return the attempts, to be entered one after the other until one succeeds."""
        # Not stamina, whose hooks are the whole program's: in one that has set none, every
        # attempt would be told on its standard output.
        return AsyncRetrying(
            retry=retry_if_exception(self._backoff),
            wait=lambda _: self._backoff.wait,
            before_sleep=self._say_retry,
            sleep=anyio.sleep,
        )

    def begin(self) -> None:
        """Forget what belongs to the attempt before."""
        self.sent = False
        self.retry_after = self.request_id = None

    def failed(self, error: TrainingBackendError) -> None:
        """Take in how an attempt ended; what it says of the call counts all attempts."""
        self._backoff.retry_after = self.retry_after
        if isinstance(error, BackendUnavailable):
            self._may_have_arrived = error.sent = error.sent or self._may_have_arrived
        self._log.debug("http.failed", call=self.name, error=error.message, **self.identity)

    @property
    def identity(self) -> dict[str, str]:
        """The server's name for the request, for a log line, where it gave one."""
        return {} if self.request_id is None else {"request_id": self.request_id}

    @contextmanager
    def within_its_time(self) -> Iterator[None]:
        """End what is done inside when the call's time is over."""
        left = self._latest - time.monotonic()
        with anyio.CancelScope(deadline=anyio.current_time() + left) as scope:
            yield
        if scope.cancelled_caught:
            raise self.late(f"no answer within {self._seconds:g} s")

    def late(self, what: str) -> BackendUnavailable:
        """Make the error of a call that ran out of time."""
        sent = self.sent or self._may_have_arrived
        return BackendUnavailable(f"{self.name}: {what}.", sent=sent, backend=self._backend)

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Notice when the server is turned to, and when the first byte leaves."""
        del info
        if event.endswith("send_request_headers.started"):
            self._asked = self.sent = True
        elif event.endswith("connect_tcp.started"):
            self._asked = True

    async def admitted(self, limiter: Limiter) -> None:
        """Wait until the account may ask again.

        Raises:
            RateLimited: That is later than this call may wait; nothing was sent.
            BackendUnavailable: The same, where the server said that it cannot work.
        """
        latest = min(self._latest, time.monotonic() + self._longest_pause)
        at = limiter.turn(latest)
        while (wait := at - time.monotonic()) > 0:
            if at >= latest:
                raise self._held_back(limiter, wait)
            self._say("http.held_back", wait, reason="the server's limit")
            await anyio.sleep(wait * _spread(1.0, 1.1))
            # Meanwhile another call may have been told of a longer one.
            at = limiter.paused_until

    def _held_back(self, limiter: Limiter, wait: float) -> TrainingBackendError:
        self.retry_after = wait
        asked = f"{self.name}: not sent, for the server wants no request in the next {wait:.0f} s"
        if limiter.is_failing:
            message = f"{asked}: it said that it cannot work (503)."
            return BackendUnavailable(message, sent=False, backend=self._backend)
        return RateLimited(
            f"{asked}, which is longer than this call may take.",
            retry_after=wait,
            backend=self._backend,
        )

    def answered(self, status: int, headers: Mapping[str, str], limiter: Limiter) -> None:
        """Take in the head of an answer."""
        self._answered = True
        limiter.told(status, headers, longest=self._longest_pause)
        self.retry_after = read_retry_after(headers.get("retry-after"))
        given = (headers.get(name) for name in _REQUEST_IDS)
        self.request_id = next((each[:100] for each in given if each), None)

    @contextmanager
    def judged_by(self, breaker: Breaker) -> Iterator[None]:
        """Ask whether to make the call at all, and tell how it ended.

        Raises:
            BackendUnavailable: The server failed so often that it is left alone.
        """
        allowed = breaker.enter()
        if isinstance(allowed, Refusal):
            raise self._refused(allowed)
        answered, what = None, ""
        try:
            yield
            answered = True
        except BackendUnavailable as error:
            if error.retryable and self._asked:
                answered, what = False, error.message
            raise
        except TrainingBackendError:
            answered = True if self._answered else None
            raise
        finally:
            breaker.leave(trying=allowed, answered=answered, what=what)

    def _refused(self, refusal: Refusal) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self.name}: not sent, for the last {refusal.failures} calls to this server failed, "
            f"since {refusal.since:%H:%M:%S} UTC. It is asked again in {refusal.seconds:.1f} s. "
            f"The last one was: {refusal.last}",
            hint="Is the server running, and the base URL right?",
            sent=False,
            backend=self._backend,
        )

    def _say_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._say("http.retry", self._backoff.wait, reason=str(error))

    def _say(self, event: str, seconds: float, *, reason: str) -> None:
        say = self._log.warning if seconds >= _LONG_WAIT else self._log.info
        say(event, call=self.name, seconds=round(seconds, 1), reason=reason, **self.identity)
