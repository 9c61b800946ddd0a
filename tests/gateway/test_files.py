"""Files over HTTP: received, listed, handed out, deleted."""

import errno
import io
import os
import time
from collections.abc import AsyncIterator
from itertools import permutations
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest
from anyio import to_thread

from tests.gateway.conftest import KEY, NO_CERTIFICATES, ROWS, Site, jsonl, site, trickle
from tests.waiting import until
from training_backends.datasets.inspect import inspect_file
from training_backends.gateway import files
from training_backends.gateway.uploads import BlobStore

pytestmark = pytest.mark.anyio

CONTENT = jsonl()
PARTS = {
    "purpose": (None, b"fine-tune"),
    "expiry": (None, b"48"),
    "visibility": (None, b"workspace"),
    "file": ("train.jsonl", CONTENT),
}


def leftovers(site: Site) -> list[Path]:
    """Return what lies where files are received."""
    return list((site.home / "gateway" / "incoming").iterdir())


def blobs(site: Site) -> list[Path]:
    """Return the contents that are kept."""
    return list((site.home / "gateway" / "files").iterdir())


def address(site: Site) -> tuple[str, int]:
    """Return where the gateway listens."""
    host, port = site.served.url.removeprefix("http://").split(":")
    return host, int(port)


def upload_head(site: Site) -> bytes:
    """Return the beginning of an upload of five million bytes."""
    return (
        f"POST /v1/files HTTP/1.1\r\nhost: {address(site)[0]}\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: multipart/form-data; boundary=x\r\ncontent-length: 5000000\r\n\r\n"
        '--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    ).encode()


async def test_an_uploaded_file_has_all_that_clients_read(shared: Site) -> None:
    """Every required field is there, with times as integers."""
    answer = await shared.http.post("/v1/files", files={"file": ("whole.jsonl", CONTENT)})
    found = answer.json()
    assert (answer.status_code, found["object"], found["bytes"]) == (200, "file", len(CONTENT))
    assert (found["purpose"], found["sample_type"]) == ("fine-tune", "instruct")
    assert (found["source"], found["num_lines"]) == ("upload", len(ROWS))
    assert (found["mimetype"], found["visibility"]) == ("application/jsonl", "workspace")
    assert isinstance(found["created_at"], int)
    assert found["expires_at"] is None
    assert found["signature"]


@pytest.mark.parametrize("order", list(permutations(PARTS))[::5])
async def test_parts_may_come_in_any_order(shared: Site, order: tuple[str, ...]) -> None:
    """Each SDK writes its form in an order of its own."""
    parts = {**PARTS, "file": (f"{'-'.join(order)}.jsonl", CONTENT)}
    answer = await shared.http.post("/v1/files", files=[(name, parts[name]) for name in order])
    found = answer.json()
    assert (answer.status_code, found["visibility"]) == (200, "workspace")
    assert found["expires_at"] == pytest.approx(time.time() + 48 * 3600, abs=60)


async def test_the_same_name_and_content_again_is_the_same_file(here: Site) -> None:
    """An upload can be repeated after its answer was lost."""
    first = await here.upload()
    assert await here.upload() == first
    assert await here.upload(name="other.jsonl") != first
    assert await here.upload(jsonl(ROWS[:2])) != first
    assert len(blobs(here)) == 2


async def test_text_samples_are_seen_as_pretrain(shared: Site) -> None:
    """The type of the samples comes from the content."""
    file_id = await shared.upload(jsonl([{"text": "Once upon a time."}]))
    found = (await shared.http.get(f"/v1/files/{file_id}")).json()
    assert (found["sample_type"], found["deleted"]) == ("pretrain", False)


async def test_what_comes_back_is_what_was_sent(shared: Site) -> None:
    """The content is streamed as it was uploaded."""
    file_id = await shared.upload()
    answer = await shared.http.get(f"/v1/files/{file_id}/content")
    assert answer.content == CONTENT
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_a_signed_link_works_without_a_key(shared: Site) -> None:
    """The link alone is enough, and a changed one is not."""
    file_id = await shared.upload()
    url = (await shared.http.get(f"/v1/files/{file_id}/url?expiry=2")).json()["url"]
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        assert (await anybody.get(url)).content == CONTENT
        changed = url[:-1] + ("0" if url[-1] != "0" else "1")
        assert (await anybody.get(changed)).status_code == 403
        later = url.replace("expires=", "expires=9")
        assert (await anybody.get(later)).status_code == 403


async def test_a_link_ends_with_its_time(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the hours asked for, the link is refused."""
    file_id = await here.upload()
    url = (await here.http.get(f"/v1/files/{file_id}/url?expiry=1")).json()["url"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert (await here.http.get(url)).status_code == 403


async def test_a_deleted_file_is_gone(here: Site) -> None:
    """Its id is unknown and its bytes are removed."""
    file_id = await here.upload()
    answer = await here.http.delete(f"/v1/files/{file_id}")
    assert answer.json() == {"id": file_id, "object": "file", "deleted": True}
    for path in ("", "/content", "/url"):
        assert (await here.http.get(f"/v1/files/{file_id}{path}")).status_code == 404
    assert (await here.http.delete(f"/v1/files/{file_id}")).status_code == 404
    assert blobs(here) == []


async def test_bytes_stay_while_another_name_refers_to_them(shared: Site) -> None:
    """Contents are shared; deleting one name must not take them from the other."""
    first, second = await shared.upload(), await shared.upload(name="other.jsonl")
    await shared.http.delete(f"/v1/files/{first}")
    assert (await shared.http.get(f"/v1/files/{second}/content")).content == CONTENT


async def test_bytes_stay_while_a_job_needs_them(here: Site) -> None:
    """A file deleted before its job was started is still there for the job."""
    file_id = await here.upload()
    job = await here.create(files=[file_id])
    await here.until(job["id"], "VALIDATED")
    await here.http.delete(f"/v1/files/{file_id}")
    assert len(blobs(here)) == 1
    await here.http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    await until(lambda: not blobs(here))


async def test_an_expired_file_is_gone(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expiry is a number of hours."""
    file_id = await here.upload(expiry="1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert (await here.http.get(f"/v1/files/{file_id}")).status_code == 404
    assert (await here.http.get("/v1/files")).json()["total"] == 0


async def test_the_bytes_of_an_expired_file_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anybody asking for it."""
    monkeypatch.setattr(files, "SWEEP_EVERY", 0.02)
    async with site(tmp_path) as here:
        await here.upload(expiry="1")
        kept = await here.upload(name="kept.jsonl", content=jsonl(ROWS[:1]))
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3601)
        await until(lambda: len(blobs(here)) == 1)
        assert (await here.http.get(f"/v1/files/{kept}")).status_code == 200


async def test_an_upload_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    """The client hears why, and nothing is left."""
    async with (
        site(tmp_path / "home", upload_timeout=0.1) as here,
        await anyio.connect_tcp(*address(here)) as stream,
    ):
        await stream.send(upload_head(here) + b"a" * 1000)
        answer = await stream.receive()
        assert b" 408 " in answer.splitlines()[0]
        assert b"No data arrived for 0.1 s" in answer
        assert leftovers(here) == []


async def test_an_upload_that_only_trickles_is_given_up(tmp_path: Path) -> None:
    """Never silent for long, it still has to make the least rate on the whole."""
    async with (
        site(tmp_path / "home", upload_timeout=0.3, min_upload_rate=1e6) as here,
        await anyio.connect_tcp(*address(here)) as stream,
        anyio.create_task_group() as tasks,
    ):
        await stream.send(upload_head(here))
        tasks.start_soon(trickle, stream)
        with anyio.fail_after(20):
            answer = await stream.receive()
        tasks.cancel_scope.cancel()
    assert b" 408 " in answer.splitlines()[0]
    assert b"slower than 1e+06 bytes/s" in answer
    assert leftovers(here) == []


async def test_every_filter_of_the_list(here: Site) -> None:
    """Each filter keeps what fits and leaves out what does not."""
    chats = await here.upload(name="chats_100%.jsonl")
    text = await here.upload(jsonl([{"text": "abc"}]), "text.jsonl")
    batch = await here.upload(b'{"custom_id": "1"}\n{"custom_id": "2"}', "b.jsonl", purpose="batch")
    scan = await here.upload(b"%PDF-1.7", "scan.pdf", purpose="ocr")

    async def ids(query: str) -> set[str]:
        answer = await here.http.get(f"/v1/files?{query}")
        assert answer.status_code == 200, answer.text
        return {file["id"] for file in answer.json()["data"]}

    assert await ids("") == {chats, text, batch, scan}
    assert await ids("sample_type=pretrain&sample_type=batch_request") == {text, batch}
    assert await ids("source=upload&source=mistral") == {chats, text, batch, scan}
    assert await ids("source=repository") == set()
    assert await ids("search=CHATS") == {chats}
    assert await ids("search=100%25") == {chats}
    assert await ids("search=t_x") == set()
    assert await ids("purpose=batch") == {batch}
    assert await ids("mimetypes=application/jsonl") == {chats, text, batch}
    assert await ids("mimetypes=text/plain&mimetypes=image/png") == set()


async def test_pages_of_the_list(here: Site) -> None:
    """Newest first, counted on request."""
    made = [await here.upload(name=f"{n}.jsonl") for n in range(5)]
    first = (await here.http.get("/v1/files?page=0&page_size=2")).json()
    last = (await here.http.get("/v1/files?page=2&page_size=2&include_total=false")).json()
    assert [file["id"] for file in first["data"]] == [made[4], made[3]]
    assert (first["object"], first["total"]) == ("list", 5)
    assert [file["id"] for file in last["data"]] == [made[0]]
    assert last["total"] is None


async def test_bad_lines_are_named(shared: Site) -> None:
    """The answer has the service's shape, with a number for each line."""
    content = b'{"text": "good"}\n{"messages": [}\n\n[1]\n'
    before = blobs(shared)
    answer = await shared.http.post("/v1/files", files={"file": ("bad.jsonl", content)})
    body = answer.json()
    assert (answer.status_code, body["detail"]) == (422, "Invalid file format.")
    assert body["description"].startswith("Found 2 errors in this file")
    assert [error["line_number"] for error in body["errors"]] == [2, 4]
    assert all(error["message"] for error in body["errors"])
    assert leftovers(shared) == []
    assert blobs(shared) == before


async def test_bad_lines_come_with_what_to_do(shared: Site) -> None:
    """The message has the error and the fix that our own check reports."""
    content = jsonl([{"conversations": [{"from": "human", "value": "Hi"}]}])
    answer = await shared.http.post("/v1/files", files={"file": ("bad.jsonl", content)})
    path = shared.home / "bad.jsonl"
    await anyio.Path(path).write_bytes(content)
    _, (issue,) = await to_thread.run_sync(inspect_file, path)
    assert issue.fix
    (error,) = answer.json()["errors"]
    assert error == {
        "message": f"{issue.field}: {issue.message} ({issue.fix})",
        "line_number": 1,
    }


@pytest.mark.parametrize(
    ("files", "data", "place"),
    [
        ({"file": ("a.jsonl", b"")}, {}, ["body", "file"]),
        ({"other": ("a.jsonl", CONTENT)}, {}, ["body", "file"]),
        ({"file": (None, CONTENT)}, {}, ["body", "file"]),
        ({"file": ("a.jsonl", CONTENT)}, {"purpose": "finetune"}, ["body", "purpose"]),
        ({"file": ("a.jsonl", CONTENT)}, {"visibility": "world"}, ["body", "visibility"]),
        ({"file": ("a.jsonl", CONTENT)}, {"expiry": "soon"}, ["body", "expiry"]),
        ({"file": ("a.jsonl", CONTENT)}, {"expiry": "0"}, ["body", "expiry"]),
        ({"file": ("..", CONTENT)}, {}, ["body", "file"]),
    ],
)
async def test_an_upload_that_cannot_be_used_is_refused_by_field(
    shared: Site, files: Any, data: dict[str, str], place: list[str]
) -> None:
    """Each refusal names the part of the form."""
    answer = await shared.http.post("/v1/files", files=files, data=data)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == place
    assert leftovers(shared) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\nbroken"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 9000),
    ],
)
async def test_a_broken_form_is_refused(shared: Site, content_type: str, body: bytes) -> None:
    """What is no form, or is cut off, is a client's error and leaves nothing."""
    headers = {"content-type": content_type}
    answer = await shared.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["detail"]
    assert leftovers(shared) == []


async def test_a_name_with_folders_keeps_its_last_part(shared: Site) -> None:
    """A client's folders never matter here."""
    file_id = await shared.upload(name="../../etc/passwd.jsonl")
    found = (await shared.http.get(f"/v1/files/{file_id}")).json()
    assert found["filename"] == "passwd.jsonl"


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ("filename*=UTF-8''%e2%82%ac%20rates.jsonl", "€ rates.jsonl"),
        ("filename*=iso-8859-1'en'%A3.jsonl", "£.jsonl"),
        ("filename*=utf-16''x.jsonl", "plain.jsonl"),
        ("filename*=nonsense", "plain.jsonl"),
        ("filename*=UTF-8''..%2F..%2Fpasswd", "passwd"),
    ],
)
async def test_an_extended_file_name_is_read(shared: Site, extra: str, name: str) -> None:
    """As RFC 5987 writes one; what cannot be read leaves the plain name."""
    disposition = f'form-data; name="file"; filename="plain.jsonl"; {extra}'
    body = b"--x\r\ncontent-disposition: %s\r\n\r\n%s\r\n--x--\r\n"
    answer = await shared.http.post(
        "/v1/files",
        content=body % (disposition.encode(), CONTENT),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert (answer.status_code, answer.json()["filename"]) == (200, name)


async def test_what_follows_the_end_of_a_form_has_a_bound(shared: Site) -> None:
    """A little is ignored, more is rejected and nothing of the form is kept."""
    form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    form += CONTENT + b"\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}

    async def chunks(behind: int) -> AsyncIterator[bytes]:
        yield form
        for _ in range(behind):
            yield b"y" * 1000

    for behind, status in ((5, 200), (500, 413)):
        answer = await shared.http.post("/v1/files", content=chunks(behind), headers=headers)
        assert (answer.status_code, leftovers(shared)) == (status, [])


@pytest.mark.parametrize("declared", [True, False])
async def test_a_file_too_large_is_refused(tmp_path: Path, declared: bool) -> None:
    """By its declared size before it arrives, or once it turns out to be."""
    async with site(tmp_path, max_upload_bytes=100_000) as here:
        size = 1_000_000 if declared else 120_000
        content = b'{"text": "' + b"a" * size + b'"}\n'
        answer = await here.http.post("/v1/files", files={"file": ("a.jsonl", content)})
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["detail"]
        assert leftovers(here) == []


async def test_bytes_after_the_end_of_the_form_count_too(tmp_path: Path) -> None:
    """A form that ends early is no way to send without bound."""
    async with site(tmp_path, max_upload_bytes=100_000) as here:
        form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        form += CONTENT + b"\r\n--x--\r\n"

        async def chunks() -> Any:
            yield form
            for _ in range(20):
                yield b"a" * 10_000

        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await here.http.post("/v1/files", content=chunks(), headers=headers)
        assert answer.status_code == 413
        assert leftovers(here) == []


class FullDisk(io.RawIOBase):
    """A file on a disk with a little space."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._room = 100_000

    def write(self, data: Any) -> int:
        """Write until the disk is full."""
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def fileno(self) -> int:
        """Return the real file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the real file."""
        self._file.close()
        super().close()


async def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """The client hears what happened, and smaller files still work."""
    store = BlobStore(tmp_path / "gateway", open_file=FullDisk)  # type: ignore[arg-type]
    async with site(tmp_path, blob_store=store) as here:
        content = b'{"text": "' + b"a" * 3_000_000 + b'"}\n'
        answer = await here.http.post("/v1/files", files={"file": ("a.jsonl", content)})
        assert answer.status_code == 507
        assert "space" in answer.json()["detail"]
        assert leftovers(here) == []
        await here.upload()


async def test_an_upload_lingered_leaves_nothing(here: Site) -> None:
    """A client that goes away in mid-file is cleaned up behind."""
    async with await anyio.connect_tcp(*address(here)) as stream:
        await stream.send(upload_head(here) + b"a" * 3_000_000)
        await until(lambda: any(path.stat().st_size for path in leftovers(here)))
    await until(lambda: not leftovers(here))
    assert blobs(here) == []


async def test_what_a_crash_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    """An upload that was cut off, and bytes whose last file was deleted."""
    async with site(tmp_path) as here:
        kept = await here.upload()
        deleted = await here.upload(jsonl(ROWS[:2]))
        before = {path: path.read_bytes() for path in blobs(here)}
        await here.http.delete(f"/v1/files/{deleted}")
    for path, content in before.items():
        path.write_bytes(content)
        os.utime(path, (0, 0))
    (tmp_path / "gateway" / "incoming" / "half.part").write_bytes(b"half")
    async with site(tmp_path) as here:
        assert leftovers(here) == []
        assert len(blobs(here)) == 1
        assert (await here.http.get(f"/v1/files/{kept}/content")).content == CONTENT


@pytest.mark.parametrize("emptied", [True, False])
async def test_uploads_survive_the_loss_of_the_database(
    tmp_path: Path, logs: list[Any], emptied: bool
) -> None:
    """A new database knows none of them, which is no reason to delete them."""
    async with site(tmp_path) as here:
        for n in range(1, 4):
            await here.upload(jsonl(ROWS[:n]))
    for path in (tmp_path / "gateway").glob("runs.db*"):
        path.rename(tmp_path / path.name)
    if emptied:
        (tmp_path / "gateway" / "runs.db").touch()
    async with site(tmp_path) as here:
        assert (await here.http.get("/v1/files")).json()["total"] == 0
        assert len(blobs(here)) == 3
    assert [entry["files"] for entry in logs if "unknown to the database" in entry["event"]] == [3]
    for path in (*(tmp_path / "gateway").glob("runs.db*"),):
        path.unlink()
    for path in tmp_path.glob("runs.db*"):
        path.rename(tmp_path / "gateway" / path.name)
    async with site(tmp_path) as here:
        files = (await here.http.get("/v1/files")).json()["data"]
        codes = [(await here.http.get(f"/v1/files/{f['id']}/content")).status_code for f in files]
    assert codes == [200, 200, 200]


@pytest.mark.parametrize("lingered", [True, False])
async def test_uploads_newer_than_a_restored_database_are_kept(
    tmp_path: Path, lingered: bool
) -> None:
    """Also where the older copy knows their content as deleted, whether or not it was there."""
    async with site(tmp_path) as here:
        again = await here.upload()
        bytes_of_it = blobs(here)
        await here.http.delete(f"/v1/files/{again}")
    old = {path: path.read_bytes() for path in (tmp_path / "gateway").glob("runs.db*")}
    async with site(tmp_path) as here:
        if lingered:
            bytes_of_it[0].write_bytes(CONTENT)
            os.utime(bytes_of_it[0], (0, 0))
        await here.upload()
        await here.upload(jsonl(ROWS[:2]))
    for path in (tmp_path / "gateway").glob("runs.db*"):
        path.unlink()
    for path, content in old.items():
        path.write_bytes(content)
    async with site(tmp_path) as here:
        assert len(blobs(here)) == 2


async def test_what_the_gateway_did_not_write_is_left_alone(
    tmp_path: Path, logs: list[Any]
) -> None:
    """A stray file or directory in its state neither stops the start nor is removed."""
    async with site(tmp_path):
        pass
    root = tmp_path / "gateway"
    strays = [root / "incoming" / "notes", root / "files" / "notes", root / "incoming" / "x.part"]
    for stray in strays:
        stray.mkdir()
    (root / "incoming" / "notes.txt").write_text("mine")
    async with site(tmp_path) as here:
        await here.upload()
    assert all(stray.is_dir() for stray in strays)
    assert (root / "incoming" / "notes.txt").read_text() == "mine"
    assert sum("left in place" in entry["event"] for entry in logs) == 2


async def test_unknown_ids_are_not_found_and_other_words_are_refused(shared: Site) -> None:
    """404 for an id that nobody has, 422 for what is no id."""
    for path in ("", "/content", "/url"):
        answer = await shared.http.get(f"/v1/files/{uuid4()}{path}")
        assert (answer.status_code, answer.json()) == (
            404,
            {"detail": "No file matches the given query."},
        )
        answer = await shared.http.get(f"/v1/files/not-an-id{path}")
        assert answer.json()["detail"][0]["loc"] == ["path", "file_id"]


async def test_many_uploads_at_once_of_one_file_are_one_file(here: Site) -> None:
    """Whoever comes first, all get the same id and the bytes are there once."""
    ids: list[str] = []

    async def one() -> None:
        ids.append(await here.upload())

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(one)
    assert len(set(ids)) == 1
    assert len(blobs(here)) == 1
    assert (await here.http.get("/v1/files")).json()["total"] == 1
