"""Set up structlog: lines for people on a console, JSON for machines, never a secret."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, TextIO

import structlog

from training_backends.core.escape import escape_controls
from training_backends.core.redaction import (
    REDACTED,
    redact,
    redact_value,
    register_environment,
    register_secret,
)

__all__ = [
    "REDACTED",
    "QuietLog",
    "bound",
    "configure_logs",
    "get_logger",
    "redact",
    "redact_event",
    "register_secret",
]

_MULTILINE: Final = frozenset({"exception", "stack"})
"""Keys of an event whose values this program has written on several lines."""


def redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Take the secrets out of a line: a structlog processor, the last one before the renderer.

    For programs that set structlog up by themselves; `configure_logs` has it.
    """
    cleaned: dict[str, Any] = redact_value(event)
    return cleaned


def _escape_event(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Escape control characters, in a traceback all but its line ends."""
    return {
        escape_controls(name): escape_controls(value, keep="\n" if name in _MULTILINE else "")
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


def configure_logs(
    *,
    log_format: Literal["console", "json"] = "console",
    level: str = "warning",
    stream: TextIO | None = None,
) -> None:
    """Send structlog's events, and the standard library's, to `stream` (default stderr).

    Call it once, at the start of a program; a library never calls it. Secrets that the
    environment holds are taken out of every line, and others as `redact` finds them.
    """
    register_environment()
    output = stream or sys.stderr
    note = "some log lines could not be written"
    if log_format == "json":
        note = json.dumps({"event": note, "level": "warning"})
    target: Any = _Unfailing(output, note)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # Here and not in the renderer, which would show what local variables hold.
        structlog.processors.format_exc_info,
    ]
    # JSON has escapes of its own.
    rendering: list[Any] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [_escape_event, structlog.dev.ConsoleRenderer(colors=output.isatty())]
    )
    numeric = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, redact_event, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact_event,
                *rendering,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(numeric, logging.WARNING))
    logging.captureWarnings(capture=True)


class _Unfailing:
    """Writes to a stream; what cannot be written is lost, never the caller's error.

    A disk may be full, and the reader of a pipe may have exited. A note marks the gap once
    lines can be written again.
    """

    def __init__(self, stream: TextIO, note: str) -> None:
        self._stream = stream
        self._note = note
        self._failed = False

    def write(self, text: str) -> int:
        """Write as much as the stream takes."""
        with self._tolerant():
            if self._failed:
                # What was written last may have been cut off in the middle of a line.
                self._stream.write(f"\n{self._note}\n")
                self._stream.flush()
                self._failed = False
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        with self._tolerant():
            self._stream.flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it is closed, or cannot encode a character
            self._failed = True


class _Handler(logging.StreamHandler[TextIO]):
    """Writes the lines of the standard library's loggers."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the base's name
        """Say whose line was lost; logging's own report would show what was to be in it."""
        with suppress(OSError, ValueError):
            structlog.get_logger().error("log line lost", logger=record.name)


@contextmanager
def bound(**values: str | None) -> Iterator[None]:
    """Put these on every line that is logged inside, also by the threads and tasks begun there.

    What is None is left out. Never around a `yield` of an asynchronous generator: until it is
    resumed, its caller's lines would get them.

        with bound(run_id=run.id, backend=run.backend, remote_id=run.remote_id):
    """
    known = {name: value for name, value in values.items() if value is not None}
    with structlog.contextvars.bound_contextvars(**known):
        yield


class QuietLog:
    """A structlog logger that is silent until the program has set structlog up.

    Left alone, structlog writes to standard output, which belongs to the program that uses
    this package as a library.
    """

    def __init__(self, **bound: Any) -> None:
        self._log = structlog.get_logger(**bound)

    def debug(self, event: str, **values: Any) -> None:
        """Say what only matters when something is looked into."""
        if structlog.is_configured():
            self._log.debug(event, **values)

    def info(self, event: str, **values: Any) -> None:
        """Say what happened."""
        if structlog.is_configured():
            self._log.info(event, **values)

    def warning(self, event: str, **values: Any) -> None:
        """Say what somebody may have to look at."""
        if structlog.is_configured():
            self._log.warning(event, **values)

    def error(self, event: str, **values: Any) -> None:
        """Say what went wrong."""
        if structlog.is_configured():
            self._log.error(event, **values)

    def exception(self, event: str, **values: Any) -> None:
        """Say what went wrong, with the traceback of the exception being handled."""
        if structlog.is_configured():
            self._log.exception(event, **values)


def get_logger(**bound: Any) -> QuietLog:
    """Return the logger that this package's modules use."""
    return QuietLog(**bound)
