"""Launchers with colliding ids while the database dies, as the benchmark runs them, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import pgbouncer_program, programs

BENCH = Path(__file__).parents[2] / "benchmarks" / "launchers.py"


@pytest.mark.e2e
@pytest.mark.skipif(pgbouncer_program() is None, reason="PgBouncer is not installed")
@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed")
def test_each_run_exists_once_whoever_launches_it_and_whatever_dies() -> None:
    """Eight launchers behind PgBouncer; the server is killed and restarted amid the launches."""
    done = subprocess.run(
        [sys.executable, str(BENCH), "--launches", "5", "--restarts", "1", "--timeout", "100"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 launchers, 5 ids, 40 launches" in done.stdout
    assert "PASS" in done.stdout
