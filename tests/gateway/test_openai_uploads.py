"""Uploads in parts of the OpenAI API, driven by the official client."""

import hashlib
import os
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
import sqlalchemy as sa
from openai import AsyncOpenAI

from tests.gateway.conftest import Site, jsonl, openai_client, own_id, site
from training_backends.store.gateway_schema import parts, uploads

pytestmark = pytest.mark.anyio

CONTENT = jsonl()
THIRDS = [CONTENT[:200], CONTENT[200:500], CONTENT[500:]]


async def begin(sdk: AsyncOpenAI, **fields: Any) -> Any:
    """Create an upload of the training file."""
    asked: Any = {
        "bytes": len(CONTENT),
        "filename": "train.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "fine-tune",
        **fields,
    }
    return await sdk.uploads.create(**asked)


def stored(here: Site) -> list[str]:
    """Return the names of the files of parts."""
    return sorted(path.name for path in (here.home / "gateway" / "parts").iterdir())


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


async def test_the_helper_of_the_client_uploads_a_file(here: Site, sdk: AsyncOpenAI) -> None:
    """In parts of any size; the file is then like any other."""
    done = await sdk.uploads.upload_file_chunked(
        file=CONTENT,
        filename="train.jsonl",
        bytes=len(CONTENT),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=100,
        md5=md5(CONTENT),
    )
    assert (done.object, done.status, done.filename) == ("upload", "completed", "train.jsonl")
    assert done.file is not None
    assert await sdk.files.retrieve(done.file.id) == done.file
    assert (await sdk.files.content(done.file.id)).read() == CONTENT
    assert (await here.http.get(f"/v1/files/{own_id(done.file.id)}")).json()["num_lines"] == 8
    job = await sdk.fine_tuning.jobs.create(model="tiny-mistral", training_file=done.file.id)
    assert job.training_file == done.file.id
    assert stored(here) == []


async def test_parts_may_arrive_in_any_order(here: Site, sdk: AsyncOpenAI) -> None:
    """Also in parallel; the order is that of the completion, which may be repeated."""
    made = await begin(sdk, expires_after={"anchor": "created_at", "seconds": 7200})
    assert (made.object, made.status, made.file) == ("upload", "pending", None)
    assert made.id.startswith("upload_")
    assert made.expires_at == made.created_at + 3600
    ids: dict[int, str] = {}

    async def send(index: int) -> None:
        part = await sdk.uploads.parts.create(made.id, data=THIRDS[index])
        assert (part.object, part.upload_id) == ("upload.part", made.id)
        ids[index] = part.id

    async with anyio.create_task_group() as tasks:
        for index in (2, 1, 0):
            tasks.start_soon(send, index)
    await sdk.uploads.parts.create(made.id, data=b"not used")
    in_order = [ids[index] for index in range(3)]
    done = await sdk.uploads.complete(made.id, part_ids=in_order, md5=md5(CONTENT))
    assert done.file is not None
    assert (await sdk.files.content(done.file.id)).read() == CONTENT
    assert done.file.expires_at == done.file.created_at + 7200
    assert await sdk.uploads.complete(made.id, part_ids=in_order) == done
    assert stored(here) == []
    acts: list[Any] = [
        sdk.uploads.cancel(made.id),
        sdk.uploads.complete(made.id, part_ids=in_order[::-1]),
        sdk.uploads.parts.create(made.id, data=b"late"),
    ]
    for act in acts:
        with pytest.raises(openai.BadRequestError, match="completed, not pending") as refused:
            await act
        assert refused.value.code == "invalid_state"


async def test_a_wrong_completion_can_be_corrected(shared_sdk: AsyncOpenAI) -> None:
    """Nothing is lost when size, checksum, order or content are not those of the file."""
    made = await begin(shared_sdk)
    sent = [(await shared_sdk.uploads.parts.create(made.id, data=data)).id for data in THIRDS]
    other = await begin(shared_sdk)
    theirs = (await shared_sdk.uploads.parts.create(other.id, data=THIRDS[0])).id
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"part_ids": sent[:2]}, "500 bytes, and the upload was created for"),
        ({"part_ids": sent, "md5": md5(b"x")}, "invalid md5"),
        ({"part_ids": [*sent, "part_nope"]}, r"invalid part_ids\.3"),
        ({"part_ids": [theirs, *sent[1:]]}, r"invalid part_ids\.0"),
        ({"part_ids": sent[::-1]}, "Expected file to have JSONL format"),
    ]
    for given, message in wrong:
        with pytest.raises(openai.BadRequestError, match=message):
            await shared_sdk.uploads.complete(made.id, **given)
    assert (await shared_sdk.uploads.complete(made.id, part_ids=sent)).status == "completed"


async def test_a_cancelled_upload_keeps_nothing(here: Site, sdk: AsyncOpenAI) -> None:
    """Cancelling twice is no error; nothing else is possible."""
    made = await begin(sdk)
    await sdk.uploads.parts.create(made.id, data=THIRDS[0])
    assert len(stored(here)) == 1
    assert (await sdk.uploads.cancel(made.id)).status == "cancelled"
    assert stored(here) == []
    assert (await sdk.uploads.cancel(made.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled, not pending"):
        await sdk.uploads.complete(made.id, part_ids=[])


async def test_an_upload_expires(tmp_path: Path) -> None:
    """What a client or a crash of the gateway left behind is removed at the next start."""
    async with site(tmp_path) as here, openai_client(here) as sdk:
        made, kept = await begin(sdk), await begin(sdk)
        for each in (made, kept):
            await sdk.uploads.parts.create(each.id, data=THIRDS[0])
        crashed = here.home / "gateway" / "parts" / "crashed-before-its-row"
        crashed.touch()
        os.utime(crashed, (0, 0))
        mine = uploads.c.id == own_id(made.id)
        gone = uploads.update().where(mine).values(expires_at=1.0 + uploads.c.created_at - 3600)
        await here.served.gateway.store.awrite(lambda c: c.execute(gone))
        with pytest.raises(openai.BadRequestError, match="expired, not pending"):
            await sdk.uploads.parts.create(made.id, data=THIRDS[1])
        assert len(stored(here)) == 3
    async with site(tmp_path) as here, openai_client(here) as sdk:
        query = sa.select(parts.c.id)
        rows = await here.served.gateway.store.aread(lambda c: c.execute(query).scalars().all())
        assert stored(here) == [*rows]
        assert len(rows) == 1
        with pytest.raises(openai.BadRequestError, match="expired, not pending"):
            await sdk.uploads.complete(made.id, part_ids=[])
        assert (await sdk.uploads.cancel(kept.id)).status == "cancelled"


async def test_a_repeated_request_makes_nothing_new(shared_sdk: AsyncOpenAI) -> None:
    """Known by the client's retry count, or by an idempotency key."""
    again = {"x-stainless-retry-count": "1"}
    first = await begin(shared_sdk)
    assert (await begin(shared_sdk, extra_headers=again)).id == first.id
    assert (await begin(shared_sdk, extra_headers=again, filename="other.jsonl")).id != first.id
    assert (await begin(shared_sdk)).id != first.id
    keyed = await begin(shared_sdk, extra_headers={"Idempotency-Key": "k"})
    assert (await begin(shared_sdk, extra_headers={"Idempotency-Key": "k"})).id == keyed.id
    with pytest.raises(openai.BadRequestError) as refused:
        await begin(shared_sdk, filename="other.jsonl", extra_headers={"Idempotency-Key": "k"})
    assert refused.value.code == "idempotency_error"
    part = await shared_sdk.uploads.parts.create(first.id, data=THIRDS[0])
    repeated = await shared_sdk.uploads.parts.create(first.id, data=THIRDS[0], extra_headers=again)
    assert repeated.id == part.id
    assert (await shared_sdk.uploads.parts.create(first.id, data=THIRDS[0])).id != part.id


async def test_limits_and_errors(tmp_path: Path) -> None:
    """With the parameter at fault, before anything is stored."""
    async with site(tmp_path, max_parts_bytes=1000) as here, openai_client(here) as sdk:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"bytes": 1001}, "invalid bytes"),
            ({"bytes": 0}, "invalid bytes"),
            ({"purpose": "dinner"}, "invalid purpose"),
            ({"filename": "/"}, "invalid filename"),
            ({"mime_type": "\0"}, "invalid mime_type"),
            ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
        ]
        for fields, message in wrong:
            with pytest.raises(openai.BadRequestError, match=message):
                await begin(sdk, **fields)
        unknown = f"upload_{0:032x}"
        acts: list[Any] = [
            sdk.uploads.parts.create(unknown, data=b"x"),
            sdk.uploads.complete("nope", part_ids=[]),
            sdk.uploads.cancel(unknown),
        ]
        for act in acts:
            with pytest.raises(openai.NotFoundError, match="No such Upload object"):
                await act
        made = await begin(sdk, bytes=10)
        with pytest.raises(openai.BadRequestError, match="The part is empty"):
            await sdk.uploads.parts.create(made.id, data=b"")
        with pytest.raises(openai.APIStatusError, match="the limit is 10 bytes"):
            await sdk.uploads.parts.create(made.id, data=b"x" * 11)
        for _ in range(2):
            await sdk.uploads.parts.create(made.id, data=b"x" * 10)
        with pytest.raises(openai.APIStatusError, match="the limit is 10 bytes"):
            await sdk.uploads.parts.create(made.id, data=b"x" * 10)
        assert len(stored(here)) == 2
