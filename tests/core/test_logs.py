"""Logs are for people or machines, and hold no secret."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from training_backends.core.logs import REDACTED, configure_logs, redact

CANARY = "s3cr3tCANARYvalue"


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Give the process its own logging back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {CANARY}",
        f"basic {CANARY}",
        f"key sk-{CANARY} is wrong",
        f"postgresql://user:{CANARY}@host/db",
        f"https://x.org/?api_key={CANARY}&a=1",
        f"password={CANARY}",
        f"TOKEN={CANARY}",
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str) -> None:
    """The shape gives it away wherever it stands; the text around it stays."""
    cleaned = redact(text)
    assert CANARY not in cleaned
    assert REDACTED in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "train_tokens=17440",
        "risk-averse-strategy-here",
        "http://127.0.0.1:8321/v1/files",
        "file:///data/a.jsonl",
        "the bearer of news",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """A log that hides everything helps nobody."""
    assert redact(text) == text


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_way_into_the_log_shows_a_secret(log_format: str) -> None:
    """Messages, fields, nested values, objects and tracebacks are all cleaned."""
    stream = io.StringIO()
    configure_logs(log_format="json" if log_format == "json" else "console", stream=stream)
    log = structlog.get_logger().bind(api_key=CANARY)
    message = f"Bearer {CANARY}"
    log.error(message, url=f"http://u:{CANARY}@h", nested={"hub_token": CANARY})
    log.error("list", items=[f"sk-{CANARY}"], error=ValueError(f"password={CANARY}"))
    try:
        int(message)
    except ValueError:
        log.exception("structlog")
        logging.getLogger("third.party").exception("Bearer %s", CANARY)
    logging.getLogger("third.party").error("x", extra={"authorization": CANARY})
    assert stream.getvalue().count("\n") >= 5
    assert CANARY not in stream.getvalue()


def test_json_logs_are_one_object_a_line() -> None:
    """Machines read level, time, message and fields."""
    stream = io.StringIO()
    configure_logs(log_format="json", stream=stream)
    structlog.get_logger().warning("status changed", run_id="r-1", step=3, train_tokens=7)
    logging.getLogger("third.party").warning("slow")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["event"] == "status changed"
    assert (first["level"], first["run_id"], first["step"]) == ("warning", "r-1", 3)
    assert first["train_tokens"] == 7
    assert first["timestamp"].endswith("Z")
    assert second["event"] == "slow"


def test_the_level_limits_both_loggers() -> None:
    """What is below it is not written."""
    stream = io.StringIO()
    configure_logs(level="error", stream=stream)
    structlog.get_logger().warning("hidden")
    logging.getLogger("third.party").warning("hidden")
    structlog.get_logger().error("shown")
    assert "hidden" not in stream.getvalue()
    assert "shown" in stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_no_colours() -> None:
    """Files hold text, not control characters."""
    stream = io.StringIO()
    configure_logs(stream=stream)
    structlog.get_logger().error("x", a=1)
    assert "\x1b" not in stream.getvalue()
