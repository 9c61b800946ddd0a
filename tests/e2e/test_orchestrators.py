"""The scripts of docs/orchestrators.md, each with its tool and the core package only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import DOCS, code_blocks
from training_backends import TrainingClient, TrainingStatus

pytestmark = pytest.mark.orchestrators

_TOOLS = {
    "prefect": "prefect_flow.py",
    "dagster": "dagster_assets.py",
    "apache-airflow": "airflow_dag.py",
}
_SCRIPTS = {block.title: block.text for block in code_blocks("orchestrators.md", "python")}


@pytest.mark.parametrize("tool", _TOOLS)
def test_the_script_trains_a_model(tool: str, tmp_path: Path) -> None:
    """As it is on the page; the run is complete, and its log came through."""
    python = DOCS.parent / ".cache" / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{tool} is not installed; see `make test-orchestrators`")
    script = tmp_path / _TOOLS[tool]
    script.write_text(_SCRIPTS[script.name])
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    (tmp_path / "run.yaml").write_text(
        "model: tiny-mistral\n"
        "data: {train: train.jsonl}\n"
        "hyperparameters: {training_steps: 2, batch_size: 2}\n"
        "options: {device: cpu}\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TRAINING_BACKENDS_HOME": str(tmp_path / "home"),
        "TRAINING_BACKENDS_LOCAL__PYTHON": sys.executable,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
    }
    if tool == "apache-airflow":
        for words in ("db migrate", "dags reserialize"):
            command = [str(python), "-m", "airflow", *words.split()]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        [python, script.name],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    with TrainingClient(home=tmp_path / "home") as client:
        (run,) = client.list()
    assert run.status is TrainingStatus.COMPLETED
    assert run.id.startswith("support-bot")
    assert "step 2" in done.stdout.lower() or "completed" in done.stdout.lower()
