"""The conformance kit passes a sound backend, and finds each of its single faults.

`pytest -v` on this file prints the table of faults, with the check that finds each.
"""

import json
from collections import Counter

import pytest

from tests.effort import is_thorough
from tests.testing.mutants import MUTANTS, Mutant
from tests.testing.tiny_subject import TinySubject
from training_backends import Dataset, TrainingConfig
from training_backends.datasets.inspect import inspect
from training_backends.testing.conformance import BackendConformance

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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.what}: {mutant.check}")
async def test_fault_is_found(mutant: Mutant, config: TrainingConfig, dataset: Dataset) -> None:
    """A backend with a single fault fails the check that is made for it."""

    def subject() -> TinySubject:
        subject = TinySubject(config, dataset, mutant.kind)
        subject.patience = 2.0
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
