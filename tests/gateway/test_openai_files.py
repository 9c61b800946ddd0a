"""Files of the OpenAI API, driven by the official client."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.gateway.conftest import Site, jsonl, openai_client, own_id, site
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def upload(sdk: AsyncOpenAI, name: str = "train.jsonl", content: bytes = jsonl()) -> str:
    """Upload a training file and return its id."""
    return (await sdk.files.create(file=(name, content), purpose="fine-tune")).id


async def test_a_file_lives(shared: Site, shared_sdk: AsyncOpenAI) -> None:
    """Uploaded, retrieved, downloaded, seen by the other API, deleted."""
    made = await shared_sdk.files.create(
        file=("été.jsonl", jsonl()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.object, made.filename, made.purpose) == ("file", "été.jsonl", "fine-tune")
    assert (made.bytes, made.status) == (len(jsonl()), "processed")
    assert made.expires_at == made.created_at + 3600
    assert await shared_sdk.files.retrieve(made.id) == made
    assert await shared_sdk.files.wait_for_processing(made.id) == made
    assert (await shared_sdk.files.content(made.id)).content == jsonl()
    seen = (await shared.http.get(f"/v1/files/{own_id(made.id)}")).json()
    assert (seen["filename"], seen["num_lines"]) == ("été.jsonl", 8)
    gone = await shared_sdk.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        await shared_sdk.files.retrieve(made.id)


async def test_the_parts_of_a_form_have_any_order(shared: Site) -> None:
    """The file may come before its purpose, in a chunked body, with any name."""
    boundary = "b0"
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="blob"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode(),
        jsonl(),
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        f"fine-tune\r\n--{boundary}--\r\n".encode(),
    )

    async def chunks() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    answer = await shared.http.post(
        "/openai/v1/files",
        content=chunks(),
        headers={"content-type": f"multipart/form-data; boundary={boundary}"},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == "blob"
    assert answer.headers["content-type"] == "application/json"


async def test_lists_have_pages(sdk: AsyncOpenAI) -> None:
    """Newest first or oldest first, by purpose, also while the files of a page are deleted."""
    ids = [await upload(sdk, f"{n}.jsonl") for n in range(5)]
    other = await sdk.files.create(file=("notes.txt", b"not JSON"), purpose="user_data")
    assert [file.id async for file in sdk.files.list(limit=2)] == [other.id, *reversed(ids)]
    ascending = sdk.files.list(limit=2, order="asc", purpose="fine-tune")
    assert [file.id async for file in ascending] == ids
    page = await sdk.files.list(limit=3, after=ids[3])
    assert [file.id for file in page.data] == [ids[2], ids[1], ids[0]]
    assert page.has_more is False
    async for file in sdk.files.list(limit=2):
        await sdk.files.delete(file.id)
    assert (await sdk.files.list()).data == []


@pytest.mark.parametrize(
    ("content", "line"), [(b'{"a": 1}\nnot json\n', 2), (b"[1]\n", 1), (b"\x00\xff", 1)]
)
async def test_only_lines_that_are_no_objects_are_rejected(
    content: bytes, line: int, shared_sdk: AsyncOpenAI
) -> None:
    """The service finds all other mistakes when it validates the job."""
    with pytest.raises(
        openai.BadRequestError, match="Expected file to have JSONL format"
    ) as failed:
        await upload(shared_sdk, content=content)
    assert f"Line {line} is not" in failed.value.message
    assert failed.value.param == "file"
    assert await upload(shared_sdk, content=b'{"messages": []}\n')


async def test_only_a_repeated_upload_returns_the_same_file(shared_sdk: AsyncOpenAI) -> None:
    """Known by the client's retry count, or by an idempotency key; any other is a new file."""
    form: dict[str, Any] = {"file": ("a.jsonl", jsonl()), "purpose": "fine-tune"}
    first, second = [await shared_sdk.files.create(**form) for _ in range(2)]
    assert first.id != second.id
    again = await shared_sdk.files.create(**form, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id in {first.id, second.id}
    key = {"Idempotency-Key": "k"}
    keyed = await shared_sdk.files.create(**form, extra_headers=key)
    assert keyed.id not in {first.id, second.id}
    assert (await shared_sdk.files.create(**form, extra_headers=key)).id == keyed.id
    with pytest.raises(openai.BadRequestError) as refused:
        await shared_sdk.files.create(
            file=("b.jsonl", jsonl()), purpose="fine-tune", extra_headers=key
        )
    assert refused.value.code == "idempotency_error"
    with pytest.raises(openai.BadRequestError, match="255 characters"):
        await shared_sdk.files.create(**form, extra_headers={"Idempotency-Key": "k" * 256})


async def test_errors_are_the_classes_of_the_client(shared: Site, shared_sdk: AsyncOpenAI) -> None:
    """Every error has message, type, param, code and the id of its request."""
    with pytest.raises(openai.NotFoundError, match="No such File object: nope") as missing:
        await shared_sdk.files.retrieve("nope")
    assert (missing.value.param, missing.value.code) == ("id", None)
    assert missing.value.type == "invalid_request_error"
    assert missing.value.request_id
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as denied:
        await shared_sdk.with_options(api_key="wrong").files.list()
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match="invalid limit") as bad:
        await shared_sdk.files.list(limit=0)
    assert bad.value.param == "limit"
    with pytest.raises(openai.BadRequestError, match="invalid after"):
        await shared_sdk.files.list(after="nope")
    with pytest.raises(openai.BadRequestError, match="invalid purpose"):
        await shared_sdk.files.create(file=b"x", purpose="dinner")  # type: ignore[arg-type]
    early: Any = {"anchor": "created_at", "seconds": 1}
    with pytest.raises(openai.BadRequestError, match=r"invalid expires_after\.seconds"):
        await shared_sdk.files.create(file=b"x", purpose="batch", expires_after=early)
    answer = await shared.http.post("/openai/v1/files", files={"file": ("a", jsonl())})
    assert answer.json() == {
        "error": {
            "message": "'purpose' is a required property",
            "type": "invalid_request_error",
            "param": "purpose",
            "code": None,
        }
    }
    unknown = await shared.http.get("/openai/v1/nothing")
    assert (unknown.status_code, json.loads(unknown.text)["error"]["message"]) == (404, "Not Found")
    assert (await shared.http.get("/v1/nothing")).json() == {"detail": "Not Found"}


@pytest.mark.parametrize("coding", ["base64", "plain"])
async def test_a_finished_job_has_a_file_of_its_metrics(coding: str, tmp_path: Path) -> None:
    """A CSV with a row for each step, in base64 unless the settings say otherwise."""
    async with site(tmp_path, openai_result_csv=coding) as here, openai_client(here) as sdk:
        file_id = await upload(sdk)
        job = await sdk.fine_tuning.jobs.create(model="tiny-mistral", training_file=file_id)
        assert job.result_files == []
        (remote,) = await until(lambda: here.backend.created)
        here.backend.measure(remote, 1, train_loss=2.5, train_mean_token_accuracy=0.25)
        here.backend.measure(remote, 2, train_loss=2.0, valid_loss=2.25, grad_norm=1.0)
        here.backend.finish(remote)
        done = await until(
            lambda: sdk.fine_tuning.jobs.retrieve(job.id), lambda job: job.status == "succeeded"
        )
        (result,) = done.result_files
        file = await sdk.files.retrieve(result)
        assert (file.purpose, file.filename) == ("fine-tune-results", "step_metrics.csv")
        content = (await sdk.files.content(result)).read()
        assert file.bytes == len(content)
        text = b64decode(content, validate=True) if coding == "base64" else content
        assert text.decode().splitlines() == [
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
            "1,2.5,0.25,,",
            "2,2.0,,2.25,",
        ]
        found = await sdk.files.list(purpose="fine-tune-results")
        assert [each.id for each in found.data] == [result]
        listed = (await here.http.get("/v1/files")).json()["data"]
        assert [each["id"] for each in listed] == [own_id(file_id)]
