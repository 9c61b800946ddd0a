"""The official Python SDK against the gateway, in front of the engine."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIFE = Path(__file__).parent / "sdk_life.py"


@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(400)
def test_the_official_sdk_lives_a_whole_life(served: Any, samples: tuple[Path, Path]) -> None:
    """Upload, quote, training, lists, models, cancel, refusals, deletion: all as expected."""
    done = subprocess.run(
        [sys.executable, str(LIFE), served.url, served.key, *map(str, samples)],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("ok: whole life")
