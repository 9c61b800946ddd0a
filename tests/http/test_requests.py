"""Any key, any document, any status: what adapters of other protocols need of the client."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr

from training_backends import (
    BackendUnavailable,
    ConfigError,
    DatasetError,
    ProtocolError,
    RateLimited,
    RunNotFound,
)
from training_backends.http.auth import KeyHeader, UnsignedRequest
from training_backends.http.client import HttpClient
from training_backends.http.upload import FileBody, FileUpload, hash_file
from training_backends.http.urls import path_segment
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

AnswerBy = Callable[[Callable[[Received], StubReply]], None]
SECRET = "signed-0123456789"


async def key() -> SecretStr:
    """Return a key."""
    return SecretStr("the-key-0123456789")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 200_000)
    return path


@pytest.mark.parametrize(
    ("header", "name", "value"),
    [
        (KeyHeader(), "authorization", "Bearer the-key-0123456789"),
        (KeyHeader.named("api-key"), "api-key", "the-key-0123456789"),
        (KeyHeader(prefix="Token "), "authorization", "Token the-key-0123456789"),
    ],
)
async def test_the_key_goes_into_any_header(
    server: LoopbackServer, header: KeyHeader, name: str, value: str
) -> None:
    """The header of the key is set by the client alone: none of a call replaces it."""
    client = HttpClient(server.base_url, key=key, key_header=header, headers={name.title(): "x"})
    await client.json("GET", "/a", headers={name.upper(): "y"})
    await client.aclose()
    assert server.requests[0].headers[name] == value


async def test_no_key_is_sent_without_one(server: LoopbackServer) -> None:
    """A server that needs no key gets none."""
    client = HttpClient(server.base_url)
    await client.json("GET", "/a")
    await client.aclose()
    assert "authorization" not in server.requests[0].headers


async def test_each_attempt_is_signed(server: LoopbackServer, file: Path) -> None:
    """A signer sees what will be sent, again for a retry, and what it adds is sent."""
    seen: list[UnsignedRequest] = []

    async def sign(request: UnsignedRequest) -> Mapping[str, str]:
        seen.append(request)
        return {"Authorization": f"{SECRET}-{len(seen)}"}

    client = HttpClient(server.base_url, sign=sign, query=[("v", "1")], headers={"X-Org": "o"})
    server.fail(OtherAnswer(status=503))
    await client.json("GET", "/a", query=[("q", "a b")])
    await client.send("POST", "/b", content=b"raw", headers={"Content-Type": "text/csv"})
    await client.send_file("PUT", "/c", FileBody(file, hashed=await hash_file(file)))
    server.fail(OtherAnswer(status=500, body=f"cannot read {SECRET}-5"), times=9)
    with pytest.raises(BackendUnavailable) as caught:
        await client.send("POST", "/d")
    await client.aclose()
    assert [r.headers["authorization"][-1] for r in server.requests] == ["1", "2", "3", "4", "5"]
    assert (
        seen[0].url
        == f"{server.base_url}/a?v=1&q=a+b"
        == server.base_url + server.requests[0].target
    )
    assert seen[0].headers["x-org"] == "o"
    assert seen[2].sha256 == hashlib.sha256(b"raw").hexdigest()
    assert seen[3].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert server.requests[2].headers["content-type"] == "text/csv"
    assert server.requests[3].body == file.read_bytes()
    assert SECRET not in str(caught.value)


def test_a_signer_needs_a_private_transport_too() -> None:
    """Neither key nor signature is sent to another host without TLS."""

    async def sign(request: UnsignedRequest) -> Mapping[str, str]:
        del request
        return {}

    with pytest.raises(ConfigError, match="plain HTTP"):
        HttpClient("http://example.com", sign=sign)
    with pytest.raises(ValueError, match="either"):
        HttpClient("https://example.com", key=key, sign=sign)


async def test_fixed_query_and_headers_are_defaults(server: LoopbackServer) -> None:
    """A call's own parameter or header takes the place of the fixed one."""
    client = HttpClient(server.base_url, query=[("v", "1"), ("w", "2")], headers={"X-A": "1"})
    await client.json("GET", "/a?v=9", query=[("x", "3")], headers={"x-a": "2"})
    await client.json("GET", "/a")
    await client.aclose()
    assert [r.target for r in server.requests] == ["/a?w=2&v=9&x=3", "/a?v=1&w=2"]
    assert [r.headers["x-a"] for r in server.requests] == ["2", "1"]


@pytest.mark.parametrize("path", ["a", "@evil.example/a", ".evil.example/a", ""])
async def test_a_path_cannot_name_another_host(server: LoopbackServer, path: str) -> None:
    """What is appended to the base URL begins with a slash."""
    client = HttpClient(server.base_url, key=key)
    with pytest.raises(ValueError, match="must start with /"):
        await client.json("GET", path)
    await client.aclose()
    assert server.requests == []


def test_ids_are_quoted_for_paths() -> None:
    """An id is one segment of a path, whatever is in it."""
    assert path_segment("ft:a/b?c#d") == "ft:a%2Fb%3Fc%23d"
    for nothing in ("", ".", "..", " "):
        with pytest.raises(RunNotFound):
            path_segment(nothing)


async def test_documents_of_any_shape(server: LoopbackServer, answer_by: AnswerBy) -> None:
    """Arrays and single values are read where they are expected, and only there."""
    client = HttpClient(server.base_url)
    answer_by(lambda r: StubReply(content=r.headers["x-say"].encode()))
    said = {"X-Say": "[1, 2]"}
    assert await client.json("GET", "/a", shape="array", headers=said) == [1, 2]
    assert await client.json("GET", "/a", shape="any", headers=said) == [1, 2]
    with pytest.raises(ProtocolError, match="not a JSON object"):
        await client.json("GET", "/a", headers=said)
    assert await client.json("GET", "/a", shape="any", headers={"X-Say": "3"}) == 3
    with pytest.raises(ProtocolError, match="not a JSON array"):
        await client.json("GET", "/a", shape="array", headers={"X-Say": "{}"})
    answer_by(lambda _: StubReply(status=204))
    assert await client.json("DELETE", "/a", shape="any") is None
    await client.aclose()


async def test_expected_statuses_are_no_errors(server: LoopbackServer, answer_by: AnswerBy) -> None:
    """A redirect or conflict that a protocol uses is returned, with headers and body."""
    client = HttpClient(server.base_url, key=key)
    reply = StubReply(status=302, content=b"there", headers={"Location": "https://h/x?sig=abc"})
    answer_by(lambda _: reply)
    answer = await client.send("POST", "/f", form={"a": "1&2"}, expect={302, 409})
    assert (answer.status, answer.headers["location"]) == (302, "https://h/x?sig=abc")
    assert answer.body == b"there"
    assert "sig" not in repr(answer)
    assert server.requests[0].body == b"a=1%262"
    with pytest.raises(ProtocolError, match="https://h/x") as caught:
        await client.send("POST", "/f")
    assert "abc" not in str(caught.value)
    answer_by(lambda _: StubReply())
    with pytest.raises(ProtocolError, match="200"):
        await client.send("POST", "/f", expect={302})
    with pytest.raises(ValueError, match="only one"):
        await client.send("POST", "/f", body={}, content=b"")
    await client.aclose()


@pytest.mark.parametrize("body", ["3", "null", "true", '"text"', "[]"])
async def test_an_error_may_be_any_document(server: LoopbackServer, body: str) -> None:
    """The status decides, whatever JSON the server sends with it."""
    client = HttpClient(server.base_url)
    server.fail(OtherAnswer(status=404, body=body))
    with pytest.raises(RunNotFound):
        await client.json("GET", "/a")
    await client.aclose()


async def test_an_error_that_will_not_pass_is_not_retried(server: LoopbackServer) -> None:
    """A 429 that a decoder declares final is asked for once."""
    client = HttpClient(
        server.base_url, decode_error=lambda *_: RateLimited("spent", retryable=False)
    )
    server.fail(OtherAnswer(status=429), times=9)
    with pytest.raises(RateLimited):
        await client.json("GET", "/a")
    await client.aclose()
    assert len(server.requests) == 1


# -- presigned URLs --------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[LoopbackServer]:
    with LoopbackServer(lambda _: StubReply(headers={"ETag": "e"})) as store:
        yield store


async def test_a_presigned_upload_is_private_and_checked(
    server: LoopbackServer, store: LoopbackServer, file: Path
) -> None:
    """The store gets the file, streamed, and nothing of the account; a lost answer is repeated."""
    client = HttpClient(server.base_url, key=key, headers={"X-Org": "o"}, query=[("v", "1")])
    store.fail(LoseAnswer())
    done: list[int] = []
    body = FileBody(file, hashed=await hash_file(file), on_progress=lambda d, _: done.append(d))
    url = f"{store.base_url}/b/k%20y?X-Sig=a%2Fb&n=%7E"
    answer = await client.put_file(url, body, headers={"x-ms-blob-type": "BlockBlob"})
    assert (answer.status, answer.headers["etag"]) == (200, "e")
    assert [r.target for r in store.requests] == ["/b/k%20y?X-Sig=a%2Fb&n=%7E"] * 2
    for request in store.requests:
        assert request.body == file.read_bytes()
        assert not {"authorization", "x-org"} & set(request.headers)
        assert request.headers["x-ms-blob-type"] == "BlockBlob"
    assert done[-1] == file.stat().st_size
    assert server.requests == []
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DatasetError, match="changed during the upload"):
        await client.put_file(url, body)
    await client.aclose()


@pytest.mark.parametrize(
    ("base", "url", "message"),
    [
        ("http://127.0.0.1:1", "http://example.com/x", "plain HTTP"),
        ("https://api.example.com", "https://127.0.0.1/x", "this machine"),
        ("https://api.example.com", "http://localhost:6379/x", "this machine"),
        ("https://api.example.com", "https://user:pw@example.com/x", "user name"),
        ("https://api.example.com", "file:///etc/passwd", "not an http"),
        ("https://api.example.com", "/relative", "not an http"),
        ("https://api.example.com", "https://[::1/x", "malformed"),
    ],
)
async def test_a_server_cannot_send_files_anywhere(
    base: str, url: str, message: str, file: Path
) -> None:
    """A URL given by a server is not used if it is unsafe."""
    client = HttpClient(base, key=key)
    with pytest.raises((ProtocolError, ConfigError), match=message):
        await client.put_file(url, FileBody(file))


async def test_redirects_of_a_download(
    server: LoopbackServer, store: LoopbackServer, answer_by: AnswerBy, tmp_path: Path
) -> None:
    """They are followed only if asked for, without the key, and not for ever."""
    client = HttpClient(server.base_url, key=key)
    reply = StubReply(status=307, headers={"Location": f"{store.base_url}/x"})
    answer_by(lambda _: reply)
    with pytest.raises(ProtocolError, match="redirects"):
        await client.download("/a", tmp_path / "file")
    assert store.requests == []
    await client.download("/a", tmp_path / "file", follow=True)
    assert "authorization" not in store.requests[0].headers
    again = StubReply(status=307, headers={"Location": "/a"})
    answer_by(lambda _: again)
    with pytest.raises(ProtocolError, match="too many redirects"):
        await client.download("/a", tmp_path / "other", follow=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert [("authorization" in r.headers) for r in server.requests][2:] == [True] + [False] * 5
    await client.aclose()


async def test_secrets_of_a_request_are_hidden_in_excerpts(
    server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A server that repeats what it was sent does not get it into an error."""
    client = HttpClient(server.base_url, key=key)
    answer_by(lambda r: StubReply(content=b"<p>" + r.body + r.headers["authorization"].encode()))
    token = SecretStr("hidden-0123456789")
    body = {"t": token.get_secret_value()}
    with pytest.raises(ProtocolError) as caught:
        await client.json("POST", "/a", body=body, secrets=[token])
    assert "0123456789" not in caught.value.excerpt
    await client.aclose()


class Job(BaseModel):
    id: str


async def test_a_document_is_parsed_by_a_model(
    server: LoopbackServer, answer_by: AnswerBy, file: Path
) -> None:
    """Responses to requests and uploads become models; one that does not fit is an error."""
    answer_by(lambda _: StubReply(content=b'{"id": "job-1", "more": 1}'))
    client = HttpClient(server.base_url)
    assert await client.json("GET", "/jobs/1", shape=Job) == Job(id="job-1")
    upload = FileUpload(file, fields={"purpose": "fine-tune"})
    assert await client.upload("/files", upload, shape=Job) == Job(id="job-1")
    answer_by(lambda _: StubReply(content=b'{"name": "secret-value"}'))
    with pytest.raises(ProtocolError, match="invalid Job in the response: id: ") as caught:
        await client.json("GET", "/jobs/1", shape=Job)
    assert "secret-value" not in str(caught.value)
    await client.aclose()


async def test_a_missing_document_does_not_exist(
    server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """Only the error for a missing document means that; any other is raised."""
    client = HttpClient(server.base_url)
    assert await client.exists("/files/1")
    server.fail(OtherAnswer(status=404))
    assert not await client.exists("/files/1")
    server.fail(OtherAnswer(status=400))
    with pytest.raises(ConfigError):
        await client.exists("/files/1")
    await client.aclose()
