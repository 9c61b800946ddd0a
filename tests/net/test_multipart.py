"""Uploads: streamed, announced, verified, and never in the way of the loop."""

import hashlib
import os
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio.to_thread
import pytest
from blockbuster import BlockingError, blockbuster_ctx

from training_backends import DatasetError, PayloadTooLarge
from training_backends.net.client import HttpClient
from training_backends.net.multipart import CHUNK_BYTES, FileUpload, hash_file
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.provider import read_form
from training_backends.testing.server import LoopbackServer

pytestmark = pytest.mark.anyio
LARGE = 64 * 2**20


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
    digest, size = await hash_file(large_file)
    await client.json("GET", "/warm-up")
    tracemalloc.start()
    try:
        await client.upload("/v1/files", FileUpload(large_file, fields={}, sha256=digest))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == LARGE
    assert int(server.requests[-1].headers["content-length"]) > LARGE
    assert peak < 10 * 2**20  # the server's thread included


async def test_loop_is_not_blocked(
    client: HttpClient, server: LoopbackServer, large_file: Path
) -> None:
    """While a file is hashed and sent, the event loop itself reads nothing."""
    await client.json("GET", "/warm-up")
    with blockbuster_ctx("training_backends.net"):
        digest, _ = await hash_file(large_file)
        await client.upload("/v1/files", FileUpload(large_file, fields={}, sha256=digest))


async def test_blocking_read_would_be_noticed(
    client: HttpClient, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector of the test above does see the same upload read in the loop."""
    await client.json("GET", "/warm-up")

    async def here(function: Callable[..., object], *args: object) -> object:
        return function(*args)

    monkeypatch.setattr(anyio.to_thread, "run_sync", here)
    with blockbuster_ctx("training_backends.net"), pytest.raises(BlockingError):
        await client.upload("/v1/files", FileUpload(large_file, fields={}))


@pytest.mark.parametrize("new_size", [100, LARGE + 1])
async def test_file_that_changes_size_is_not_sent(
    new_size: int, client: HttpClient, server: LoopbackServer, large_file: Path
) -> None:
    """A file cut or grown during the upload is an error, and the request stays incomplete."""

    def change(done: int, total: int) -> None:
        os.truncate(large_file, new_size)

    with pytest.raises(DatasetError, match="changed while it was uploaded") as caught:
        await client.upload("/v1/files", FileUpload(large_file, fields={}, on_progress=change))
    assert caught.value.issues[0].code == "file_changed"
    assert server.requests == []


async def test_file_with_other_content_is_not_sent(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A file rewritten in the same length since it was checked is an error."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"checked")
    digest, _ = await hash_file(path)
    path.write_bytes(b"CHANGED")
    with pytest.raises(DatasetError, match="not what was checked"):
        await client.upload("/v1/files", FileUpload(path, fields={}, sha256=digest))
    assert digest == hashlib.sha256(b"checked").hexdigest()
    assert server.requests == []


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
def slow_server() -> Iterator[str]:
    """Read about 3 MB/s of one upload, then answer it."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            got = b""
            while b"\r\n\r\n" not in got:
                got += connection.recv(65536)
            head, _, body = got.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            left = length - len(body)
            while left > 0:
                left -= len(connection.recv(min(left, 65536), socket.MSG_WAITALL))
                time.sleep(0.02)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


async def test_an_upload_is_not_cut_off_while_bytes_flow(
    make_client: Callable[..., HttpClient], tmp_path: Path
) -> None:
    """It may take much longer than any other call, and than one write."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (6 * 2**20))
    with slow_server() as url:
        slow = make_client(url, call_timeout=1.0, write_timeout=0.05)
        began = time.monotonic()
        assert await slow.upload("/v1/files", FileUpload(path, fields={})) == {}
        assert time.monotonic() - began > 1.0
        await slow.aclose()


async def test_a_file_is_sent_in_small_pieces(tmp_path: Path) -> None:
    """A piece must leave within the write timeout, on a slow line too."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * (CHUNK_BYTES + 5))
    upload = FileUpload(path, fields={})
    length = int((await upload.headers())["Content-Length"])
    pieces = [len(piece) async for piece in upload.stream(length)]
    assert sum(pieces) == length
    assert max(pieces) <= 65536
