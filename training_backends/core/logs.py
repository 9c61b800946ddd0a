"""Set up structlog: lines for people on a console, JSON for machines, never a secret."""

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog

__all__ = ["REDACTED", "QuietLog", "configure_logs", "get_logger", "redact"]

REDACTED = "[redacted]"
_SECRET_NAME = re.compile(
    r"(api[_-]?key|authorization|password|secret|(^|[_-])token($|[_-](value)?$))", re.IGNORECASE
)
_SECRET_VALUES = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 " + REDACTED),
    (re.compile(r"\b(sk|tb)-[A-Za-z0-9_-]{8,}"), REDACTED),
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), REDACTED),
    (re.compile(r"(?i)\b(api_?key|password|secret|token)=[^\s&]+"), r"\1=" + REDACTED),
)


def redact(text: str) -> str:
    """Replace everything in `text` that looks like a secret."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _SECRET_NAME.search(str(key)) else _redacted(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    # An object, such as an exception, is written as its repr, which may hold a secret.
    text = repr(value)
    cleaned = redact(text)
    return value if cleaned == text else cleaned


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    cleaned: dict[str, Any] = _redacted(event)
    return cleaned


def configure_logs(
    *,
    log_format: Literal["console", "json"] = "console",
    level: str = "warning",
    stream: TextIO | None = None,
) -> None:
    """Send structlog's events, and the standard library's, to `stream` (default stderr).

    Call it once, at the start of a program; a library never calls it.
    """
    target = stream or sys.stderr
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=target.isatty())
    )
    numeric = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(numeric, logging.WARNING))


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
