"""Tasks of a real Airflow that train: they defer, are resumed, fail and are killed.

Run by test_orchestrators.py, in an environment of Airflow's; prints what became of each as JSON.
"""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import anyio
from airflow.sdk import DAG, TriggerRule, task
from airflow.sdk.exceptions import TaskDeferralTimeout

from training_backends import TrainingClient, TrainingStatus
from training_backends.integrations.airflow import TrainingRunOperator, TrainingRunTrigger

# The first run of two takes its supervisor with it.
LOST = 'case "$RUN_ID" in *-r1) echo again;; *) kill -9 $PPID; sleep 60;; esac'
# Not done before it is deferred.
SLOW = "until [ -e deferred ]; do sleep 0.1; done; echo {{ ds }} > $RUN_RESULT/model"


class Deferring(TrainingRunOperator):
    """Tells the script of its run that it has been deferred."""

    def defer(self, **options: Any) -> None:
        Path("deferred").touch()
        super().defer(**options)


def operator(
    task_id: str, script: str, *, kind: type = TrainingRunOperator, **options: Any
) -> TrainingRunOperator:
    config = {"backend": "command", "options": {"command": ["sh", "-c", script]}}
    made: TrainingRunOperator = kind(task_id=task_id, config=config, backend="command", **options)
    return made


with DAG("life", schedule=None) as dag:
    tasks = [
        operator("deferred", SLOW, kind=Deferring, console="http://console/"),
        operator("resumed", LOST),
        operator("at_once", LOST, deferrable=False),
        operator("failed", "echo no such table >&2; exit 3", retries=2),
        operator("killed", "touch started; sleep 60", deferrable=False),
        # Before the launch has returned.
        operator("killed_at_launch", f"kill {os.getpid()}; sleep 60", deferrable=False),
    ]

    @task(trigger_rule=TriggerRule.ALL_DONE)
    def report(ti: Any = None) -> None:
        keys = ("run_id", "metrics", "return_value", "_link_TrainingConsoleLink")
        ids = [each.task_id for each in tasks]
        found = {name: {key: ti.xcom_pull(task_ids=name, key=key) for key in keys} for name in ids}
        print("XCOM", json.dumps(found), flush=True)

    tasks >> report()


def kill_when_started() -> None:
    """Send what an Airflow worker is sent."""
    while not Path("started").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


async def kill_deferred() -> str:
    """Do what a triggerer does when a user clears a deferred task."""
    with TrainingClient() as client:
        config = {"options": {"command": "sleep 60"}}
        run = client.launch(config, backend="command", run_id="cleared")
        await TrainingRunTrigger(run.id).on_kill()
        (run,) = client.wait(run.id)
        assert run.status is TrainingStatus.CANCELLED
        again = client.run(config, backend="command", run_id="cleared", follow=False)
        client.stop(again.id)
        return again.id


def time_out() -> str:
    """Do what a worker does when the triggerer has waited for longer than `execution_timeout`."""
    with TrainingClient() as client:
        run = client.launch({"options": {"command": "sleep 60"}}, backend="command", run_id="late")
        ti = Mock(map_index=-1, **{"xcom_pull.return_value": run.id})
        with suppress(TaskDeferralTimeout):
            tasks[0].resume_execution("__fail__", {"error": "Trigger timeout"}, {"ti": ti})
        (run,) = client.wait(run.id)
        return run.status


if __name__ == "__main__":
    Thread(target=kill_when_started, daemon=True).start()
    states = {ti.task_id: str(ti.state) for ti in dag.test().get_task_instances()}
    with TrainingClient() as client:
        runs = {run.id: run.status for run in client.wait(*(run.id for run in client.list()))}
    found = {"tasks": states, "runs": runs, "next": anyio.run(kill_deferred), "late": time_out()}
    print("STATES", json.dumps(found))
