"""Logging with structlog: console lines or JSON, with secrets redacted."""

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
    "json_log",
    "redact",
    "redact_event",
    "register_secret",
]

_MULTILINE: Final = frozenset({"exception", "stack"})
"""Event keys whose values may contain line breaks."""


def redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Redact secrets: a structlog processor, to be the last one before the renderer.

    For programs that configure structlog themselves; `configure_logs` includes it.
    """
    cleaned: dict[str, Any] = redact_value(event)
    return cleaned


def _escape_event(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Escape control characters; tracebacks keep their line breaks."""
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
    """Send events of structlog and of the standard library to `stream` (default: stderr).

    Call it once, at program start; libraries must not call it. Secrets from the environment, and
    others that `redact` finds, are redacted from every line.
    """
    register_environment()
    output = stream or sys.stderr
    note = "some log lines could not be written"
    if log_format == "json":
        note = json.dumps({"event": note, "level": "warning"})
    target: Any = _SafeStream(output, note)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # Here and not in the renderer, which would include the values of local variables.
        structlog.processors.format_exc_info,
    ]
    # The JSON renderer escapes control characters itself.
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
    handler = _StderrHandler(target)
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


def json_log(stream: TextIO | None = None) -> Any:
    """Return a logger that writes every event as a JSON line, independent of `configure_logs`.

    Args:
        stream: Default: standard error.
    """
    note = json.dumps({"event": "some log lines could not be written", "level": "warning"})
    target: Any = _SafeStream(stream or sys.stderr, note)
    return structlog.wrap_logger(
        structlog.PrintLogger(target),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redact_event,
            structlog.processors.JSONRenderer(),
        ],
    )


class _SafeStream:
    """Writes to a stream and drops what cannot be written, instead of raising.

    The disk may be full, or the reader of a pipe may have exited. A note marks the gap once
    writing works again.
    """

    def __init__(self, stream: TextIO, note: str) -> None:
        self._stream = stream
        self._note = note
        self._failed = False

    def write(self, text: str) -> int:
        """Write the text, unless the stream fails."""
        with self._tolerant():
            if self._failed:
                # The last write may have been truncated in the middle of a line.
                self._stream.write(f"\n{self._note}\n")
                self._stream.flush()
                self._failed = False
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless it fails."""
        with self._tolerant():
            self._stream.flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: closed, or a character cannot be encoded
            self._failed = True


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes records of the standard library's loggers."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # inherited name
        """Report the logger whose line was lost; logging's own report would include the line."""
        with suppress(OSError, ValueError):
            structlog.get_logger().error("log line lost", logger=record.name)


@contextmanager
def bound(**values: str | None) -> Iterator[None]:
    """Add values to every line logged inside the block, also by threads and tasks started there.

    None values are dropped. Do not use it around a `yield` of an asynchronous generator: the
    caller's lines would get the values as well.

        with bound(run_id=run.id, backend=run.backend, remote_id=run.remote_id):
    """
    known = {name: value for name, value in values.items() if value is not None}
    with structlog.contextvars.bound_contextvars(**known):
        yield


class QuietLog:
    """A structlog logger that is silent until the program has configured structlog.

    Unconfigured, structlog writes to standard output, which belongs to the program that uses this
    package as a library.
    """

    def __init__(self, **bound: Any) -> None:
        self._log = structlog.get_logger(**bound)

    def debug(self, event: str, **values: Any) -> None:
        """Log details for debugging."""
        if structlog.is_configured():
            self._log.debug(event, **values)

    def info(self, event: str, **values: Any) -> None:
        """Log a normal event."""
        if structlog.is_configured():
            self._log.info(event, **values)

    def warning(self, event: str, **values: Any) -> None:
        """Log something that may need attention."""
        if structlog.is_configured():
            self._log.warning(event, **values)

    def error(self, event: str, **values: Any) -> None:
        """Log an error."""
        if structlog.is_configured():
            self._log.error(event, **values)

    def exception(self, event: str, **values: Any) -> None:
        """Log an error with the traceback of the exception being handled."""
        if structlog.is_configured():
            self._log.exception(event, **values)


def get_logger(**bound: Any) -> QuietLog:
    """Return a logger for a module of this package."""
    return QuietLog(**bound)
