"""The documentation's scripts and whole lives of runs, each with its tool and the core only."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sdks import SAMPLES, serving
from tests.pages import DOCS, code_blocks
from training_backends import TrainingClient, TrainingStatus

pytestmark = pytest.mark.orchestrators

_TOOLS = {
    "prefect": ("prefect_flow.py", "step 2"),
    "dagster": ("dagster_assets.py", "ASSET_OBSERVATION"),
    "apache-airflow": ("airflow_dag.py", "Pausing task as DEFERRED"),
}
"""By tool its script, and what shows that the run was followed in the tool's own way."""
_SCRIPTS = {
    block.title: block.text
    for page in ("orchestrators.md", "other-clients.md")
    for block in code_blocks(page, "python")
}


def _script(name: str) -> str:
    """Return a script of the documentation, or a life in this directory."""
    return _SCRIPTS.get(name) or Path(__file__).with_name(name).read_text()


def _run(tool: str, name: str, directory: Path, **variables: str) -> str:
    """Run a script in a tool's environment; return what it prints."""
    python = DOCS.parent / ".cache" / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{tool} is not installed; see `make test-orchestrators`")
    script = directory / name
    script.write_text(_script(name))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "TRAINING_BACKENDS_HOME": str(directory / "home"),
        "TRAINING_BACKENDS_LOCAL__PYTHON": sys.executable,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "AIRFLOW_HOME": str(directory / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__DAGS_FOLDER": str(directory),
        **variables,
    }
    if tool == "apache-airflow":
        for words in ("db migrate", "dags reserialize"):
            command = [str(python), "-m", "airflow", *words.split()]
            subprocess.run(command, cwd=directory, env=environment, check=True)
    done = subprocess.run(
        [python, script.name],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _document(printed: str, word: str = "") -> Any:
    """Return the JSON object of the last line that has one, after a word."""
    found = re.findall(rf"^.*?{word} ?(\{{.*\}})", printed, re.MULTILINE)
    return json.loads(found[-1])


def _shortened(found: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the orchestrator's own id in keys that are run ids, as in `life-failed-…-r1`."""
    pattern = re.compile(r"[-_](manual__|[0-9a-f]{8}-)[\w.-]*?-[0-9A-Za-z]{8}(?=$|-r\d)")
    return {pattern.sub("", name): value for name, value in found.items()}


def _write_run(directory: Path) -> None:
    """Write a small configuration of the local backend and its data."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (directory / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    (directory / "run.yaml").write_text(
        "model: tiny-mistral\n"
        "data: {train: train.jsonl}\n"
        "hyperparameters: {training_steps: 2, batch_size: 2}\n"
        "options: {device: cpu}\n"
    )


@pytest.mark.parametrize("tool", _TOOLS)
def test_the_script_trains_a_model(tool: str, tmp_path: Path) -> None:
    """As it is on the page; the run is complete, and its log came through."""
    _write_run(tmp_path)
    script, word = _TOOLS[tool]
    printed = _run(tool, script, tmp_path)
    with TrainingClient(home=tmp_path / "home") as client:
        (run,) = client.list()
    assert run.status is TrainingStatus.COMPLETED
    assert run.id.startswith("support")
    assert "step 2" in printed.lower()
    assert word in printed


def test_airflow_tasks_defer_resume_fail_and_are_killed(tmp_path: Path) -> None:
    """Deferred or not; what a killed task leaves is resumed by the next."""
    printed = _run("apache-airflow", "airflow_life.py", tmp_path)
    found, values = _document(printed, "STATES"), _document(printed, "XCOM")
    assert found["tasks"] == {
        "deferred": "success",
        "resumed": "success",
        "at_once": "success",
        "failed": "failed",
        "killed": "failed",
        "killed_at_launch": "failed",
        "report": "success",
    }
    assert _shortened(found["runs"]) == {
        "life-deferred": "completed",
        "life-resumed": "failed",
        "life-resumed-r1": "completed",
        "life-at_once": "failed",
        "life-at_once-r1": "completed",
        "life-failed": "failed",
        "life-killed": "cancelled",
        "life-killed_at_launch": "cancelled",
    }
    assert (found["next"], found["late"]) == ("cleared-r1", "cancelled")
    assert "no such table" in printed
    assert "Pausing task as DEFERRED" in printed
    deferred = values["deferred"]
    assert deferred["return_value"].endswith(f"{deferred['run_id']}/result")
    assert deferred["_link_TrainingConsoleLink"] == f"http://console/#/run/{deferred['run_id']}"
    assert values["resumed"]["run_id"].endswith("-r1")
    assert "life-failed" in values["failed"]["run_id"]


def test_dagster_steps_are_resumed_fail_and_are_terminated(tmp_path: Path) -> None:
    """With metadata; a retry policy does not repeat what would fail again."""
    found = _document(_run("dagster", "dagster_life.py", tmp_path))
    assert _shortened(found["runs"]) | {"terminated": ""} == {
        "model": "completed",
        "resumed": "failed",
        "resumed-r1": "completed",
        "failed": "failed",
        "my-own": "completed",
        "terminated": "",
    }
    assert found["runs"]["terminated"] in {"stopping", "cancelled"}
    assert (found["retries"], found["ended"]) == (0, False)
    assert "no such table" in found["failure"]["description"]
    assert found["made"]["model"]["model"].endswith("/result")
    assert found["made"]["resumed"]["run"].endswith("-r1")


def test_dspy_fine_tunes_at_a_gateway(tmp_path: Path) -> None:
    """The script of the page, then a bootstrapped, a failed and a cancelled fine-tune."""
    with serving(tmp_path / "gateway") as (url, key):
        given = {
            "GATEWAY": f"{url}/openai/v1",
            "GATEWAY_KEY": key,
            "MODEL": "tiny-mistral",
            "TRAINING_BACKENDS_OPENAI__BASE_URL": f"{url}/openai/v1",
            "OPENAI_API_KEY": key,
        }
        (tmp_path / "chats.jsonl").write_bytes((SAMPLES / "train.jsonl").read_bytes())
        printed = _run("dspy", "dspy_finetune.py", tmp_path, **given)
        assert re.search(r"succeeded openai/ft:tiny-mistral.*\nanswer:", printed), printed
        found = _document(_run("dspy", "dspy_life.py", tmp_path, **given))
    assert found["tuned"].startswith("openai/ft:tiny-mistral")
    assert "training data is invalid" in found["failed"]
    assert found["cancelled"][0] in {"cancelled", "running"}


def test_a_notebook_shows_the_progress_in_one_place(tmp_path: Path) -> None:
    """Of a real kernel, with either client; a run itself is shown in the same way."""
    _write_run(tmp_path)
    found = _document(_run("nbclient", "jupyter_life.py", tmp_path))
    shown, messages = found["shown"], found["messages"]
    assert [len(outputs) for outputs in shown] == [1, 1, 0, 1]
    assert messages["0 display_data"] == 1
    assert messages["0 update_display_data"] > 1
    page = shown[0][0]["text/html"]
    for part in ("completed", '<progress max="2" value="2">', "2 / 2", "<polyline", "train_loss"):
        assert part in page
    assert shown[0][0]["text/plain"].startswith("<TrainingRun nb local completed")
