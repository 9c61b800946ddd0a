"""Logs are for people or machines, and hold no secret."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import anyio
import httpx
import pytest
import structlog
from anyio import to_thread

from training_backends.core.logging import (
    REDACTED,
    bound,
    configure_logs,
    get_logger,
    redact_event,
    register_secret,
)
from training_backends.core.redaction import forget_secrets
from training_backends.testing.server import LoopbackServer, StubReply

CANARY = "s3cr3tCANARYvalue"
Format = Literal["console", "json"]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Give the process its own logging back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    forget_secrets()


@pytest.fixture(params=["console", "json"])
def log_format(request: pytest.FixtureRequest) -> Format:
    """Test both ways to write."""
    return "json" if request.param == "json" else "console"


@pytest.fixture
def stream(log_format: Format) -> io.StringIO:
    """Write everything, down to debug."""
    stream = io.StringIO()
    configure_logs(log_format=log_format, level="debug", stream=stream)
    return stream


def fail_with(secret: str) -> None:
    """Fail as a library does whose errors say too much, with a cause and a local variable."""
    url = f"cannot reach http://user:{secret}@proxy:3128"
    cause = ConnectionError(url)
    cause.add_note(f"sent: authorization: Bearer {secret}")
    raise ExceptionGroup("several", [ValueError(f"password={secret!r}"), cause]) from cause


def test_no_way_into_the_log_shows_a_secret(stream: io.StringIO) -> None:
    """Messages, fields, nested values, names, objects, bound values and context are cleaned."""
    log = structlog.get_logger().bind(api_key=CANARY)
    message = f"Bearer {CANARY}"
    with bound(url=f"https://x.org/?api_key={CANARY}"):
        log.error(message, url=f"http://u:{CANARY}@h", nested={"hub_token": CANARY})
        get_logger(password=CANARY).debug("ours", reason=f"token={CANARY}")
    log.error("list", items=[f"sk-{CANARY}"], error=ValueError(f"password={CANARY}"))
    log.error("name", **{f"secret={CANARY}": 1})
    assert stream.getvalue().count("\n") == 4
    assert REDACTED in stream.getvalue()
    assert CANARY not in stream.getvalue()


def test_no_line_holds_a_control_character(stream: io.StringIO) -> None:
    """A provider's text can neither command the terminal nor forge a line."""
    evil = "\x1b]0;owned\x07\x9b2J\u202e\u2028\n2026-11-30 forged"
    get_logger(bound=evil).error(evil, field=evil, nested=[evil])
    logging.getLogger("other").error(evil)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert not any(line.startswith("2026-11-30 forged") for line in lines)
    try:
        fail_with(evil)
    except ExceptionGroup:
        get_logger().exception("failed")
    written = stream.getvalue()
    assert "Traceback" in written
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2028"} & set(written)


def test_tracebacks_show_no_secret(stream: io.StringIO) -> None:
    """Messages, causes, notes and groups are cleaned; variables are not shown at all."""
    try:
        fail_with(CANARY)
    except ExceptionGroup:
        get_logger().exception("ours")
        logging.getLogger("third.party").exception("Bearer %s", CANARY)
    get_logger().error("where", stack_info=True)
    text = stream.getvalue()
    assert text.count("ConnectionError: cannot reach http://") == 4  # cause and member, twice
    assert text.count("in fail_with") == 2
    assert CANARY not in text


@pytest.mark.parametrize(
    "name", ["httpx", "httpcore", "keyring", "uvicorn.error", "sqlalchemy.engine", "alembic", "x"]
)
def test_other_libraries_lines_are_cleaned_at_any_level(name: str, stream: io.StringIO) -> None:
    """Also when somebody lowers a logger's level to see more of it."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    try:
        logger.debug("headers: %r", [(b"Authorization", f"Bearer {CANARY}".encode())])
        logger.info("connect", extra={"authorization": CANARY})
        logger.warning("url %s", f"postgresql://user:{CANARY}@host/db")
        try:
            fail_with(CANARY)
        except ExceptionGroup:
            logger.debug("failed", exc_info=True, stack_info=True)
    finally:
        logger.setLevel(logging.NOTSET)
    assert name in stream.getvalue()
    assert "in fail_with" in stream.getvalue()
    assert CANARY not in stream.getvalue()


def test_a_line_that_cannot_be_written_shows_nothing_either() -> None:
    """Python's own report of it would show what was to be filled in."""
    stream = io.StringIO()
    configure_logs(stream=stream)  # here, for it puts pytest's own handler aside
    logging.getLogger("third.party").error("%d is no number", f"api_key={CANARY}")
    assert "log line lost" in stream.getvalue()
    assert "third.party" in stream.getvalue()
    assert CANARY not in stream.getvalue()


class Failing(io.StringIO):
    """A stream on a disk that is full for a while."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        """Write, unless there is trouble."""
        if self.error:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(), ValueError("closed")], ids=repr
)
def test_a_log_that_cannot_be_written_is_no_error_of_its_caller(
    log_format: Format, error: Exception
) -> None:
    """Once it can be written again, one note says that something is missing."""
    stream = Failing()
    configure_logs(log_format=log_format, stream=stream)
    stream.error = error
    for n in range(3):
        get_logger().error("lost", n=n)
        logging.getLogger("third.party").error("lost too")
    stream.error = None
    get_logger().error("first again")
    logging.getLogger("third.party").error("second again")
    lines = [line for line in stream.getvalue().splitlines() if line]
    assert "some log lines could not be written" in lines[0]
    assert ["first again" in lines[1], "second again" in lines[2], len(lines)] == [True, True, 3]
    if log_format == "json":
        assert all(json.loads(line)["level"] for line in lines)


@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_a_program_outlives_its_log(full: bool, log_format: Format) -> None:
    """A real one, whose standard error goes to a full disk or a pipe without a reader."""
    program = (
        "import logging; from training_backends.core.logging import *; "
        f"configure_logs(log_format={log_format!r}); "
        "[(get_logger().error('x' * 5000), logging.error('y' * 5000)) for _ in range(9)]; "
        "print('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as disk, os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=disk if full else pipe,
            check=False,
        )
    assert done.stdout == b"done\n"


@pytest.mark.anyio
async def test_what_the_http_libraries_say_of_a_call_is_cleaned(stream: io.StringIO) -> None:
    """The real ones, at debug: addresses, headers, answers."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore")]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    register_secret("session-canary-77")
    answer = StubReply(
        status=401, headers={"Set-Cookie": "s=session-canary-77", "X-Api-Key": CANARY}
    )
    try:
        with LoopbackServer(lambda _: answer) as server:
            url = f"{server.base_url}/v1/models?api_key={CANARY}"
            async with httpx.AsyncClient(auth=("user", CANARY)) as client:
                await client.get(url, headers={"Cookie": CANARY})
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
    assert "GET http://127.0.0.1" in stream.getvalue()
    assert "receive_response_headers" in stream.getvalue()
    assert CANARY not in stream.getvalue()
    assert "session-canary-77" not in stream.getvalue()


def test_warnings_are_lines_like_all_others(stream: io.StringIO) -> None:
    """They would go to standard error as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn(f"secret={CANARY} is odd", stacklevel=1)
    assert "is odd" in stream.getvalue()
    assert CANARY not in stream.getvalue()


def test_what_was_read_is_found_without_name_or_shape(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered by hand, or in the environment when the logs were set up."""
    register_secret("plain words of mine")
    monkeypatch.setenv("OTHER_API_KEY", "another-plain-one")
    configure_logs(stream=stream)
    get_logger().error("it was plain words of mine", body="<another-plain-one>")
    assert "plain words of mine" not in stream.getvalue()
    assert "another-plain-one" not in stream.getvalue()


def test_a_program_with_its_own_structlog_can_clean_its_lines_too() -> None:
    """The processor stands for itself."""
    stream = io.StringIO()
    structlog.configure(
        processors=[redact_event, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    get_logger().error("refused", password=CANARY)
    assert json.loads(stream.getvalue()) == {"event": "refused", "password": REDACTED}


@pytest.mark.anyio
async def test_what_is_bound_stands_on_every_line_inside() -> None:
    """In the tasks and threads begun there too, in other libraries' lines, and not afterwards."""
    stream = io.StringIO()
    configure_logs(log_format="json", level="info", stream=stream)

    async def task() -> None:
        get_logger().info("in a task")

    with bound(run_id="r-1", backend="mistral", remote_id=None):
        get_logger().info("first")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(task)
        await to_thread.run_sync(get_logger().info, "in a thread")
        logging.getLogger("third.party").warning("elsewhere")
        with bound(remote_id="j-1", run_id="r-2"):
            get_logger().info("inner")
        get_logger().info("last", backend="said otherwise")
    get_logger().info("after")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    keys = ("event", "run_id", "backend", "remote_id")
    assert [tuple(line.get(key) for key in keys) for line in lines] == [
        ("first", "r-1", "mistral", None),
        ("in a task", "r-1", "mistral", None),
        ("in a thread", "r-1", "mistral", None),
        ("elsewhere", "r-1", "mistral", None),
        ("inner", "r-2", "mistral", "j-1"),
        ("last", "r-1", "said otherwise", None),
        ("after", None, None, None),
    ]


def test_json_logs_are_one_object_a_line() -> None:
    """Machines read level, time, message, fields, and whose line it is."""
    stream = io.StringIO()
    configure_logs(log_format="json", stream=stream)
    structlog.get_logger().warning("status changed", run_id="r-1", step=3, train_tokens=7)
    logging.getLogger("third.party").warning("slow\nvery slow")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["event"] == "status changed"
    assert (first["level"], first["run_id"], first["step"]) == ("warning", "r-1", 3)
    assert first["train_tokens"] == 7
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["logger"]) == ("slow\nvery slow", "third.party")


def test_the_level_limits_both_loggers() -> None:
    """What is below it is not written."""
    stream = io.StringIO()
    configure_logs(level="error", stream=stream)
    structlog.get_logger().warning("hidden")
    logging.getLogger("third.party").warning("hidden")
    structlog.get_logger().error("shown")
    assert "hidden" not in stream.getvalue()
    assert "shown" in stream.getvalue()


def test_a_low_level_is_for_this_package_alone() -> None:
    """Debug lines of the libraries below would bury ours; lower their own level to see them."""
    stream = io.StringIO()
    configure_logs(level="debug", stream=stream)
    get_logger().debug("shown")
    logging.getLogger("third.party").info("hidden")
    assert "hidden" not in stream.getvalue()
    assert "shown" in stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_no_colours() -> None:
    """Files hold text, not control characters."""
    stream = io.StringIO()
    configure_logs(stream=stream)
    structlog.get_logger().error("x", a=1)
    assert "\x1b" not in stream.getvalue()


def test_a_program_that_configured_nothing_gets_no_output() -> None:
    """Standard output and standard error belong to it."""
    program = """
import training_backends
from training_backends.core.logging import bound, get_logger
log = get_logger(backend="x")
with bound(run_id="r"):
    for say in (log.debug, log.info, log.warning, log.error, log.exception):
        say("event", reason="why")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("", "")
