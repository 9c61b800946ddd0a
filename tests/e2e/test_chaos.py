"""Launches that are killed and repeated, as the chaos bench does them, in short."""

import subprocess
from pathlib import Path

import pytest

from tests.forking import Program

BENCH = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("wire", "trial"),
    [("mistral", ""), ("openai", "kill after the create"), ("together", "kill after the create")],
)
def test_a_launch_broken_at_its_worst_moments_makes_one_job(
    wire: str, trial: str, program: Program
) -> None:
    """Killed in an upload, around the create and the start, at a write: one run, one job."""
    python = str(program.python)
    done = subprocess.run(
        [python, str(BENCH), "--python", python, "--few", "--backend", wire, "--trial", trial],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
