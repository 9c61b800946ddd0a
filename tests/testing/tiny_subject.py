"""The example backend over a scripted server, with every hook of the conformance kit."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr

from tests.plugins.tiny_openai.tiny_openai import TinyBackend, TinySettings
from training_backends import Dataset, TrainingConfig
from training_backends.testing.faults import Disturbance, disturbance
from training_backends.testing.openai_provider import ScriptedOpenAIProvider
from training_backends.testing.subject import Subject, Target

KEY = "sk-conformance-0123456789"
TARGETS: Mapping[Target, tuple[str | None, str | None]] = {
    "create": ("POST", "/fine_tuning/jobs"),
    "upload": ("POST", "/files"),
    "read": ("GET", None),
    "any": (None, None),
}


class TinySubject(Subject):
    """Starts a server of its own."""

    patience = 8.0
    page_size = 6

    def __init__(
        self, config: TrainingConfig, dataset: Dataset, kind: type[TinyBackend] = TinyBackend
    ) -> None:
        self.config, self.dataset = config, dataset
        self.server = ScriptedOpenAIProvider()
        self.server.key = KEY
        self.server.start()
        self._kind = kind
        self._uploaded: list[str] = []
        self.server.add_file = self._add_file  # type: ignore[method-assign]
        self.backend = self.reopen()

    def _add_file(self, content: bytes, **fields: Any) -> str:
        file_id = ScriptedOpenAIProvider.add_file(self.server, content, **fields)
        if fields.get("purpose") == "fine-tune":
            self._uploaded.append(file_id)
        return file_id

    def reopen(self) -> TinyBackend:
        settings = TinySettings(
            base_url=self.server.url,
            page_size=self.page_size,
            attempts=2,
            read_timeout=0.2,
            settle_timeout=0.05,
            poll_min=0.01,
        )
        return self._kind(settings, _key)

    def job_ids(self) -> Sequence[str]:
        return list(self.server.jobs)

    async def finish(self, remote_id: str) -> None:
        self.server.run_to(remote_id, "succeeded")

    async def fail(self, remote_id: str) -> None:
        self.server.fail_job(remote_id, code="server_error", message="The node was lost.")

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self.server.stop()

    def disturb(self, kind: Disturbance, *, on: Target = "any", times: int = 1) -> None:
        method, path = TARGETS[on]
        self.server.fail(disturbance(kind, echo=KEY), method=method, path=path, times=times)

    def heal(self) -> None:
        self.server.heal()

    def uploads(self) -> Sequence[str]:
        return self._uploaded

    def lose_uploads(self) -> None:
        for file_id in list(self.server.files):
            self.server.lose_file(file_id)

    def starts(self, remote_id: str) -> int:
        token = self.server.jobs[remote_id].asked["metadata"]["run"]
        jobs = self.server.jobs.values()
        return sum(job.asked["metadata"]["run"] == token for job in jobs)

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        return self.server.jobs[remote_id].asked

    def say(self, remote_id: str, word: str) -> None:
        self.server.set_status(remote_id, word)

    def progress(self, remote_id: str, records: int) -> None:
        self.server.run_to(remote_id, "running")
        for _ in range(records):
            self.server.add_event(remote_id, f"Message {len(self.server.jobs[remote_id].events)}")

    def connections(self) -> int:
        return self.server.open_connections

    def requests(self) -> int:
        return len(self.server.requests)

    def secrets(self) -> Sequence[str]:
        return [KEY]

    def lag_lists(self, times: int) -> None:
        self.server.lists_lag = times


async def _key() -> SecretStr:
    return SecretStr(KEY)
