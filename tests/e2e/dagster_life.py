"""Steps of a real Dagster that train: observed, resumed, failed and terminated.

Run by test_orchestrators.py, in an environment of Dagster's; prints what became of each as JSON.
"""

import json
import os
import signal
import time
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg

from training_backends import TrainingClient
from training_backends.integrations.dagster import TrainingResource

LOST = 'case "$RUN_ID" in *-r1) echo again;; *) kill -9 $PPID; sleep 60;; esac'


def command(script: str) -> dict[str, Any]:
    return {"options": {"command": ["sh", "-c", script]}}


@dg.asset
def model(context: dg.AssetExecutionContext, training: TrainingResource) -> str:
    run = training.run(context, command('echo hi; echo "weights" > $RUN_RESULT/model'))
    return str(run.result_model)


@dg.asset
def resumed(context: dg.AssetExecutionContext, training: TrainingResource) -> str:
    return training.run(context, command(LOST)).id


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=3))
def failed(context: dg.AssetExecutionContext, training: TrainingResource) -> str:
    return training.run(context, command("echo no such table >&2; exit 3")).id


@dg.op
def in_an_op(context: dg.OpExecutionContext, training: TrainingResource) -> str:
    return training.run(context, command("true"), run_id="my-own").id


@dg.op
def terminated(context: dg.OpExecutionContext, training: TrainingResource, before: str) -> str:
    return training.run(context, command("touch started; sleep 60"), run_id="terminated").id


@dg.job
def ops() -> None:
    terminated(in_an_op())


def terminate_when_started() -> None:
    """Send what Dagster sends to a run that a user terminates."""
    while not Path("started").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def plain(metadata: Any) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items() if name != "path"}


if __name__ == "__main__":
    resources = {"training": TrainingResource(backend="command", observe_every=0)}
    done = dg.materialize([model, resumed, failed], resources=resources, raise_on_error=False)
    made = {event.asset_key.path[0]: event for event in done.get_asset_materialization_events()}
    failure = done.failure_data_for_node("failed").user_failure_data
    retries = [event for event in done.all_events if event.is_step_up_for_retry]
    Thread(target=terminate_when_started, daemon=True).start()
    try:
        job = ops.execute_in_process(resources=resources, raise_on_error=False)
        ended = job.success
    except BaseException as error:
        ended = type(error).__name__
    with TrainingClient() as client:
        runs = {run.id: run.status for run in client.list()}
    print(
        json.dumps(
            {
                "made": {name: plain(e.materialization.metadata) for name, e in made.items()},
                "failure": {
                    "description": failure.description,
                    "metadata": plain(failure.metadata),
                },
                "retries": len(retries),
                "ended": ended,
                "runs": runs,
            }
        )
    )
