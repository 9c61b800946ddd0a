"""Several processes that train together: what they learn, and how they end."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.effort import is_thorough
from tests.forking import Trainer
from tests.trainer.continuing import hashes, last_step, rows_by_step
from tests.trainer.tasks import METHODS, changes_for, write_tasks
from tests.waiting import wait_until
from training_backends.core.run import Failure
from training_backends.rundir.directory import MetricsRow, RunDir, TrainerExitCode
from training_backends.trainer import process
from training_backends.trainer.checkpoint import write_checkpoint
from training_backends.trainer.control import StopRequest
from training_backends.trainer.distributed import SINGLE_PROCESS, ProcessGroup
from training_backends.trainer.errors import ProcessLost, Stopped, TrainerError, failure_of
from training_backends.trainer.loop import TrainingLoop
from training_backends.trainer.process import train
from training_backends.trainer.run import TrainingProcess
from training_backends.trainer.workers import followed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the rows of each method."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def rows_of(run: RunDir) -> list[MetricsRow]:
    return [row for row, _ in run.read_metrics()]


@pytest.mark.parametrize("method", METHODS if is_thorough() else ("packing", "classifier"))
def test_together_they_learn_what_one_learns(
    make_run: MakeRun, tasks: Path, tmp_path: Path, method: str
) -> None:
    """Loss, accuracy and gradients agree at every step, though shares and rows differ in size."""
    changes = changes_for(method, tasks)
    alone = make_run(tmp_path / "alone", **changes)
    assert train(alone.path) is TrainerExitCode.DONE
    together = make_run(tmp_path / "together", **changes, num_processes=2, micro_batch_size=1)
    assert train(together.path) is TrainerExitCode.DONE, together.read_exit()
    machine = {"tokens_per_second", "memory_bytes"}
    for one, two in zip(rows_of(alone), rows_of(together), strict=True):
        expected = {k: v for k, v in one.measures().items() if k not in machine}
        found = {k: v for k, v in two.measures().items() if k not in machine}
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-6)


def start(trainer: Trainer, run: RunDir, *, step: int = 1) -> int:
    """Start a run and wait until it has come to a step; return the id of its process."""
    pid = trainer.start(run)
    wait_until(
        lambda: run.exit.exists() or (run.is_active() and last_step(run) >= step), patience=200
    )
    assert not run.exit.exists(), run.read_exit()
    return pid


def followers_of(pid: int) -> list[int]:
    """Return the ids of the processes that follow one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def ended(pid: int) -> bool:
    """Tell whether a process is not there, or only still listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def long_run(make_run: MakeRun, tmp_path: Path) -> RunDir:
    """A run of two processes that would take long."""
    return make_run(tmp_path / "long", training_steps=5000, checkpoint_every=1000, num_processes=2)


def test_interrupted_and_continued_every_number_is_the_same(
    make_run: MakeRun, tasks: Path, trainer: Trainer, tmp_path: Path
) -> None:
    """By SIGTERM to all of them and by SIGKILL, which followers do not outlive; with dropout."""
    changes: dict[str, Any] = {"training_steps": 12, "checkpoint_every": 3}
    changes |= {"model": str(tasks / "base"), "tuning": {"kind": "lora", "rank": 4, "dropout": 0.2}}
    whole = make_run(tmp_path / "whole", **changes, num_processes=2)
    assert train(whole.path) is TrainerExitCode.DONE
    run = make_run(tmp_path / "r", **changes, num_processes=2)

    pid = start(trainer, run, step=4)
    os.killpg(pid, signal.SIGTERM)
    assert trainer.end() == TrainerExitCode.STOPPED
    assert run.read_checkpoints()[-1][1].step == last_step(run) < 12
    run.exit.unlink()
    pid = start(trainer, run, step=last_step(run) + 1)
    (follower,) = followers_of(pid)
    os.kill(pid, signal.SIGKILL)
    assert trainer.end() == -signal.SIGKILL
    wait_until(lambda: ended(follower))
    assert train(run.path) is TrainerExitCode.DONE
    assert rows_by_step(run) == rows_by_step(whole)
    assert hashes(run) == hashes(whole)


def test_a_follower_that_dies_fails_the_run_at_once(trainer: Trainer, long_run: RunDir) -> None:
    """The leader, which waits for it, notices, and says that it may be tried again."""
    pid = start(trainer, long_run)
    os.kill(followers_of(pid)[0], signal.SIGKILL)
    assert trainer.end() == TrainerExitCode.CRASHED
    record = long_run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert (record.failure.kind, record.failure.retryable) == ("lost", True)
    assert "process 2 of 2" in record.failure.message
    assert "signal 9" in record.failure.message


def begin(trainer: Trainer, run: RunDir) -> tuple[int, int]:
    """Start a run and return as soon as there is a follower, which has loaded nothing yet."""
    pid = trainer.start(run)
    (follower,) = wait_until(lambda: followers_of(pid))
    return pid, follower


def test_a_follower_that_has_not_begun_ends_with_its_leader(
    trainer: Trainer, long_run: RunDir
) -> None:
    """It does not look for a leader that is not there."""
    pid, follower = begin(trainer, long_run)
    os.kill(pid, signal.SIGKILL)
    trainer.end()
    wait_until(lambda: ended(follower))


def test_a_stop_that_comes_before_a_follower_listens(trainer: Trainer, long_run: RunDir) -> None:
    """Sent to all of them, it is the leader's to obey, as ever."""
    pid, _ = begin(trainer, long_run)
    os.killpg(pid, signal.SIGTERM)
    assert trainer.end() == TrainerExitCode.STOPPED, long_run.read_exit()


def test_a_stop_without_a_checkpoint_ends_all(trainer: Trainer, long_run: RunDir) -> None:
    """As it does for one."""
    pid = start(trainer, long_run)
    (follower,) = followers_of(pid)
    long_run.request_stop(save_checkpoint=False)
    assert trainer.end() == TrainerExitCode.STOPPED
    assert long_run.read_checkpoints() == []
    wait_until(lambda: ended(follower))


def test_fewer_gpus_than_processes_are_told(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run = make_run(tmp_path / "r", device="auto", num_processes=2)
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "num_processes is 2, but only 1" in record.failure.message


def test_a_run_is_resumed_with_another_number_of_processes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Losses and gradients continue as if the number had not changed, up to rounding."""
    changes = {"training_steps": 6, "checkpoint_every": 3}
    alone = make_run(tmp_path / "alone", **changes)
    assert train(alone.path) is TrainerExitCode.DONE
    run = make_run(tmp_path / "r", **changes, num_processes=2)
    assert train(run.path) is TrainerExitCode.DONE, run.read_exit()
    run.exit.unlink()
    run.metrics.unlink()
    shutil.rmtree(run.checkpoints / "step-6")
    make_run(run.path, **changes)
    assert train(run.path) is TrainerExitCode.DONE, run.read_exit()
    found = [(row.step, row.train_loss, row.grad_norm) for row in rows_of(run)]
    expected = [(row.step, row.train_loss, row.grad_norm) for row in rows_of(alone)[3:]]
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=2e-6)


SAYS = """
import sys
print({said!r})
sys.exit(1)
"""


def test_rows_that_changed_between_two_readers_are_told(make_run: MakeRun, tmp_path: Path) -> None:
    """They would wait for each other at different steps."""

    class Torn(ProcessGroup):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, []]

    run = make_run(tmp_path / "r")
    with pytest.raises(TrainerError, match="changed while"):
        TrainingProcess(run, run.read_spec(), StopRequest(run.stop), Torn()).run()


def test_the_others_are_let_go_before_the_result_is_saved(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Saving may take long, and what they hold, or how they end, does not matter any more."""
    run = make_run(tmp_path / "r", training_steps=2, validation=[])
    saved: list[bool] = []
    work = TrainingProcess(
        run,
        run.read_spec(),
        StopRequest(run.stop),
        on_trained=lambda: saved.append(run.result.exists()),
    )
    assert work.run()
    assert saved == [False]
    assert run.result.exists()


def test_a_weight_that_nobody_used_has_no_gradient() -> None:
    """An optimizer lets those decay that have one, be it zero."""

    class Two(ProcessGroup):
        def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
            loss, users, *gradients = tensors
            loss += 3
            users += torch.tensor([1.0, 1.0, 0.0])
            for gradient in gradients[:2]:
                gradient.add_(5)

    loop = TrainingLoop.__new__(TrainingLoop)
    loop._weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    loop._group = Two()
    loop._weights[0].grad = torch.ones(2)
    loss = torch.tensor(1.0)
    loop._sum_gradients(loss)
    assert loss.item() == 4
    found = [
        weight.grad if weight.grad is None else weight.grad.tolist() for weight in loop._weights
    ]
    assert found == [[6, 6], [5, 5], None]


def test_nobody_else_reaches_what_they_meet_at() -> None:
    """Who does could send them anything; any other address stands for other machines."""
    group = ProcessGroup(size=2)
    socket.create_connection(("127.0.0.1", group.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", group.port))


def test_an_end_that_cannot_be_written_is_one_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread would wait forever."""
    codes: list[int] = []
    monkeypatch.setattr(process, "os", SimpleNamespace(_exit=codes.append))
    with pytest.raises(FileNotFoundError):
        process._end_at_once(RunDir(tmp_path / "no"), TrainerError("gone", kind="lost"))
    assert codes == [TrainerExitCode.CRASHED]


def never(error: TrainerError) -> None:
    raise AssertionError(error)


def saying(failure: Failure) -> list[str]:
    """Return a program that fails and says why."""
    return [sys.executable, "-c", SAYS.format(said=failure.model_dump_json())]


def lead(program: list[str], error: Exception, others: int = 1, grace: float = 10.0) -> None:
    """Fail with an error while those who follow are such programs."""
    with followed(never, program, grace) as followers:
        followers.start(Path(), [None] * others)
        raise error


@pytest.mark.parametrize("wanted", [TrainerError("no"), Stopped()])
def test_what_the_leader_itself_says_goes_first(wanted: Exception) -> None:
    """Followers fail for it, not it for them."""
    with pytest.raises(type(wanted)) as caught:
        lead(saying(Failure(kind="internal", message="the connection is closed")), wanted)
    assert caught.value is wanted


def test_an_error_that_a_follower_caused_is_told_as_its() -> None:
    """The connection is closed because somebody had no memory."""
    failure = Failure(kind="out_of_memory", message="no room")
    with pytest.raises(TrainerError) as caught:
        lead(saying(failure), ProcessLost("connection closed by peer"))
    assert caught.value.failure == failure


def test_an_error_of_the_leader_is_not_put_on_those_who_fail_for_it() -> None:
    """They find the connection closed because it had no memory."""
    failure = Failure(kind="internal", message="connection closed by peer")
    with pytest.raises(MemoryError):
        lead(saying(failure), MemoryError())


BY_RANK = """
import os, signal, sys, time
if sys.argv[2] == "--rank=1":
    print({said!r})
    sys.exit(1)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_one_that_died_is_named_not_those_who_left_for_it() -> None:
    """However long the system takes to tell of it."""
    said = failure_of(ProcessLost("connection closed by peer"))
    program = [sys.executable, "-c", BY_RANK.format(said=said.model_dump_json())]
    with pytest.raises(TrainerError, match="process 3 of 3"):
        lead(program, ProcessLost("connection closed by peer"), others=2)


def test_one_who_lost_the_others_is_told_where_nobody_else_is() -> None:
    """It may be tried again."""
    lost = ProcessLost("timed out")
    with pytest.raises(TrainerError, match="another training process: timed out") as caught:
        lead(saying(failure_of(lost)), lost, grace=0.5)
    assert (caught.value.failure.kind, caught.value.failure.retryable) == ("lost", True)


def test_a_checkpoint_that_one_died_over_is_not_put_on_the_disk(tmp_path: Path) -> None:
    """Who died is told where that is known; half a checkpoint is not left."""

    def fill(directory: Path) -> None:
        raise ProcessLost(f"nobody writes {directory} any more")

    run = RunDir(tmp_path)
    with pytest.raises(ProcessLost):
        write_checkpoint(run, 1, fill, metrics={}, scheduled=True, keep=1)
    assert not list(run.checkpoints.iterdir())


def test_a_leader_that_waits_forever_is_ended() -> None:
    """As for a GPU that will not answer: it is told from another thread."""
    failure = Failure(kind="internal", message="broken")
    told: list[TrainerError] = []
    with followed(told.append, saying(failure), grace=0.01) as followers:
        followers.start(Path(), [None])
        wait_until(lambda: told)
    assert told[0].failure == failure


def test_an_error_of_its_own_stays_what_it_is() -> None:
    """Without followers nobody else can be the cause."""
    with pytest.raises(RuntimeError, match="mine"), followed(never):
        raise RuntimeError("mine")


@given(st.lists(st.integers()), st.integers(1, 5))
def test_what_is_shared_out_is_put_together_again(values: list[int], size: int) -> None:
    """In its order."""
    shares = [values[rank::size] for rank in range(size)]
    group = ProcessGroup.__new__(ProcessGroup)
    group.size = size
    assert group.unshard(shares) == values


def test_one_alone_has_everything() -> None:
    """It waits for nobody."""
    assert SINGLE_PROCESS.is_leader
    assert SINGLE_PROCESS.shard([1, 2]) == [1, 2]
    assert SINGLE_PROCESS.unshard([[1, 2]]) == [1, 2]
    assert (SINGLE_PROCESS.broadcast(3), SINGLE_PROCESS.all_gather(3)) == (3, [3])
