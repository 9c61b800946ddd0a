"""Processes of several machines on one store: one job, and its password told nowhere."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.commands import Run
from tests.postgres import PASSWORD, Postgres
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.e2e


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of a store whose user needs a password."""
    url = sa.make_url(postgres.new_url()).set(username="guest", password=PASSWORD)
    return url.render_as_string(hide_password=False)


@pytest.mark.parametrize("machines", [1, 2])
def test_processes_that_launch_one_id_at_once_make_one_job(
    run_process: Run, url: str, config_file: Path, tmp_path: Path, machines: int
) -> None:
    """Each opens a store that is not there yet, and on two machines nobody sees who lives."""
    config_file.write_text(config_file.read_text().replace("  batch_size: 2\n", ""))
    with ScriptedProvider() as provider, ThreadPoolExecutor() as threads:

        def launch(number: int) -> tuple[int, str | None]:
            done = run_process(
                *("launch", config_file.name, "--backend=mistral", "--id=mine", "--yes", "--json"),
                MISTRAL_API_KEY="test-key",
                TRAINING_BACKENDS_HOME=str(tmp_path / f"home{number % machines}"),
                TRAINING_BACKENDS_MISTRAL__BASE_URL=provider.base_url,
                TRAINING_BACKENDS_STORE_URL=url,
            )
            return done.code, done.document.get("remote_id")

        answers = set(threads.map(launch, range(3)))
        assert len(provider.files) == 1
        assert answers == {(0, job) for job in provider.jobs}


def test_no_command_tells_the_password(run: Run, url: str) -> None:
    """Whether the store is fine, its password is wrong or it does not answer at all."""
    wrong = url.replace("horse", "horsf")
    away = "postgresql://guest:correct%2Fhorse%20battery%40staple@127.0.0.1:1/runs"
    for place, code in ((url, 0), (wrong, 1), (away, 1)):
        for command in (("list", "--json"), ("doctor",)):
            done = run(
                *command, TRAINING_BACKENDS_STORE_URL=place, TRAINING_BACKENDS_LOG_LEVEL="debug"
            )
            assert done.code == code, (command, place, done.err)
            assert "horse" not in done.out + done.err
            assert "staple" not in done.out + done.err


def test_a_missing_driver_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    """By every command that needs the store."""
    hidden = tmp_path / "psycopg.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'psycopg'\")\n")
    done = subprocess.run(
        [sys.executable, "-m", "training_backends", "list"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "TRAINING_BACKENDS_STORE_URL": "postgresql://me:hunter22@host/runs",
        },
        check=False,
    )
    assert done.returncode == 3
    assert "pip install 'training-backends[postgres]'" in done.stderr
    assert "hunter22" not in done.stderr
