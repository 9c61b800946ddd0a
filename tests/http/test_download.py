"""Downloads: whole or not at all."""

import base64
import hashlib
import os
import socket
import tarfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import pytest

from training_backends import BackendUnavailable, ProtocolError, TrainingBackendError
from training_backends.http.client import HttpClient
from training_backends.http.download import unpack
from training_backends.testing.faults import CutAnswer, OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio
CONTENT = os.urandom(300_000)
FILE = OtherAnswer(status=200, body=CONTENT, content_type="application/octet-stream")


@pytest.fixture
async def client(make_client: Callable[..., HttpClient]) -> AsyncGenerator[HttpClient, None]:
    """Make a client, and close it in the end."""
    made = make_client()
    yield made
    await made.aclose()


async def test_content_arrives(client: HttpClient, server: LoopbackServer, tmp_path: Path) -> None:
    """The file holds what was sent, its folder is made, progress ends at the total."""
    server.fail(FILE)
    told: list[tuple[int, int]] = []
    target = tmp_path / "new" / "model.bin"
    assert (
        await client.download("/x", target, on_progress=lambda *step: told.append(step)) == target
    )
    assert target.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))


async def test_broken_download_leaves_nothing(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A download that breaks every time leaves neither a file nor a part of one."""
    server.fail(CutAnswer(after=5), times=9)
    with pytest.raises(BackendUnavailable):
        await client.download("/x", tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 3


async def test_old_file_stays_until_the_new_one_is_whole(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """What lay there before is replaced by a whole download only."""
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    server.fail(CutAnswer(after=5), times=3)
    with pytest.raises(BackendUnavailable):
        await client.download("/x", target)
    assert target.read_bytes() == b"old"
    server.fail(FILE)
    await client.download("/x", target)
    assert target.read_bytes() == CONTENT


def ranged(content: bytes, tag: str) -> Callable[[Received], StubReply]:
    """Serve some content, or the end of it to a client that has its beginning."""

    def answer(request: Received) -> StubReply:
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        if request.headers.get("if-range") != tag:
            return StubReply(content=content, headers=headers)
        start = int(request.headers["range"].removeprefix("bytes=").removesuffix("-"))
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return StubReply(status=206, content=content[start:], headers=headers)

    return answer


AnswerBy = Callable[[Callable[[Received], StubReply]], None]


async def test_a_cut_download_continues_as_long_as_it_progresses(
    make_client: Callable[..., HttpClient],
    server: LoopbackServer,
    answer_by: AnswerBy,
    tmp_path: Path,
) -> None:
    """Nothing is sent twice, and attempts that brought it further are not counted."""
    content, cut = os.urandom(5 * 2**19), 2**20 + 7
    answer_by(ranged(content, '"one"'))
    server.fail(CutAnswer(after=cut), times=2)
    client = make_client(attempts=2)
    await client.download("/x", tmp_path / "model.bin")
    await client.aclose()
    assert (tmp_path / "model.bin").read_bytes() == content
    asked = [request.headers.get("range") for request in server.requests]
    assert asked == [None, f"bytes={cut}-", f"bytes={2 * cut}-"]


async def test_content_that_changed_meanwhile_is_downloaded_anew(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy, tmp_path: Path
) -> None:
    """No file is made of two versions."""
    versions = [ranged(CONTENT[::-1], '"two"'), ranged(CONTENT, '"one"')]

    def answer(request: Received) -> StubReply:
        return versions.pop()(request)

    answer_by(answer)
    server.fail(CutAnswer(after=5000))
    await client.download("/x", tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == CONTENT[::-1]


async def test_a_range_that_was_not_asked_for_is_an_error(
    client: HttpClient, answer_by: AnswerBy, tmp_path: Path
) -> None:
    """Its bytes belong elsewhere."""
    headers = {"Content-Range": "bytes 7-9/10"}
    answer_by(lambda _: StubReply(status=206, content=b"abc", headers=headers))
    with pytest.raises(ProtocolError, match=r"another part of model\.bin"):
        await client.download("/x", tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


async def test_a_download_with_another_checksum_is_repeated_and_then_given_up(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy, tmp_path: Path
) -> None:
    """From the beginning: none of it can be trusted."""
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:", "ETag": '"one"', "Accept-Ranges": "bytes"}
    contents = [CONTENT, CONTENT[::-1], *[b"other"] * 3]

    def answer(request: Received) -> StubReply:
        assert "range" not in request.headers
        return StubReply(content=contents.pop(), headers=headers)

    answer_by(answer)
    with pytest.raises(BackendUnavailable, match=r"checksum of model\.bin differs"):
        await client.download("/x", tmp_path / "model.bin")
    assert len(server.requests) == 3
    assert list(tmp_path.iterdir()) == []
    await client.download("/x", tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == CONTENT


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """Make the head of an empty file in an archive."""
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "/etc/passwd"
    return made


@pytest.mark.parametrize(
    "members",
    [
        [member("../out")],
        [member("/tmp/out")],
        [member("a/../../out")],
        [member("link", tarfile.SYMTYPE)],
        [member("link", tarfile.LNKTYPE)],
        [member("device", tarfile.CHRTYPE)],
        [member("twice"), member("twice")],
    ],
)
async def test_an_archive_stays_in_its_directory(
    members: list[tarfile.TarInfo], tmp_path: Path
) -> None:
    """And has plain files only, each once."""
    archive, target = tmp_path / "a.tar", tmp_path / "inner" / "target"
    target.mkdir(parents=True)
    with tarfile.open(archive, "w") as files:
        for each in members:
            files.addfile(each)
    with pytest.raises(ProtocolError, match=r"archive|invalid name"):
        await unpack(archive, target)
    assert [path.name for path in tmp_path.rglob("out")] == []


async def test_what_is_no_archive_is_an_error(tmp_path: Path) -> None:
    """Such as a truncated one."""
    (tmp_path / "a.tar").write_bytes(b"x" * 1000)
    with pytest.raises(ProtocolError, match="archive is invalid"):
        await unpack(tmp_path / "a.tar", tmp_path)


async def test_unwritable_target_is_said(client: HttpClient, tmp_path: Path) -> None:
    """A target that cannot be written is an error that names it and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(TrainingBackendError, match=r"Cannot write .*file/model\.bin"):
        await client.download("/x", tmp_path / "file" / "model.bin")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"])
async def test_trickling_download_ends(
    head: bytes, make_client: Callable[..., HttpClient], tmp_path: Path
) -> None:
    """A download of which a byte comes now and then, never silent, is given up on."""
    with trickle(head, piece=b"X", pause=0.05) as url:
        client = make_client(url, call_timeout=0.5, attempts=1)
        with anyio.fail_after(20), pytest.raises(BackendUnavailable, match=r"within 0\.5 s"):
            await client.download("/x", tmp_path / "model.bin")
        await client.aclose()
    assert list(tmp_path.iterdir()) == []


async def test_download_is_not_cut_off_while_bytes_flow(
    make_client: Callable[..., HttpClient], tmp_path: Path
) -> None:
    """It may take longer than any other call."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (24 * 2**18)
    with trickle(head, piece=b"X" * 2**18, pause=0.05) as url:
        client = make_client(url, call_timeout=1.0, attempts=1)
        began = time.monotonic()
        target = await client.download("/x", tmp_path / "model.bin")
        await client.aclose()
    assert time.monotonic() - began > 1.0
    assert target.stat().st_size == 24 * 2**18


@contextmanager
def trickle(head: bytes, piece: bytes, pause: float) -> Iterator[str]:
    """Answer one request with `head` and then a piece at a time, until the client hangs up."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while True:
                connection.sendall(piece)
                time.sleep(pause)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
