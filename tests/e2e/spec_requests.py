"""Hold our client's requests against the published specification of the protocol.

    python tests/e2e/spec_requests.py SPECIFICATION.yaml

Brings Stoplight Prism (npm) into .cache/, lets it serve the specification strictly, and calls
every operation of `MistralAPI`. Ends with exit code 1 if Prism objects
to a single request. The specification is its publisher's and not part of this repository.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx
import yaml
from pydantic import SecretStr

from training_backends import TrainingBackendError
from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.http.client import HttpClient
from training_backends.http.policy import HttpPolicy
from training_backends.protocols.mistral import wire
from training_backends.protocols.mistral.errors import error_from_answer
from training_backends.protocols.mistral.status import JOB_STATUSES

CACHE = Path(__file__).parent.parent.parent / ".cache" / "prism"
PRISM = "@stoplight/prism-cli@5.16.0"
PORT = 4010
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5, minutes=30)))


class Recorder(httpx.AsyncBaseTransport):
    """Sends requests on and keeps what Prism says of them."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self.operations: set[tuple[str, str]] = set()
        self.requests = 0
        self.objections: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on."""
        response = await self._inner.handle_async_request(request)
        body = await response.aread()
        self.requests += 1
        self.operations.add((request.method, _route(request.url.path)))
        # Prism also objects to its own answers, which it makes from the examples.
        said = json.loads(response.headers.get("sl-violations", "[]"))
        ours = [each for each in said if each["location"][0] != "response"]
        if ours or 400 <= response.status_code < 500:
            self.objections.append(f"{request.method} {request.url}: {response.status_code} {ours}")
        return httpx.Response(
            response.status_code,
            headers={"content-type": response.headers.get("content-type", "")},
            content=body,
            request=request,
        )


def _route(path: str) -> str:
    return re.sub(r"[0-9a-f-]{36}|ft:[^/]*", "{id}", path)


@contextmanager
def prism(specification: Path) -> Iterator[None]:
    """Serve the specification strictly."""
    program = CACHE / "node_modules" / ".bin" / "prism"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--ignore-scripts"]
        subprocess.run([*npm, "--prefix", str(CACHE), PRISM], check=True)
    document = yaml.safe_load(specification.read_text())
    # A repeated query key is read as a list only where the schema says nothing but list;
    # "list or null" makes Prism take a single value for text.
    for parameter in document["paths"]["/v1/files"]["get"]["parameters"]:
        options = parameter["schema"].get("anyOf", [{}])
        if options[0].get("type") == "array":
            parameter["schema"] = options[0]
    copy = CACHE / "specification.yaml"
    copy.write_text(yaml.safe_dump(document, sort_keys=False))
    command = [str(program), "mock", "-h", "127.0.0.1", "-p", str(PORT), "--errors", str(copy)]
    with (CACHE / "log").open("w") as log, subprocess.Popen(command, stdout=log) as server:
        try:
            yield
        finally:
            server.terminate()


async def until_served(url: str) -> None:
    """Wait until something answers."""
    async with httpx.AsyncClient() as http:
        with anyio.fail_after(60):
            while True:
                try:
                    await http.get(f"{url}/v1/models")
                except httpx.TransportError:
                    await anyio.sleep(0.1)
                else:
                    return


async def call(awaitable: Awaitable[Any]) -> None:
    """Make one call; what Prism objects to is seen by the recorder, not here."""
    with suppress(TrainingBackendError, StopAsyncIteration):
        await awaitable


async def drive_files(api: MistralAPI, directory: Path) -> None:
    """Call every operation on files."""
    path = directory / "train.jsonl"
    path.write_text('{"messages": []}\n')
    file_id = str(uuid4())
    await call(api.upload_file(path))
    await call(api.upload_file(path, filename='tråin "x".jsonl'))
    await call(anext(api.iter_files(search="a b&c", purpose="fine-tune")))
    await call(api.retrieve_file(file_id))


def jobs() -> Iterator[wire.JobIn]:
    """Make jobs that use every field between them."""
    file = wire.TrainingFile(file_id=str(uuid4()))
    parameters = wire.CompletionTrainingParametersIn
    yield wire.JobIn(model="m", hyperparameters=parameters(), training_files=[file])
    yield wire.JobIn(
        model="m",
        job_type="completion",
        auto_start=True,
        suffix="x" * 18,
        invalid_sample_skip_percentage=0.5,
        training_files=[file, wire.TrainingFile(file_id=str(uuid4()), weight=2.5)],
        validation_files=[str(uuid4())],
        integrations=[
            wire.WandbIntegrationIn(project="p", name="n", run_name="r", api_key="k" * 40)
        ],
        hyperparameters=parameters(
            training_steps=10,
            learning_rate=1e-8,
            weight_decay=0.0,
            warmup_fraction=1.0,
            seq_len=100,
            fim_ratio=0.5,
        ),
        repositories=[
            wire.GithubRepositoryIn(name="n", owner="o", token="t", ref="main", weight=0.1)
        ],
    )
    targets = [
        wire.ClassifierTargetIn(name="a", labels=["x"], weight=0.0, loss_function="multi_class"),
        wire.ClassifierTargetIn(name="b", labels=["y", "z"]),
    ]
    yield wire.JobIn(
        model="m",
        job_type="classifier",
        training_files=[file],
        hyperparameters=parameters(epochs=0.5),
        classifier_targets=targets,
    )


async def drive_jobs(api: MistralAPI) -> None:
    """Call every operation on jobs."""
    await call(anext(api.iter_listed()))
    for status in JOB_STATUSES:
        filters = JobFilters(
            model="m",
            created_after=AT,
            created_before=AT,
            created_by_me=True,
            status=status,
            wandb_project="p",
            wandb_name="n",
            suffix="s",
        )
        await call(anext(api.iter_listed(filters)))
    for job in jobs():
        await call(api.create_job(job))
    job_id = str(uuid4())
    for operation in (api.get_job, api.start_job, api.cancel_job):
        await call(operation(job_id))


async def main() -> int:
    """Call everything; return the exit code."""

    async def key() -> SecretStr:
        return SecretStr("key")

    url = f"http://127.0.0.1:{PORT}"
    await until_served(url)
    recorder = Recorder()
    http = HttpClient(
        url,
        key=key,
        decode_error=error_from_answer,
        policy=HttpPolicy(attempts=1),
        transport=recorder,
    )
    api = MistralAPI(http)
    with tempfile.TemporaryDirectory() as directory:
        await drive_files(api, Path(directory))
    await drive_jobs(api)
    await call(api.list_models())
    await http.aclose()
    for objection in recorder.objections:
        print(f"  {objection}")
    print(
        f"{recorder.requests} requests, {len(recorder.operations)} of 9 operations, "
        f"{len(recorder.objections)} objections"
    )
    return 1 if recorder.objections or len(recorder.operations) != 9 else 0


if __name__ == "__main__":
    with prism(Path(sys.argv[1])):
        code = anyio.run(main)
    raise SystemExit(code)
