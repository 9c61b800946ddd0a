"""Training data that is elsewhere."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.buckets import KEYS, Bucket, bucket, s3_server
from training_backends import (
    AsyncTrainingClient,
    BackendNotInstalled,
    BackendUnavailable,
    ConfigError,
    CredentialNotFound,
    DatasetError,
    DuplicateRun,
    TrainingRun,
)
from training_backends.client import remote_data
from training_backends.core.backend import Journal
from training_backends.core.run import RunState
from training_backends.objects.settings import ObjectSettings
from training_backends.testing.backend import ScriptedBackend

__all__ = ["bucket", "s3_server"]

pytestmark = pytest.mark.anyio

ROWS = b"".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n}."},
            ]
        }
    ).encode()
    + b"\n"
    for n in range(12)
)
DIGEST = hashlib.sha256(ROWS).hexdigest()
SECRET = "signature-that-is-a-secret"


class Reading(ScriptedBackend):
    """Keeps the content of what it is told to train on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.read: list[tuple[str, bytes]] = []

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        path = run.config.data.train[0].local_path
        self.read.append((path.name, path.read_bytes()))
        return await super().launch(run, journal)


class Hub(BaseHTTPRequestHandler):
    """What the API of the Hugging Face Hub answers about one file of a dataset."""

    protocol_version = "HTTP/1.1"
    content = ROWS

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer()

    def answer(self) -> None:
        oid = hashlib.sha256(self.content).hexdigest()[:40]
        file = {"type": "file", "path": "train.jsonl", "size": len(self.content), "oid": oid}
        start, status = 0, 200
        if "/resolve/" in self.path:
            start = int(self.headers["range"][6:].partition("-")[0])
            out, status = self.content[start:], 206
        elif "/tree/" in self.path or "/paths-info/" in self.path:
            out = json.dumps([file]).encode()
        else:
            out = json.dumps({"id": "org/name", "sha": "f" * 40, "tags": []}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args: object) -> None:
        pass


class Web:
    """A web server with one file; counts what it sends."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag: str | None = '"one"'
        self.asked: list[dict[str, str]] = []
        self.sent = 0
        self.cut_after: int | None = None
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(headers)
        if self.etag and headers.get("if-none-match") == self.etag:
            request.send_response(304)
            request.end_headers()
            return
        start = 0
        if "range" in headers and headers.get("if-range") == self.etag:
            start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        rest = self.content[start:]
        request.send_response(206 if start else 200)
        if self.etag:
            request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        if self.cut_after is not None:
            rest, self.cut_after = rest[: self.cut_after], None
            request.close_connection = True
        self.sent += len(rest)
        request.wfile.write(rest)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback and return the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(content: bytes = ROWS) -> Iterator[Web]:
    """Serve a file on loopback."""
    web = Web(content)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    with listening(Handler) as url:
        web.url = f"{url}/data/train.jsonl"
        yield web


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as found:
        yield found


@pytest.fixture
def backend() -> Reading:
    return Reading()


@pytest.fixture
async def client(backend: Reading, tmp_path: Path) -> Any:
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as opened:
        yield opened


def training(url: str, **source: Any) -> dict[str, Any]:
    return {"model": "tiny-mistral", "data": {"train": {"uri": url, **source}}}


async def test_a_run_trains_on_an_object(
    bucket: Bucket, client: AsyncTrainingClient, backend: Reading
) -> None:
    """The backend sees a local file with its name; the record, the URL and its content."""
    url = bucket.put("sets/train.jsonl", ROWS)
    run = await client.launch(training(url), backend="scripted")
    assert backend.read == [("train.jsonl", ROWS)]
    (source,) = (await client.get(run.id)).config.data.train
    assert (source.uri, source.sha256) == (url, DIGEST)


async def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new revision is fetched again."""
    pytest.importorskip("huggingface_hub")
    uri = "hf://datasets/org/name/train.jsonl"
    monkeypatch.setattr(Hub, "content", ROWS)
    with listening(Hub) as endpoint:
        objects = ObjectSettings(options={"hf": {"endpoint": endpoint, "token": False}})
        async with AsyncTrainingClient(home=tmp_path, objects=objects) as client:
            first = await client.inspect(training(uri))
            monkeypatch.setattr(Hub, "content", ROWS * 2)
            second = await client.inspect(training(uri))
    assert (first.train[0].rows, second.train[0].rows) == (12, 24)


async def test_every_verb_reads_the_object(bucket: Bucket, client: AsyncTrainingClient) -> None:
    """It is inspected, validated and counted like a local file."""
    config = training(bucket.put("train.jsonl", ROWS))
    assert (await client.inspect(config)).train[0].rows == 12
    assert (await client.validate(config, backend="scripted")).ok
    assert (await client.estimate(config, backend="scripted")).cost is not None


async def test_issues_name_the_url(bucket: Bucket, client: AsyncTrainingClient) -> None:
    """Not a path in the cache."""
    url = bucket.put("train.jsonl", ROWS + b'{"messages": []}\n')
    with pytest.raises(DatasetError) as caught:
        await client.launch(training(url), backend="scripted")
    assert {issue.path for issue in caught.value.issues} == {url}


async def test_an_unchanged_object_is_fetched_once(client: AsyncTrainingClient, web: Web) -> None:
    """Its ETag is compared."""
    for _ in range(3):
        await client.inspect(training(web.url))
    assert web.sent == len(ROWS)
    assert [asked.get("if-none-match") for asked in web.asked] == [None, '"one"', '"one"']


async def test_a_changed_object_is_fetched_again(client: AsyncTrainingClient, web: Web) -> None:
    await client.inspect(training(web.url))
    web.content, web.etag = ROWS * 2, '"two"'
    assert (await client.inspect(training(web.url))).train[0].rows == 24


async def test_a_download_continues_after_a_cut(client: AsyncTrainingClient, web: Web) -> None:
    """Only the rest is requested."""
    web.cut_after = 500
    assert (await client.inspect(training(web.url))).train[0].sha256 == DIGEST
    assert web.asked[1]["range"] == "bytes=500-"
    assert web.sent == len(ROWS)


async def test_a_cut_download_of_a_changed_object_begins_again(
    client: AsyncTrainingClient, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is a mixture of two versions."""
    web.cut_after = 500
    first = web.answer

    def changed(request: BaseHTTPRequestHandler) -> None:
        first(request)
        web.content, web.etag = ROWS[::-1].replace(b"\n", b" ") + b"\n", '"two"'

    monkeypatch.setattr(web, "answer", changed)
    found = await client.inspect(training(web.url))
    assert found.files[0].sha256 == hashlib.sha256(web.content).hexdigest()


async def test_without_the_server_the_cached_content_is_used(
    client: AsyncTrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log says that it could not be checked."""
    monkeypatch.setattr(remote_data, "_ATTEMPTS", 1)
    with serving() as web:
        await client.inspect(training(web.url))
    with capture_logs() as logs:
        assert (await client.inspect(training(web.url))).train[0].rows == 12
    assert [entry["uri"] for entry in logs if "not checked" in entry["event"]] == [web.url]


async def test_a_pinned_digest_needs_no_server(client: AsyncTrainingClient) -> None:
    with serving() as web:
        await client.inspect(training(web.url))
        asked = len(web.asked)
        await client.inspect(training(web.url, sha256=DIGEST))
        assert len(web.asked) == asked


async def test_another_digest_is_an_error(client: AsyncTrainingClient, web: Web) -> None:
    with pytest.raises(DatasetError) as caught:
        await client.inspect(training(web.url, sha256="0" * 64))
    (issue,) = caught.value.issues
    assert (issue.code, issue.field) == ("changed_object", "data.train.0")


async def test_a_repeated_launch_keeps_the_first_content(
    client: AsyncTrainingClient, web: Web
) -> None:
    """As with a local file, the caller is told that it has changed since."""
    await client.launch(training(web.url), backend="scripted", run_id="one")
    web.content, web.etag = ROWS * 2, '"two"'
    notices: list[str] = []
    await client.launch(
        training(web.url), backend="scripted", run_id="one", on_notice=notices.append
    )
    assert any(f"{web.url} has changed" in notice for notice in notices)
    with pytest.raises(DuplicateRun, match="train"):
        await client.launch(training(f"{web.url}l"), backend="scripted", run_id="one")


async def test_credentials_of_a_url_are_not_kept(
    client: AsyncTrainingClient, web: Web, tmp_path: Path
) -> None:
    """A query may be a signature: not in the record, the store, the cache, logs or errors."""
    url = f"{web.url}?X-Amz-Signature={SECRET}"
    with capture_logs() as logs:
        run = await client.launch(training(url), backend="scripted")
        web.etag = None
        web.content = b"nonsense"
        with pytest.raises(DatasetError) as caught:
            await client.launch(training(url), backend="scripted")
    assert run.config.data.train[0].uri == web.url
    seen = [str(logs), str(caught.value), str(caught.value.issues), repr(run)]
    seen += [path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in seen if SECRET in text]


@pytest.mark.parametrize(
    ("url", "code"),
    [("s3://{bucket}/none.jsonl", "missing_object"), ("s3://no-such-bucket/x", "missing_object")],
)
async def test_a_missing_object_names_its_field(
    bucket: Bucket, client: AsyncTrainingClient, url: str, code: str
) -> None:
    url = url.format(bucket=bucket.name)
    with pytest.raises(DatasetError) as caught:
        await client.validate(training(url), backend="scripted")
    (issue,) = caught.value.issues
    assert (issue.code, issue.path, issue.field) == (code, url, "data.train.0")


async def test_missing_credentials_name_where_they_come_from(
    bucket: Bucket, client: AsyncTrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    url = bucket.put("train.jsonl", ROWS)
    for name in KEYS:
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CredentialNotFound, match="no credentials") as caught:
        await client.inspect(training(url))
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("url", "error", "match"),
    [
        ("gs://bucket/a.jsonl", BackendNotInstalled, r"training-backends\[gcs\]"),
        ("ftp://host/a.jsonl", ConfigError, "s3, gs, az, hf and https"),
        ("https://user:pw@host/a.jsonl", ConfigError, "presigned"),
        ("http://example.org/a.jsonl", ConfigError, "https"),
        ("s3://key:secret@bucket/a", ConfigError, "AWS_ACCESS_KEY_ID"),
    ],
)
async def test_what_cannot_be_fetched_says_what_to_do(
    client: AsyncTrainingClient, url: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error) as caught:
        await client.inspect(training(url))
    assert match.replace("\\", "") in f"{caught.value} {getattr(caught.value, 'hint', '')}"
    assert "pw@" not in str(caught.value)


async def test_a_size_limit(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_BACKENDS_OBJECTS__MAX_OBJECT_BYTES", "100")
    async with AsyncTrainingClient(home=tmp_path) as client:
        with pytest.raises(DatasetError) as caught:
            await client.inspect(training(web.url))
    assert caught.value.issues[0].code == "too_large"
    assert not web.sent or web.sent == len(ROWS)


async def test_the_cache_is_bounded(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch, backend: Reading
) -> None:
    """The data of a run in progress is kept."""
    monkeypatch.setenv("TRAINING_BACKENDS_OBJECTS__CACHE_BYTES", "0")
    monkeypatch.setattr("training_backends.objects.cache._IN_USE", -1.0)
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        await client.launch(training(web.url), backend="scripted")
        for number in range(3):
            web.content, web.etag = ROWS * (2 + number), f'"{number}"'
            await client.inspect(training(web.url))
    kept = {path.name for path in (tmp_path / "cache" / "objects").iterdir()}
    assert kept - {"index", "incoming"} == {DIGEST, hashlib.sha256(web.content).hexdigest()}


async def test_an_unreachable_store_is_a_temporary_error(
    bucket: Bucket, client: AsyncTrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINING_BACKENDS_OBJECTS__OPTIONS__S3__ENDPOINT_URL", "http://127.0.0.1:9")
    async with AsyncTrainingClient(home=client.home / "other") as other:
        with pytest.raises(BackendUnavailable, match="unavailable"):
            await other.inspect(training(f"{bucket.url}/train.jsonl"))
