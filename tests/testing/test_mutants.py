"""The conformance kit passes a sound backend, and finds each of its single faults.

`pytest -v` on this file prints the table of faults, with the check that finds each.
"""

from collections import Counter
from pathlib import Path

import pytest
from test_tiny_openai import TinySubject, write_rows

from tests.effort import is_thorough
from tests.testing.mutants import MUTANTS, Mutant, Paging
from training_backends.testing.conformance import BackendConformance
from training_backends.testing.observe_checks import ObserveChecks

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_rows(path)
    return path


async def test_log_may_be_returned_in_parts(data: Path) -> None:
    """A backend that says that there is more passes every check of the log."""

    class Subject(TinySubject):
        kind = Paging

    kit = BackendConformance(lambda: Subject(data))
    for name in vars(ObserveChecks):
        if name.startswith("check_"):
            await kit.run(name)


@pytest.mark.timeout(600)  # every check on each fault, where tests are thorough
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.what}: {mutant.check}")
async def test_fault_is_found(mutant: Mutant, data: Path) -> None:
    """A backend with a single fault fails the check that is made for it."""

    class Subject(TinySubject):
        patience = 1.0
        kind = mutant.kind

    kit = BackendConformance(lambda: Subject(data))
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
