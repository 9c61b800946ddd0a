"""An S3 server on loopback, one for each process of the tests, with a bucket for each test."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "s3-secret-of-the-tests",
}


@dataclass
class Bucket:
    """A bucket, seen by fsspec without the code of this package."""

    name: str
    endpoint: str
    fs: Any = field(repr=False)

    @property
    def url(self) -> str:
        """The bucket's URL."""
        return f"s3://{self.name}"

    @property
    def options(self) -> dict[str, Any]:
        """What finds the server."""
        return {"endpoint_url": self.endpoint}

    def put(self, name: str, content: bytes) -> str:
        """Store an object and return its URL."""
        self.fs.pipe_file(f"{self.name}/{name}", content)
        return f"{self.url}/{name}"

    def get(self, name: str) -> bytes:
        """Return the content of an object."""
        return bytes(self.fs.cat_file(f"{self.name}/{name}"))

    def names(self) -> list[str]:
        """Return the names of all objects."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.name)
        return [name.removeprefix(f"{self.name}/") for name in found]

    def uploads(self) -> list[str]:
        """Return the names of objects whose parts are kept."""
        found = self.fs.call_s3("list_multipart_uploads", Bucket=self.name)
        return [each["Key"] for each in found.get("Uploads", ())]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").disabled = True
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, and the credentials for it in the environment."""
    import s3fs  # noqa: PLC0415  # of an extra

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("TRAINING_BACKENDS_OBJECTS__OPTIONS__S3__ENDPOINT_URL", s3_server)
    name = f"test-{uuid4().hex[:12]}"
    fs = s3fs.S3FileSystem(endpoint_url=s3_server, use_listings_cache=False)
    fs.mkdir(name)
    return Bucket(name, s3_server, fs)
