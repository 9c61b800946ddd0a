"""Uploads: streamed, announced, verified, and never in the way of the loop."""

import hashlib
import os
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from blockbuster import BlockingError, blockbuster_ctx

from training_backends import BackendUnavailable, DatasetError, PayloadTooLarge
from training_backends.core.files import settled_stamp
from training_backends.http.client import HttpClient
from training_backends.http.upload import (
    CHUNK_BYTES,
    FileUpload,
    HashedFile,
    hash_file,
    hash_parts,
)
from training_backends.testing.faults import LoseAnswer, OtherAnswer, SlowAnswer
from training_backends.testing.provider import read_form
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio
LARGE = 64 * 2**20
IMPATIENT = {"call_timeout": 0.6, "write_timeout": 0.6, "attempts": 1}


@pytest.fixture
async def client(make_client: Callable[..., HttpClient]) -> AsyncGenerator[HttpClient, None]:
    """Make a client, and close it in the end."""
    made = make_client()
    yield made
    await made.aclose()


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """Make a sparse file of 64 MiB."""
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


async def test_form_is_what_real_clients_send(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """Fields come first and in order, the file is an octet stream, the length is announced."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    upload = FileUpload(
        path, fields={"expiry": "24", "purpose": "fine-tune"}, filename='é"x".jsonl'
    )
    await client.upload("/v1/files", upload)
    request = server.requests[0]
    assert int(request.headers["content-length"]) == len(request.body)
    assert "transfer-encoding" not in request.headers
    assert request.body.count(b"application/octet-stream") == 1
    found, filename, content = read_form(request)
    assert list(found.items()) == [("expiry", "24"), ("purpose", "fine-tune")]
    assert (filename, content) == ('é"x".jsonl', b'{"a": 1}\n')


@pytest.fixture
def settled_file(tmp_path: Path) -> Path:
    """A file so old that its stamp tells of every later write."""
    path = tmp_path / "settled.jsonl"
    path.write_bytes(b"checked")
    assert settled_stamp(path, wait=True)
    return path


async def test_progress_goes_up_to_the_end(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """Progress counts the file's bytes, chunk by chunk, up to all of them."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES + 5))
    told: list[tuple[int, int]] = []
    upload = FileUpload(path, fields={}, on_progress=lambda *step: told.append(step))
    await client.upload("/v1/files", upload)
    total = 2 * CHUNK_BYTES + 5
    assert told == [(CHUNK_BYTES, total), (2 * CHUNK_BYTES, total), (total, total)]


async def test_whole_file_is_never_in_memory(
    client: HttpClient, server: LoopbackServer, large_file: Path
) -> None:
    """Uploading 64 MiB takes a few MiB of memory, hashing it included."""
    hashed = await hash_file(large_file)
    await client.json("GET", "/warm-up")
    tracemalloc.start()
    try:
        await client.upload("/v1/files", FileUpload(large_file, fields={}, hashed=hashed))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert hashed.size == LARGE
    assert int(server.requests[-1].headers["content-length"]) > LARGE
    assert peak < 10 * 2**20  # the server's thread included


async def test_loop_is_not_blocked(
    client: HttpClient, server: LoopbackServer, large_file: Path
) -> None:
    """While a file is hashed and sent, the event loop itself reads nothing."""
    await client.json("GET", "/warm-up")
    with blockbuster_ctx("training_backends.http"):
        hashed = await hash_file(large_file)
        await client.upload("/v1/files", FileUpload(large_file, fields={}, hashed=hashed))


async def test_blocking_read_would_be_noticed(
    client: HttpClient, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector of the test above does see the same upload read in the loop."""
    await client.json("GET", "/warm-up")

    async def here(function: Callable[..., object], *args: object) -> object:
        return function(*args)

    monkeypatch.setattr(anyio.to_thread, "run_sync", here)
    with blockbuster_ctx("training_backends.http"), pytest.raises(BlockingError):
        await client.upload("/v1/files", FileUpload(large_file, fields={}))


@pytest.mark.parametrize("new_size", [100, LARGE + 1])
async def test_file_that_changes_size_is_not_sent(
    new_size: int, client: HttpClient, server: LoopbackServer, large_file: Path
) -> None:
    """A file cut or grown during the upload is an error, and the request stays incomplete."""

    def change(done: int, total: int) -> None:
        os.truncate(large_file, new_size)

    with pytest.raises(DatasetError, match="changed during the upload") as caught:
        await client.upload("/v1/files", FileUpload(large_file, fields={}, on_progress=change))
    assert caught.value.issues[0].code == "file_changed"
    assert server.requests == []


async def test_file_with_other_content_is_not_sent(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A file rewritten in the same length since it was checked is an error."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"checked")
    hashed = await hash_file(path)
    path.write_bytes(b"CHANGED")
    with pytest.raises(DatasetError, match="differs from when it was checked"):
        await client.upload("/v1/files", FileUpload(path, fields={}, hashed=hashed))
    assert hashed.sha256 == hashlib.sha256(b"checked").hexdigest()
    assert server.requests == []


async def test_a_settled_file_written_to_is_not_sent(
    client: HttpClient, server: LoopbackServer, settled_file: Path
) -> None:
    """One that was left alone for a while is known by its stamp; any write changes that."""
    hashed = await hash_file(settled_file)
    before = settled_file.stat()
    settled_file.write_bytes(b"CHANGED")
    # What a tool does that keeps times when it copies.
    os.utime(settled_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DatasetError, match="differs from when it was checked"):
        await client.upload("/v1/files", FileUpload(settled_file, fields={}, hashed=hashed))
    assert server.requests == []


def part_of(path: Path, start: int, size: int) -> HashedFile:
    """Describe a part of a file."""
    content = path.read_bytes()[start : start + size]
    return HashedFile(hashlib.sha256(content).hexdigest(), size, start)


@pytest.mark.parametrize(("start", "size"), [(0, 5), (5, 2 * CHUNK_BYTES), (7, 3)])
async def test_a_part_is_sent_by_itself(
    start: int, size: int, client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """Of a part of a file nothing else is read or announced; its progress is its own."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(os.urandom(2 * CHUNK_BYTES + 20))
    told: list[tuple[int, int]] = []
    upload = FileUpload(
        path,
        fields={},
        hashed=part_of(path, start, size),
        on_progress=lambda *step: told.append(step),
    )
    await client.upload("/v1/files", upload)
    (request,) = server.requests
    assert int(request.headers["content-length"]) == len(request.body)
    assert read_form(request)[2] == path.read_bytes()[start : start + size]
    assert told[-1] == (size, size)


@pytest.mark.parametrize("change", [b"0123CHANGED", b"0123"])
async def test_a_part_that_changed_is_not_sent(
    change: bytes, client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """Rewritten or cut off, a part is held against its hash before its upload is complete."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"0123checked")
    hashed = part_of(path, 4, 7)
    path.write_bytes(change)
    with pytest.raises(DatasetError, match="changed during the upload"):
        await client.upload("/v1/files", FileUpload(path, fields={}, hashed=hashed))
    assert server.requests == []


async def test_a_part_stays_as_it_is_though_the_file_grows(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """What is written behind a part is none of it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"0123checked")
    hashed = part_of(path, 4, 7)
    path.write_bytes(b"0123checked and more")
    await client.upload("/v1/files", FileUpload(path, fields={}, hashed=hashed))
    assert read_form(server.requests[0])[2] == b"checked"


async def test_parts_cover_the_file(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """Each has its own hash, the last one is smaller, and they are sent under any field's name."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(os.urandom(2 * CHUNK_BYTES + 20))
    parts = await hash_parts(path, await hash_file(path), CHUNK_BYTES)
    assert parts == [
        part_of(path, 0, CHUNK_BYTES),
        part_of(path, CHUNK_BYTES, CHUNK_BYTES),
        part_of(path, 2 * CHUNK_BYTES, 20),
    ]
    for part in parts:
        await client.upload("/v1/parts", FileUpload(path, fields={}, field="data", hashed=part))
    sent = [part for request in server.requests for part in request.form()]
    assert {part.name for part in sent} == {"data"}
    assert b"".join(part.content for part in sent) == path.read_bytes()


async def test_parts_of_another_content_are_not_hashed(tmp_path: Path) -> None:
    """A file that was rewritten since is not mixed with what was checked."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"checked")
    hashed = await hash_file(path)
    path.write_bytes(b"changed")
    with pytest.raises(DatasetError, match="changed during the upload"):
        await hash_parts(path, hashed, 4)
    with pytest.raises(DatasetError, match="cannot be read"):
        await hash_parts(tmp_path / "none", hashed, 4)


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "empty.jsonl"])
async def test_unusable_file_is_named(
    name: str, client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A file that is missing, a directory or empty is an error before anything is sent."""
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DatasetError) as caught:
        await client.upload("/v1/files", FileUpload(tmp_path / name, fields={}))
    assert caught.value.issues[0].path == str(tmp_path / name)
    assert server.requests == []


async def test_changed_key_sends_the_file_again(
    client: HttpClient, server: LoopbackServer, tmp_path: Path, keys: object
) -> None:
    """After a 401 with a new key at hand the whole file goes out a second time."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    await client.json("GET", "/a")
    server.fail(OtherAnswer(status=401, body={}))
    keys.value = "second-key"  # type: ignore[attr-defined]
    assert await client.upload("/v1/files", FileUpload(path, fields={})) == {"ok": True}
    assert [read_form(request)[2] for request in server.asked("POST")] == [b"content"] * 2


async def test_refused_size_is_said(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A 413 becomes PayloadTooLarge, with what to do."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    server.fail(OtherAnswer(status=413, body={"detail": "too large"}))
    with pytest.raises(PayloadTooLarge) as caught:
        await client.upload("/v1/files", FileUpload(path, fields={}))
    assert "Split" in str(caught.value.hint)


@contextmanager
def slow_server(lost: int = 0, pause: float = 0.02, step: int = 65536) -> Iterator[str]:
    """Read about 3 MB/s of one upload after the other, then answer it.

    Args:
        lost: How many are not answered but cut off.
    """

    def serve() -> None:
        for number in range(lost + 1):
            connection, _ = listener.accept()
            with connection:
                try:
                    swallow(connection)
                except OSError:
                    return  # given up on
                if number == lost:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def swallow(connection: socket.socket) -> None:
        got = b""
        while b"\r\n\r\n" not in got:
            got += connection.recv(65536)
        head, _, body = got.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        left = length - len(body)
        while left > 0:
            taken = len(connection.recv(min(left, step), socket.MSG_WAITALL))
            if not taken:
                raise ConnectionResetError
            left -= taken
            if over.wait(pause):
                raise ConnectionResetError

    over = threading.Event()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join(10)


async def test_an_upload_is_not_cut_off_while_bytes_flow(
    make_client: Callable[..., HttpClient], tmp_path: Path
) -> None:
    """It may take much longer than any other call, and than one write."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (6 * 2**20))
    with slow_server() as url:
        slow = make_client(url, call_timeout=1.5, write_timeout=0.05)
        began = time.monotonic()
        assert await slow.upload("/v1/files", FileUpload(path, fields={})) == {}
        assert time.monotonic() - began > 1.5
        await slow.aclose()


async def test_a_file_is_sent_in_pieces(tmp_path: Path) -> None:
    """A piece is small enough to leave in time on a slow line, and not to hold up the loop."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (CHUNK_BYTES + 5))
    upload = FileUpload(path, fields={})
    length = int((await upload.headers())["Content-Length"])
    pieces = [len(piece) async for piece in upload.stream(length)]
    assert sum(pieces) == length
    assert max(pieces) == CHUNK_BYTES <= 2**20


async def test_reader_ends_with_the_upload(large_file: Path) -> None:
    """An upload that ends early leaves neither a thread nor an open file behind."""
    upload = FileUpload(large_file, fields={})
    length = int((await upload.headers())["Content-Length"])
    async with aclosing(upload.stream(length)) as stream:
        await anext(stream)
        assert len(readers()) == 1
    assert readers() == []
    assert str(large_file) not in {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}


def readers() -> list[threading.Thread]:
    """Return the threads that read files to be uploaded."""
    return [thread for thread in threading.enumerate() if thread.name == "upload-reader"]


async def test_lost_answer_is_not_sent_again_unasked(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A file that may have arrived is sent a second time only if the caller says so."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    server.fail(LoseAnswer(), times=2)
    with pytest.raises(BackendUnavailable) as caught:
        await client.upload("/v1/files", FileUpload(path, fields={}))
    assert caught.value.sent is True
    assert len(server.requests) == 1
    again = FileUpload(path, fields={})
    assert await client.upload("/v1/files", again, repeatable=True) == {"ok": True}
    assert [read_form(request)[2] for request in server.requests] == [b"content"] * 3


async def test_content_is_checked_at_each_attempt(
    client: HttpClient,
    server: LoopbackServer,
    tmp_path: Path,
    answer_by: Callable[[Callable[[Received], StubReply]], None],
) -> None:
    """A file that changed between two attempts is not sent the second time."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"checked")
    hashed = await hash_file(path)

    def answer(_: Received) -> StubReply:
        path.write_bytes(b"CHANGED")
        return StubReply()

    answer_by(answer)
    server.fail(LoseAnswer())
    upload = FileUpload(path, fields={}, hashed=hashed)
    with pytest.raises(DatasetError, match="differs from when it was checked"):
        await client.upload("/v1/files", upload, repeatable=True)
    assert len(server.requests) == 1


async def test_failed_upload_is_repeated_however_long_it_took(
    make_client: Callable[..., HttpClient], tmp_path: Path
) -> None:
    """An attempt that took longer than all pauses may take leaves the next its chance."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (6 * 2**20))
    with slow_server(lost=1) as url:
        slow = make_client(url, call_timeout=1.5)
        began = time.monotonic()
        assert await slow.upload("/v1/files", FileUpload(path, fields={}), repeatable=True) == {}
        assert time.monotonic() - began > 2.0
        await slow.aclose()


async def test_peer_that_takes_nothing_is_given_up_on(
    make_client: Callable[..., HttpClient], large_file: Path
) -> None:
    """A server that accepts the connection and then reads nothing ends the upload."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = make_client(f"http://127.0.0.1:{listener.getsockname()[1]}", **IMPATIENT)
        with anyio.fail_after(20), pytest.raises(BackendUnavailable) as caught:
            await client.upload("/v1/files", FileUpload(large_file, fields={}))
        await client.aclose()
    assert caught.value.sent is True


async def test_peer_that_hardly_takes_anything_is_given_up_on(
    make_client: Callable[..., HttpClient], large_file: Path
) -> None:
    """A server that reads a little now and then, never silent, ends the upload as well."""
    with slow_server(pause=0.05, step=64) as url:
        client = make_client(url, **IMPATIENT)
        with anyio.fail_after(20), pytest.raises(BackendUnavailable):
            await client.upload("/v1/files", FileUpload(large_file, fields={}))
        await client.aclose()


async def test_trickling_answer_to_an_upload_ends(
    make_client: Callable[..., HttpClient], server: LoopbackServer, tmp_path: Path
) -> None:
    """After the last byte the whole answer has its time, not each byte of it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    server.fail(SlowAnswer(pause=0.2))
    client = make_client(upload_timeout=0.6)
    with pytest.raises(BackendUnavailable, match="no complete response") as caught:
        await client.upload("/v1/files", FileUpload(path, fields={}))
    await client.aclose()
    assert caught.value.sent is True
