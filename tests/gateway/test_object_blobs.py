"""Uploaded files in an object store."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.buckets import KEYS, Bucket, bucket, s3_server
from tests.gateway.conftest import NO_CERTIFICATES, ROWS, Site, jsonl, openai_client, site
from tests.waiting import until
from training_backends.core.backend import Journal
from training_backends.core.run import RunState, TrainingRun
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.objects.store import BLOCK, ObjectStore
from training_backends.testing.backend import ScriptedBackend

__all__ = ["bucket", "s3_server"]

pytestmark = pytest.mark.anyio

METRICS = base64.b64encode(b"step")[:4]
"""How the result file of a job begins."""
LARGE = jsonl([{"text": "a" * 2**16}] * (BLOCK // 2**16 * 2))
"""More than two parts of an upload."""


class Recording(ScriptedBackend):
    """Keeps the runs that it launches."""

    launched: list[TrainingRun]

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        self.launched = [*getattr(self, "launched", ()), run]
        return await super().launch(run, journal)


def stored(bucket: Bucket, url: str) -> dict[str, Any]:
    """Return the settings of a gateway with its files in a bucket."""
    return {"blobs": url, "blob_options": bucket.options}


@pytest.fixture
async def remote(bucket: Bucket, tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway with its files in a bucket."""
    async with site(tmp_path / "home", **stored(bucket, f"{bucket.url}/tb")) as opened:
        yield opened


async def content(here: Site, file_id: str, **headers: str) -> httpx.Response:
    return await here.http.get(f"/v1/files/{file_id}/content", headers=headers)


async def test_an_upload_is_one_object_named_by_its_content(remote: Site, bucket: Bucket) -> None:
    """The same content is stored once."""
    first = await remote.upload(jsonl(), "one.jsonl")
    await remote.upload(jsonl(), "two.jsonl")
    (name,) = bucket.names()
    assert (await content(remote, first)).content == jsonl() == bucket.get(name)
    assert name.startswith("tb/files/")


async def test_a_large_upload_is_sent_in_parts(remote: Site, bucket: Bucket) -> None:
    """Nothing of the transfer is left behind."""
    file_id = await remote.upload(LARGE)
    assert (await content(remote, file_id)).content == LARGE
    assert len(bucket.names()) == 1
    assert not bucket.uploads()


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=10-19", 206, slice(10, 20)),
        ("bytes=10-", 206, slice(10, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=0-", 200, slice(0, None)),
        ("bytes=99999999-", 416, slice(0)),
        ("bytes=1-2,5-6", 200, slice(0, None)),
    ],
)
async def test_ranges(remote: Site, asked: str, status: int, expected: slice) -> None:
    """A download can be continued."""
    file_id = await remote.upload()
    answer = await content(remote, file_id, range=asked)
    assert (answer.status_code, answer.content) == (status, jsonl()[expected])


async def test_the_last_reference_removes_the_object(remote: Site, bucket: Bucket) -> None:
    """Another file with the same content keeps it."""
    one, two = await remote.upload(name="one.jsonl"), await remote.upload(name="two.jsonl")
    await remote.http.delete(f"/v1/files/{one}")
    assert len(bucket.names()) == 1
    await remote.http.delete(f"/v1/files/{two}")
    assert not bucket.names()


async def test_an_invalid_file_leaves_nothing(remote: Site, bucket: Bucket) -> None:
    """Its parts are discarded."""
    files = {"file": ("bad.jsonl", LARGE + b"no json\n")}
    assert (await remote.http.post("/v1/files", files=files)).status_code == 422
    assert not bucket.names()
    assert not bucket.uploads()


async def test_a_cut_upload_leaves_nothing(remote: Site, bucket: Bucket) -> None:
    """The parts that arrived are discarded."""
    sent = anyio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        yield LARGE
        await until(lambda: anyio.to_thread.run_sync(bucket.uploads))
        sent.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:

        async def upload() -> None:
            kind = {"content-type": "multipart/form-data; boundary=x"}
            await remote.http.post("/v1/files", content=half(), headers=kind)

        tasks.start_soon(upload)
        await sent.wait()
        tasks.cancel_scope.cancel()
    await until(lambda: not bucket.uploads())
    assert not bucket.names()


async def test_parts_of_a_killed_gateway_are_discarded(bucket: Bucket, tmp_path: Path) -> None:
    """The sweep removes uploads that nobody finished."""
    store = ObjectStore(f"{bucket.url}/tb", bucket.options)
    lost = store.upload("incoming/lost")
    lost.write(LARGE)
    other = ObjectStore(bucket.url, bucket.options).upload("elsewhere/of-others")
    other.write(LARGE)
    async with site(tmp_path, **stored(bucket, f"{bucket.url}/tb")) as here:
        await here.served.gateway.files.collect_leftovers()
        assert bucket.uploads() == ["elsewhere/of-others"]
    for each in (lost, other):
        each.abort()


async def test_a_signed_url_is_that_of_the_store(remote: Site, bucket: Bucket) -> None:
    """It needs no key, and keeps the name of the file."""
    file_id = await remote.upload(name="my data.jsonl")
    url = (await remote.http.get(f"/v1/files/{file_id}/url?expiry=2")).json()["url"]
    async with httpx.AsyncClient(verify=NO_CERTIFICATES) as anybody:
        answer = await anybody.get(url)
    assert url.startswith(bucket.endpoint)
    assert answer.content == jsonl()
    assert "my%20data.jsonl" in answer.headers["content-disposition"]


@pytest.mark.parametrize("settings", [{"presigned_urls": False}, {}])
async def test_a_signed_url_is_otherwise_that_of_the_gateway(
    bucket: Bucket, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """For clients that cannot reach the store, and for longer than it signs."""
    async with site(tmp_path, **stored(bucket, bucket.url), **settings) as here:
        file_id = await here.upload()
        hours = 24 if settings else 24 * 30
        answer = await here.http.get(f"/v1/files/{file_id}/url?expiry={hours}")
        url = answer.json()["url"]
        assert url.startswith(here.served.url)
        assert (await here.http.get(url)).content == jsonl()


async def test_any_gateway_trains_on_a_file(bucket: Bucket, tmp_path: Path) -> None:
    """The one that received it is not needed: another fetches the data of the job."""
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    settings = {**stored(bucket, bucket.url), "store_url": database}
    async with site(tmp_path / "one", **settings) as one:
        file_id = await one.upload()
    backend = Recording()
    async with site(tmp_path / "two", backend, **settings) as two:
        await two.finished(files=[file_id])
        (run,) = backend.launched
        assert run.config.data.train[0].local_path.read_bytes() == jsonl()


async def test_converted_data_is_an_object_too(bucket: Bucket, tmp_path: Path) -> None:
    """A job of the OpenAI API whose rows have another form at the backend."""
    declared = ScriptedBackend().capabilities
    backend = Recording(capabilities=declared.model_copy(update={"provider_format": MISTRAL}))
    system = {"role": "developer", "content": "Be brief."}
    rows = [{"messages": [system, *row["messages"]]} for row in ROWS]
    shown = [{"messages": [{**system, "role": "system"}, *row["messages"]]} for row in ROWS]
    async with (
        site(tmp_path, backend, **stored(bucket, bucket.url)) as here,
        openai_client(here) as sdk,
    ):
        file = await sdk.files.create(file=("a.jsonl", jsonl(rows)), purpose="fine-tune")
        await sdk.fine_tuning.jobs.create(model="tiny-mistral", training_file=file.id)
        await until(lambda: backend.created)
        (run,) = backend.launched
        path = run.config.data.train[0].local_path
        assert [json.loads(line) for line in path.read_text().splitlines()] == shown
        assert len(bucket.names()) == 2
        await sdk.files.delete(file.id)
        assert len(bucket.names()) == 2  # the job needs them until its end
        backend.finish(backend.created[-1])
        (name,) = await until(bucket.names, lambda names: len(names) == 1)
        assert bucket.get(name).startswith(METRICS)


async def test_a_store_that_is_down_is_a_temporary_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: list[Any], bucket: Bucket
) -> None:
    """The answer can be retried and names what is missing; the log has the reason."""
    async with site(tmp_path, **stored(bucket, "s3://no-such-bucket/x")) as here:
        answer = await here.http.post("/v1/files", files={"file": ("a.jsonl", jsonl())})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "file storage" in answer.json()["message"]
    reasons = [entry.get("reason", "") for entry in logs]
    assert any("the bucket does not exist" in reason for reason in reasons)
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(logs)


async def test_gateways_may_share_a_directory(tmp_path: Path) -> None:
    """`file://` is for storage that several gateways mount."""
    shared = (tmp_path / "shared").as_uri()
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    settings: dict[str, Any] = {"blobs": shared, "store_url": database}
    async with site(tmp_path / "one", **settings) as one, site(tmp_path / "two", **settings) as two:
        file_id = await one.upload()
        assert (await content(two, file_id)).content == jsonl()
        await two.http.delete(f"/v1/files/{file_id}")
        assert not list((tmp_path / "shared" / "files").iterdir())


async def test_gateways_do_not_delete_what_another_is_storing(
    bucket: Bucket, tmp_path: Path
) -> None:
    """One deletes the last file of a content while the other uploads the same content."""
    settings = {
        **stored(bucket, bucket.url),
        "store_url": f"sqlite:///{tmp_path / 'shared.db'}",
    }
    async with site(tmp_path / "one", **settings) as one, site(tmp_path / "two", **settings) as two:
        for number in range(6):
            old = await one.upload(name=f"old-{number}.jsonl")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one.http.delete, f"/v1/files/{old}")
                new = await two.upload(name=f"new-{number}.jsonl")
            assert (await content(one, new)).content == jsonl()
            await two.http.delete(f"/v1/files/{new}")
            assert not bucket.names()


async def test_parts_are_joined_by_another_gateway(bucket: Bucket, tmp_path: Path) -> None:
    """An upload in parts of the OpenAI API, whose requests reach different gateways."""
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    settings: dict[str, Any] = {**stored(bucket, bucket.url), "store_url": database}
    async with (
        site(tmp_path / "one", **settings) as one,
        site(tmp_path / "two", **settings) as two,
        openai_client(one) as first,
        openai_client(two) as second,
    ):
        upload = await first.uploads.create(
            bytes=len(LARGE), filename="a.jsonl", mime_type="text/jsonl", purpose="user_data"
        )
        middle = BLOCK + 1
        parts = [
            await sdk.uploads.parts.create(upload.id, data=data)
            for sdk, data in ((first, LARGE[:middle]), (second, LARGE[middle:]))
        ]
        done = await second.uploads.complete(upload.id, part_ids=[part.id for part in parts])
        assert done.file is not None
        assert (await first.files.content(done.file.id)).content == LARGE
    assert [name.partition("/")[0] for name in bucket.names()] == ["files"]
    assert not bucket.uploads()
