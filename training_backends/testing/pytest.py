"""A pytest plugin that makes each check of the conformance kit a test of its own.

It is not loaded by itself; a test file or `conftest.py` names it, and provides the subject:

    pytest_plugins = ["training_backends.testing.pytest"]

    @pytest.fixture
    def conformance_subject():
        return MySubject()

    def test_conforms(conformance):
        conformance()
"""

from collections.abc import Callable
from functools import partial

import anyio
import pytest

from training_backends.testing.conformance import BackendConformance, CheckSkipped, Subject

__all__ = ["conformance"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that use `conformance` by check."""
    if "conformance" in metafunc.fixturenames:
        checks = BackendConformance.checks()
        ids = [name.removeprefix("check_") for name in checks]
        metafunc.parametrize("conformance", checks, ids=ids, indirect=True)


@pytest.fixture
def conformance(request: pytest.FixtureRequest, conformance_subject: Subject) -> Callable[[], None]:
    """Return a function that runs one check on the fixture `conformance_subject`.

    A check that does not apply skips the test.
    """
    kit = BackendConformance(lambda: conformance_subject)

    def run() -> None:
        try:
            anyio.run(partial(kit.run, request.param))
        except CheckSkipped as skipped:
            pytest.skip(str(skipped))

    return run
