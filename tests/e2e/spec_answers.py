"""Hold the gateway's answers against the published specification of the protocol.

    python tests/e2e/spec_answers.py SPECIFICATION.yaml [EXAMPLES]

Starts a gateway over a backend without a provider, fills it with files, jobs and models, and
lets schemathesis ask for everything the specification knows: no answer may be a server error,
and each must have the shape and type that the specification gives. The specification is its
publisher's and not part of this repository. Ends with schemathesis' exit code.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
import httpx
from pydantic import SecretStr

from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings
from training_backends.testing.backend import ScriptedBackend

KEY = "a-key-for-this-run"
CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance"
CHAT = {
    "messages": [
        {"role": "user", "content": "Ping?"},
        {"role": "assistant", "content": "Pong."},
    ]
}


class Filler:
    """Fills a gateway over HTTP, and moves its jobs from behind."""

    def __init__(self, http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
        self._http = http
        self._backend = backend

    async def upload(self, row: dict[str, Any], name: str) -> str:
        """Upload a file of one row and return its id."""
        file = (name, json.dumps(row).encode() + b"\n", "application/octet-stream")
        answer = await self._http.post("/v1/files", files={"file": file})
        return str(answer.raise_for_status().json()["id"])

    async def create(self, file_id: str, **fields: Any) -> str:
        """Create a job, wait until it is validated and return its id."""
        body = {
            "model": "tiny-mistral",
            "training_files": [{"file_id": file_id}],
            "hyperparameters": {"training_steps": 10},
            **fields,
        }
        answer = await self._http.post("/v1/fine_tuning/jobs", json=body)
        job_id = str(answer.raise_for_status().json()["id"])
        await self.wait(job_id, "VALIDATED")
        return job_id

    async def start(self, job_id: str) -> str:
        """Start a job, measure something and return the backend's id of it."""
        await self._http.post(f"/v1/fine_tuning/jobs/{job_id}/start")
        await self.wait(job_id, "RUNNING")
        remote_id = self._backend.created[-1]
        self._backend.measure(remote_id, 1, train_loss=2.0, valid_loss=float("nan"))
        self._backend.measure(remote_id, 2, train_loss=1.0, valid_loss=1.5)
        return remote_id

    async def finish(self, job_id: str) -> str:
        """Bring a job to its end and return its model."""
        self._backend.finish(await self.start(job_id))
        return str((await self.wait(job_id, "SUCCESS"))["fine_tuned_model"])

    async def wait(self, job_id: str, status: str) -> dict[str, Any]:
        """Poll a job until it is in a status."""
        with anyio.fail_after(30):
            while True:
                answer = await self._http.get(f"/v1/fine_tuning/jobs/{job_id}")
                job: dict[str, Any] = answer.raise_for_status().json()
                if job["status"] == status:
                    return job
                await anyio.sleep(0.05)


async def fill(filler: Filler) -> dict[str, list[str]]:
    """Make one of each kind and return their ids."""
    file_id = await filler.upload(CHAT, "chats.jsonl")
    labelled = await filler.upload({"text": "Fine.", "labels": {"mood": "good"}}, "moods.jsonl")
    finished = await filler.create(file_id, suffix="done")
    model = await filler.finish(finished)
    classifier = await filler.create(
        labelled,
        model="tiny-classifier",
        job_type="classifier",
        classifier_targets=[{"name": "mood", "labels": ["good", "bad"]}],
    )
    classifier_model = await filler.finish(classifier)
    going = await filler.create(file_id, suffix="runs")
    await filler.start(going)
    waiting = await filler.create(file_id, suffix="waits")
    return {
        "files": [file_id, labelled],
        "jobs": [finished, classifier, going, waiting],
        "models": [model, classifier_model],
    }


async def main(specification: Path, examples: int) -> int:
    """Serve, fill, and ask for everything; return the exit code."""
    methods = frozenset({"sft", "classifier"})
    declared = ScriptedBackend().capabilities
    backend = ScriptedBackend(capabilities=declared.model_copy(update={"methods": methods}))
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        catalogue = home / "catalogue.toml"
        catalogue.write_text(
            '[models.tiny-classifier]\ntarget = "tiny"\njob_types = ["classifier"]\n'
        )
        settings = GatewaySettings(api_key=SecretStr(KEY), catalogue=catalogue)
        backends = {"scripted": backend}
        async with (
            running(settings, home=home, backend="scripted", port=0, backends=backends) as served,
            httpx.AsyncClient(
                base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=30
            ) as http,
        ):
            ids = await fill(Filler(http, backend))
            program = str(Path(sys.executable).with_name("schemathesis"))
            command = [program, "run", str(specification), "-u", served.url]
            options = ["-H", f"Authorization: Bearer {KEY}", "-c", CHECKS, "--continue-on-failure"]
            environment = {
                **os.environ,
                "SCHEMATHESIS_HOOKS": "spec_hooks",
                "PYTHONPATH": str(Path(__file__).parent),
                "KNOWN_IDS": json.dumps(ids),
            }
            done = await anyio.run_process(
                [*command, *options, "--max-examples", str(examples)],
                env=environment,
                stdout=None,
                stderr=None,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            return done.returncode


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    raise SystemExit(anyio.run(main, Path(sys.argv[1]), count))
