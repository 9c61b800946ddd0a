"""The server that tests rely on does what it is told."""

import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected

import pytest

from tests.waiting import wait_until
from training_backends.testing.faults import (
    CutAnswer,
    Disturbance,
    DropRequest,
    Fault,
    HangAnswer,
    LoseAnswer,
    OtherAnswer,
    disturbance,
)
from training_backends.testing.server import FormPart, LoopbackServer, Received, StubReply


class Counter:
    """Counts what was carried out."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, request: Received) -> StubReply:
        """Carry a request out."""
        if request.path == "/broken":
            raise ValueError("a mistake in the script")
        self.done += 1
        return StubReply(content=b'{"ok": true}')


@pytest.fixture
def counter() -> Counter:
    """Return a counter."""
    return Counter()


@pytest.fixture
def server(counter: Counter) -> Iterator[LoopbackServer]:
    """Serve the counter."""
    with LoopbackServer(counter) as server:
        yield server


def ask(server: LoopbackServer, method: str = "GET", path: str = "/a") -> tuple[int, bytes]:
    """Send one request over its own connection."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_requests_and_connections_are_counted(server: LoopbackServer, counter: Counter) -> None:
    """Each request is kept as it came, and each connection counted."""
    ask(server, path="/a?x=1&x=2")
    ask(server, "POST", "/b%20c")
    assert [(r.method, r.path, r.query) for r in server.requests] == [
        ("GET", "/a", [("x", "1"), ("x", "2")]),
        ("POST", "/b c", []),
    ]
    assert (server.connections, counter.done) == (2, 2)


def test_lost_answer_is_carried_out(server: LoopbackServer, counter: Counter) -> None:
    """A lost answer leaves its effect; a dropped request leaves none."""
    server.fail(LoseAnswer())
    with pytest.raises(RemoteDisconnected):
        ask(server)
    assert counter.done == 1
    server.fail(DropRequest())
    with pytest.raises(RemoteDisconnected):
        ask(server)
    assert counter.done == 1


def test_cut_answer_ends_early(server: LoopbackServer) -> None:
    """A cut answer announces more than it holds."""
    server.fail(CutAnswer(after=4))
    with pytest.raises(IncompleteRead):
        ask(server)


def test_faults_choose_their_requests(server: LoopbackServer) -> None:
    """A fault waits for the request that it is meant for, and for its turn."""
    server.fail(OtherAnswer(status=500), method="POST", path="/jobs", skip=1, times=2)
    answers = [ask(server, "POST", "/v1/jobs")[0] for _ in range(4)]
    assert [ask(server, "GET", "/v1/jobs")[0], *answers] == [200, 200, 500, 500, 200]


def test_form_is_read_in_any_order() -> None:
    """The file may come first, with quotes and any bytes; a name is not decoded beyond that."""
    received: list[list[FormPart]] = []

    def keep(request: Received) -> StubReply:
        received.append(request.form())
        return StubReply()

    body = (
        b'--a b\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="file"; '
        b'filename="1%2B1=%22\xc3\xa9.jsonl"\r\n\r\n--a\r\n\r\n\x00\r\n'
        b'--a b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--a b--\r\n'
    )
    with LoopbackServer(keep) as server:
        for content in (body, iter([body[:9], body[9:]])):  # the second is sent in chunks
            connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
            kind = {"Content-Type": 'multipart/form-data; boundary="a b"'}
            connection.request("POST", "/", content, kind)
            assert connection.getresponse().status == 200
            connection.close()
        ask(server)
    parts = [
        FormPart(name="file", filename='1%2B1="é.jsonl', content=b"--a\r\n\r\n\x00"),
        FormPart(name="purpose", filename=None, content=b"fine-tune"),
    ]
    assert received == [parts, parts, []]


def test_hanging_request_ends_when_the_server_heals(
    server: LoopbackServer, counter: Counter
) -> None:
    """A request hangs on an open connection until `heal`; it was carried out."""
    server.fail(HangAnswer())
    connection = HTTPConnection("127.0.0.1", server.port, timeout=0.1)
    connection.request("GET", "/a")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    wait_until(lambda: (counter.done, server.open_connections) == (1, 1))
    server.heal()
    connection.close()
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("lose", LoseAnswer()),
        ("drop", DropRequest()),
        ("hang", HangAnswer()),
    ],
)
def test_disturbances_are_faults(kind: Disturbance, fault: Fault) -> None:
    """Each kind of disturbance is a fault; an error response repeats the given text."""
    assert disturbance(kind) == fault
    page, error = disturbance("html"), disturbance(403, echo="the-key")
    assert isinstance(page, OtherAnswer)
    assert (page.status, page.done, page.content_type) == (200, True, "text/html")
    assert isinstance(error, OtherAnswer)
    assert error.status == 403
    assert b"the-key" in error.content()


def test_healed_server_answers(server: LoopbackServer) -> None:
    """After healing nothing breaks any more."""
    server.fail(OtherAnswer(status=500), times=9)
    server.heal()
    assert ask(server) == (200, b'{"ok": true}')


def test_mistake_in_a_script_is_shown(server: LoopbackServer) -> None:
    """A script that raises answers 500 with its traceback, so that the test sees it."""
    status, body = ask(server, path="/broken")
    assert status == 500
    assert b"a mistake in the script" in body


def test_server_can_be_started_again(server: LoopbackServer) -> None:
    """A stopped server refuses, and started again on its port it answers."""
    port = server.port
    server.stop()
    with pytest.raises(RuntimeError):
        _ = server.port
    server.start(port)
    assert ask(server)[0] == 200


def test_testing_needs_no_pytest() -> None:
    """The parts for other people's tests import without pytest and without the gateway's extra."""
    modules = ("conformance", "faults", "journal", "openai_provider", "provider", "server")
    code = "import sys\n" + "\n".join(f"import training_backends.testing.{m}" for m in modules)
    code += "\nprint({'pytest', 'starlette', 'fastapi', 'uvicorn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
