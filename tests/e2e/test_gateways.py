"""Gateways that die behind a load balancer, as the benchmark kills them, in short."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import programs

BENCH = Path(__file__).parents[2] / "benchmarks" / "gateways.py"
PROXIES = ("/usr/sbin/haproxy", "/usr/sbin/nginx")


@pytest.mark.e2e
@pytest.mark.skipif(not any(map(Path.exists, map(Path, PROXIES))), reason="no load balancer here")
@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed")
def test_nothing_accepted_is_lost_or_doubled_while_gateways_are_killed() -> None:
    """Three gateways on one PostgreSQL server, one of them killed every few seconds."""
    done = subprocess.run(
        [sys.executable, str(BENCH), "--seconds", "9", "--every", "3", "--clients", "4"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
