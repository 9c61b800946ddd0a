"""The official Python SDK against the gateway, in front of the engine."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Served
from tests.e2e.sdk_life import main


@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(400)
def test_the_official_sdk_lives_a_whole_life(served: Served, samples: tuple[Path, Path]) -> None:
    """Upload, quote, training, lists, models, cancel, refusals, deletion: all as expected."""
    main(served.url, served.key, *samples)
