"""The backend passes the conformance kit, over a scripted server."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tiny_openai import TinyBackend, TinySettings

from training_backends import TrainingConfig, plugins
from training_backends.testing.conformance import LoopbackSubject
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytest_plugins = ["training_backends.testing.pytest"]


class TinySubject(LoopbackSubject):
    key = "sk-conformance-0123456789"
    create_path = "/fine_tuning/jobs"
    patience = 8.0
    page_size = 6
    kind = TinyBackend

    def __init__(self, data: Path) -> None:
        self.config = TrainingConfig.model_validate(
            {
                "model": "gpt-4o-mini",
                "data": {"train": data},
                "hyperparameters": {"epochs": 1, "batch_size": 5},
            }
        )
        self.dataset = plugins.inspect(self.config)
        self.server = self.openai = ScriptedOpenAIProvider()
        self.openai.key = self.key
        self.openai.start()
        self.backend = self.reopen()

    def reopen(self) -> TinyBackend:
        settings = TinySettings(
            base_url=self.openai.url,
            attempts=2,
            retry_pause=0.01,
            read_timeout=0.2,
            settle_timeout=0.05,
            poll_min=0.01,
        )
        backend = self.kind(settings, self._secret)
        backend.page_size = self.page_size
        return backend

    async def _secret(self) -> SecretStr:
        return SecretStr(self.key)

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self.openai.stop()

    def job_ids(self) -> Sequence[str]:
        return list(self.openai.jobs)

    async def finish(self, remote_id: str) -> None:
        self.openai.run_to(remote_id, "succeeded")

    async def fail(self, remote_id: str) -> None:
        self.openai.fail_job(remote_id, code="server_error", message="The node was lost.")

    def uploads(self) -> Sequence[str]:
        return self.openai.training_files

    def lose_uploads(self) -> None:
        self.openai.files.clear()

    def starts(self, remote_id: str) -> int:
        return self.job_ids().count(remote_id)  # a job starts when it is created

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        return self.openai.jobs[remote_id].asked

    def say(self, remote_id: str, word: str) -> None:
        self.openai.set_status(remote_id, word)

    def progress(self, remote_id: str, records: int) -> None:
        self.openai.run_to(remote_id, "running")
        for number in range(records):
            self.openai.add_event(remote_id, f"Message {number}")

    def lag_lists(self, times: int) -> None:
        self.openai.lists_lag = times


def write_rows(path: Path) -> None:
    answer = {"role": "assistant", "content": "Pong."}
    for number in range(10):
        messages = [{"role": "user", "content": f"Ping {number}?"}, answer]
        with path.open("a") as file:
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture
def conformance_subject(tmp_path: Path) -> TinySubject:
    write_rows(tmp_path / "train.jsonl")
    return TinySubject(tmp_path / "train.jsonl")


def test_conforms(conformance: Callable[[], None]) -> None:
    """The backend passes a check of the kit."""
    conformance()
