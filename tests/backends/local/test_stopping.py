"""A stop, or a container's end, that reaches the training process, and no other process."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from mistralai.client import Mistral

from tests.backends.local.conftest import is_over, until_state
from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import RunDir

pytestmark = pytest.mark.anyio

CHILD = str(Path(__file__).with_name("child.py"))
ISOLATED = ("unshare", "--pid", "--fork", "--mount-proc")

SETUP = f"""
import anyio, os, signal, sys
from pathlib import Path
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.run import TrainingRun
from training_backends.rundir.directory import RunDir
from training_backends.testing.journal import MemoryJournal

home, run = Path(sys.argv[1]), TrainingRun.model_validate_json(sys.argv[2])
backend = LocalBackend(home, program=(sys.executable, {CHILD!r}))
directory = RunDir(home / "runs" / run.id)

def ids_up_to(last):
    "Use up process ids, so that the next one is higher."
    while True:
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        if child >= last:
            return
"""
LAUNCH = """
ids_up_to(200)
anyio.run(backend.launch, run, MemoryJournal(run))
while directory.active_pid() is None:
    anyio.run(anyio.sleep, 0.01)
# It obeys the stop file only later, so that it still holds its lock during the stop.
os.kill(directory.active_pid(), signal.SIGSTOP)
print("launched", flush=True)
sys.stdin.readline()
os.kill(directory.active_pid(), signal.SIGCONT)
sys.stdin.read()
"""
STOP = """
wanted = directory.active_pid()
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # unshare ignores it
ids_up_to(wanted - 1)
waiting, end = os.pipe()
victim = os.fork()
if victim == 0:
    os.close(end)
    os.read(waiting, 1)
    os._exit(0)
assert victim == wanted, (victim, wanted)
anyio.run(backend.stop, run)
os.close(end)
_, status = os.waitpid(victim, 0)
print(status, flush=True)
"""


def _can_isolate() -> bool:
    try:
        done = subprocess.run([*ISOLATED, "true"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not _can_isolate(), reason="needs the right to make pid namespaces")
async def test_a_process_of_another_container_with_the_same_id_is_left_alone(
    home: Path, make_run: Callable[..., TrainingRun]
) -> None:
    """Two pid namespaces share the state: only the training ends, through the stop file."""
    run = make_run()
    command = [*ISOLATED, sys.executable, "-c"]
    given = [str(home), run.model_dump_json()]
    with subprocess.Popen(
        [*command, SETUP + LAUNCH, *given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "launched\n"
        stopping = [*command, SETUP + STOP, *given]
        done = await anyio.run_process(stopping, stderr=None)
        assert done.stdout == b"0\n", "the process with that id was killed"
        assert training.stdin is not None
        training.stdin.write("go on\n")
        training.stdin.flush()
        state = await until_state(LocalBackend(home), run, is_over)
        assert state.status is TrainingStatus.CANCELLED
        training.communicate(timeout=60)


@pytest.mark.skipif(not _can_isolate(), reason="needs the right to make pid namespaces")
@pytest.mark.engine
@pytest.mark.e2e
@pytest.mark.timeout(300)
async def test_the_end_of_a_container_saves_the_training_in_it(home: Path, data: Path) -> None:
    """`serve` is its process 1, whose end kills all others: a SIGTERM suspends them first."""
    environment = {
        **os.environ,
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": (key := secrets.token_urlsafe(24)),
    }
    command = [sys.executable, "-m", "training_backends", "serve", "--port", "0", "--json"]
    with subprocess.Popen(
        [*ISOLATED, "--kill-child", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as container:
        assert container.stdout is not None
        assert container.stderr is not None
        url = json.loads(container.stdout.readline())["url"]
        client = Mistral(api_key=key, server_url=url)
        with (data / "train.jsonl").open("rb") as handle:
            file = await to_thread.run_sync(
                lambda: client.files.upload(file={"file_name": "a.jsonl", "content": handle})
            )
        await to_thread.run_sync(
            lambda: client.fine_tuning.jobs.create(
                model="tiny-mistral",
                training_files=[{"file_id": file.id, "weight": 1}],
                hyperparameters={"training_steps": 10_000},
                auto_start=True,
            )
        )
        metrics = await until(lambda: [*home.glob("**/metrics.jsonl")])
        run = RunDir(metrics[0].parent)
        await until(run.read_newest_metrics)
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
        os.kill(int(children.read_text()), signal.SIGTERM)
        _, said = await to_thread.run_sync(container.communicate)
    assert "Runs saved: 1." in said
    assert not run.is_active()
    assert run.read_exit() is None
    assert run.read_events()[-1][0].data["status"] == "queued"
    assert len(run.read_checkpoints()) == 1
