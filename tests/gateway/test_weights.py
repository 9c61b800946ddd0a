"""The weights of a fine-tuned model, as an archive."""

import base64
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream
from pydantic import SecretStr

from tests.gateway.conftest import KEY, Site, scripted, site
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.config import TrainingConfig
from training_backends.core.run import TrainingRun
from training_backends.gateway.audit import AuditLog
from training_backends.gateway.weights import TarArchive, read_range

pytestmark = pytest.mark.anyio

FILES = {
    "config.json": b"{}",
    "empty": b"",
    "model.safetensors": os.urandom(2**21 + 5),
    "adapter/" + "long-" * 50 + "name": b"x" * 512,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model."""
    made = tmp_path / "model"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


async def trained(here: Site, directory: Path) -> str:
    """Return the path of the weights of a job whose result is a directory."""
    job_id, remote_id = await here.started()
    here.backend.finish(remote_id, result_model=str(directory))
    model = (await here.until(job_id, "SUCCESS"))["fine_tuned_model"]
    return f"/v1/models/{model}/weights"


async def test_an_archive_holds_every_file_and_names_its_digest(
    shared: Site, directory: Path
) -> None:
    """Any tar reads it; a link to a file elsewhere is left out."""
    (directory / "link").symlink_to("/etc/hostname")
    answer = await shared.http.get(await trained(shared, directory))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-tar")
    assert int(answer.headers["content-length"]) == len(answer.content)
    digest = hashlib.sha256(answer.content).digest()
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {
            member.name: file.read()
            for member in archive
            if (file := archive.extractfile(member)) is not None
        }
    assert found == FILES


async def test_a_download_is_in_the_audit_log(shared: Site, directory: Path) -> None:
    """Weights are worth as much as the data that they learned from."""
    path = await trained(shared, directory)
    await shared.http.get(path)
    log = AuditLog(shared.served.gateway.store)
    found = await anyio.to_thread.run_sync(lambda: [*log.entries()])
    assert (found[-1]["action"], found[-1]["target"]) == ("weights.download", path.split("/")[3])


async def test_ranges_are_parts_of_the_archive(shared: Site, directory: Path) -> None:
    """As long as the content is the same; a range behind the end is 416."""
    path = await trained(shared, directory)
    whole = await shared.http.get(path)
    size, tag = len(whole.content), whole.headers["etag"]

    async def part(text: str, **headers: str) -> httpx.Response:
        return await shared.http.get(path, headers={"range": text, **headers})

    for text, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=700-2000", 700, 2001),
        (f"bytes={2**20}-", 2**20, size),
        ("bytes=-9", size - 9, size),
        (f"bytes=5-{size * 2}", 5, size),
    ):
        answer = await part(text, **{"if-range": tag})
        assert answer.status_code == 206
        assert answer.content == whole.content[start:stop]
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    behind = await part(f"bytes={size}-")
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{size}")
    for headers in ({"range": "bytes=1-2", "if-range": '"other"'}, {"range": "bytes=1-2,4-5"}):
        answer = await shared.http.get(path, headers=headers)
        assert (answer.status_code, len(answer.content)) == (200, size)


@pytest.mark.parametrize("text", ["", "bytes=", "bytes=-", "bytes=3-2", "items=1-2", "bytes=a-"])
def test_a_range_that_is_none_is_ignored(text: str) -> None:
    """As RFC 9110 wants."""
    assert read_range(text, 100) is None


async def test_who_may_not_have_weights(shared: Site, directory: Path) -> None:
    """Keys of another project, keys that only read, and models that have none."""
    path = await trained(shared, directory)
    keys = shared.served.gateway.keys

    async def ask(asked: str, **key: str) -> httpx.Response:
        made = await anyio.to_thread.run_sync(lambda: keys.create(**key))  # type: ignore[arg-type]
        bearer = f"Bearer {made.key.get_secret_value()}"
        return await shared.http.get(asked, headers={"authorization": bearer})

    assert (await ask(path)).status_code == 200
    assert (await ask(path, project="other")).status_code == 404
    reader = await ask(path, scope="read")
    assert (reader.status_code, "read-only" in reader.text) == (403, True)
    base = await ask("/v1/models/tiny-mistral/weights")
    assert (base.status_code, "base model" in base.text) == (403, True)
    assert (await ask("/v1/models/none/weights")).status_code == 404
    await shared.http.delete(path.removesuffix("/weights"))
    assert (await ask(path)).status_code == 404


async def test_weights_that_the_backend_keeps_elsewhere_are_copied_once(here: Site) -> None:
    """And removed with the model."""
    job = await here.finished()
    path = f"/v1/models/{job['fine_tuned_model']}"
    first, second = [await here.http.get(f"{path}/weights") for _ in range(2)]
    assert first.status_code == 200
    assert first.content == second.content
    copies = here.home / "gateway" / "weights"
    assert [each.name for each in copies.iterdir()] == [job["id"]]
    await here.http.delete(path)
    assert [*copies.iterdir()] == []


async def test_a_backend_without_downloads_has_no_weights(tmp_path: Path) -> None:
    """The reason is said."""
    async with site(tmp_path / "home", scripted(downloads=False)) as here:
        model = (await here.finished())["fine_tuned_model"]
        answer = await here.http.get(f"/v1/models/{model}/weights")
        assert (answer.status_code, "not on the machine" in answer.text) == (404, True)


async def cutting(near: SocketStream, *, port: int, after: list[int]) -> None:
    """Pass a connection on, and cut it after as many bytes of the answer as are left to allow."""
    far = await anyio.connect_tcp("127.0.0.1", port)

    async def send() -> None:
        async for asked in near:
            await far.send(asked)

    async with near, far, anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        left = after.pop() if after else 2**40
        async for answer in far:
            await near.send(answer[:left])
            left -= len(answer)
            if left <= 0:
                break
        tasks.cancel_scope.cancel()


@pytest.fixture
async def ours(here: Site) -> AsyncIterator[MistralAPIBackend]:
    """Our own client, behind a network that cuts the first two answers."""
    port = int(here.served.url.rpartition(":")[2])
    cut = partial(cutting, port=port, after=[700_000, 1_200_000])
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    backend = MistralAPIBackend(
        credentials=FixedKey(), settings=MistralSettings.model_validate({"base_url": url})
    )
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, cut)
        yield backend
        await backend.aclose()
        tasks.cancel_scope.cancel()


class FixedKey(CredentialSource):
    """The gateway's static key, whatever is asked for."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return it."""
        del provider, profile
        return SecretStr(KEY)


async def test_our_client_downloads_exact_bytes_over_a_network_that_cuts(
    here: Site, ours: MistralAPIBackend, directory: Path, tmp_path: Path, logs: list[Any]
) -> None:
    """What has arrived is not sent again, and only complete weights appear."""
    model = (await trained(here, directory)).split("/")[3]
    run = TrainingRun(
        id="run", backend="mistral", config=TrainingConfig(model="x"), result_model=model
    )
    target = tmp_path / "out" / "model"
    assert ours.capabilities.downloads
    assert await ours.download(run, target) == target
    assert {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    } == FILES
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    asked = [each for each in logs if each["event"] == "request" and "weights" in each["path"]]
    assert [each["status"] for each in asked] == [200, 206, 206]


def test_a_file_that_changes_breaks_its_archive(directory: Path) -> None:
    """Rather than mixing two versions."""
    archive = TarArchive.of(directory)
    (directory / "config.json").write_bytes(b"[]")
    with pytest.raises(OSError, match="has changed"):
        archive.sha256()
