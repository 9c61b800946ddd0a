"""The conformance kit passes a sound backend, and finds each of its single faults.

`pytest -v` on this file prints the table of faults, with the check that finds each.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.effort import is_thorough
from tests.plugins.tiny_openai.tiny_openai import TinyBackend, TinySettings
from tests.testing.mutants import MUTANTS, Mutant
from tests.testing.tiny_subject import KEY, TinySubject
from training_backends import BackendContext, Dataset, TrainingConfig
from training_backends.datasets.inspect import inspect
from training_backends.testing.conformance import BackendConformance
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"messages": [*messages, {"role": "user", "content": str(n)}, messages[1]]}
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainingConfig.model_validate(
        {
            "model": "gpt-4o-mini-2024-07-18",
            "data": {"train": path},
            "hyperparameters": {"epochs": 1, "batch_size": 5},
        }
    )


@pytest.fixture(scope="module")
def dataset(config: TrainingConfig) -> Dataset:
    return inspect(config)


async def test_sound_backend_passes_every_check(config: TrainingConfig, dataset: Dataset) -> None:
    """The example backend passes all checks; its subject has every hook, so none is skipped."""
    report = await BackendConformance(lambda: TinySubject(config, dataset)).run_all()
    assert report.passed == BackendConformance.checks(), str(report)


@pytest.mark.timeout(600)  # every check on each fault, where tests are thorough
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.what}: {mutant.check}")
async def test_fault_is_found(mutant: Mutant, config: TrainingConfig, dataset: Dataset) -> None:
    """A backend with a single fault fails the check that is made for it."""

    def subject() -> TinySubject:
        subject = TinySubject(config, dataset, mutant.kind)
        subject.patience = 1.0
        return subject

    kit = BackendConformance(subject)
    if is_thorough():
        report = await kit.run_all()
        assert f"check_{mutant.check}" in report.failed, str(report)
        return
    with pytest.raises(Exception):  # noqa: B017, PT011  # also what the backend raises
        await kit.run(f"check_{mutant.check}")


def test_faults_differ() -> None:
    """Each fault has its own description and names an existing check."""
    counts = Counter(mutant.what for mutant in MUTANTS)
    assert not [what for what, count in counts.items() if count > 1]
    assert {f"check_{mutant.check}" for mutant in MUTANTS} <= {*BackendConformance.checks()}
    assert len(MUTANTS) >= 60


async def test_example_is_created_from_settings_and_credentials(tmp_path: Path) -> None:
    """The example takes its base URL from its settings and its key from the credentials."""

    class Credentials:
        async def get(self, provider: str, profile: str | None = None) -> SecretStr:
            assert (provider, profile) == ("tiny", None)
            return SecretStr(KEY)

        async def get_all(
            self, provider: str, profile: str | None = None
        ) -> Mapping[str, SecretStr]:
            return {"key": await self.get(provider, profile)}

    with ScriptedOpenAIProvider() as server:
        server.key = KEY
        settings = TinySettings(base_url=server.url)
        context = BackendContext(home=tmp_path, credentials=Credentials(), settings=settings)
        backend = TinyBackend.create(context)
        assert (await backend.health()).ok
        await backend.aclose()
