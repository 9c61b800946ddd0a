"""Several processes that train together: what they learn, and how they end."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.conftest import Engine
from tests.engine.continuing import hashes, last_step, rows_by_step
from tests.engine.plain import save_tiny
from tests.waiting import wait_until
from training_backends.core.run import Failure
from training_backends.engine import leading
from training_backends.engine.errors import EngineError, Stopped
from training_backends.engine.leading import followed
from training_backends.engine.team import ALONE, Team
from training_backends.engine.training import train
from training_backends.rundir.directory import ExitCode, MetricsRow, RunDir

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for each method, of very different lengths, and a model to put adapters on."""
    path = tmp_path_factory.mktemp("data")
    save_tiny(path / "base")
    chats: list[object] = []
    pairs: list[object] = []
    labels: list[object] = []
    for n in range(40):
        question = {"role": "user", "content": "why? " * (1 + n % 7)}
        good = {"role": "assistant", "content": f"Because of {n}. " * (1 + n % 5)}
        bad = {"role": "assistant", "content": "No."}
        chats.append({"messages": [question, good]})
        pairs.append({"prompt": [question], "chosen": [good], "rejected": [bad]})
        named = {"mood": "xy"[n % 4 // 2]}
        if n % 3:  # so that a share of a step may have none of these
            named["topic"] = "ab"[n % 2]
        labels.append({"text": f"{n} " * (1 + n % 9), "labels": named})
    for name, rows in {"sft": chats, "dpo": pairs, "classifier": labels}.items():
        (path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows_of(run: RunDir) -> list[MetricsRow]:
    return [row for row, _ in run.read_metrics()]


LORA = {"kind": "lora", "rank": 4}
TARGETS = [{"name": "mood", "labels": ["x", "y"]}, {"name": "topic", "labels": ["a", "b"]}]
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "packing": {"packing": True, "seq_len": 200},
    "pairs, LoRA": {"method": "dpo", "tuning": LORA},
    "classifier": {"method": "classifier", "classifier_targets": TARGETS},
}


@pytest.mark.parametrize("method", METHODS)
def test_together_they_learn_what_one_learns(
    make_run: MakeRun, files: Path, engine: Engine, tmp_path: Path, method: str
) -> None:
    """Loss, accuracy and gradients agree at every step, though shares and rows differ in size."""
    changes = {"training_steps": 8, "batch_size": 5, "checkpoint_every": 4, **METHODS[method]}
    path = files / f"{changes.get('method', 'sft')}.jsonl"
    changes |= {"train": [path], "validation": [path], "model": str(files / "base")}
    alone = make_run(tmp_path / "alone", **changes)
    assert train(alone.path) is ExitCode.DONE
    together = make_run(tmp_path / "together", **changes, num_processes=2, micro_batch_size=1)
    child = engine.start("train", together.path)
    assert child.wait() == ExitCode.DONE, child.communicate()
    machine = {"tokens_per_second", "memory_bytes"}
    for one, two in zip(rows_of(alone), rows_of(together), strict=True):
        expected = {k: v for k, v in one.measures().items() if k not in machine}
        found = {k: v for k, v in two.measures().items() if k not in machine}
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-6)


def start(engine: Engine, run: RunDir, *, step: int = 1) -> Any:
    """Start a run and wait until it has come to a step."""
    child = engine.start("train", run.path)
    wait_until(lambda: child.poll() is not None or (run.is_active() and last_step(run) >= step))
    assert child.poll() is None, child.communicate()
    return child


def followers_of(child: Any) -> list[int]:
    """Return the ids of the processes that follow one."""
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text()
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
    make_run: MakeRun, files: Path, engine: Engine, tmp_path: Path
) -> None:
    """By SIGTERM to all of them and by SIGKILL, with dropout."""
    changes: dict[str, Any] = {"training_steps": 40, "checkpoint_every": 10}
    changes |= {"model": str(files / "base"), "tuning": {**LORA, "dropout": 0.2}}
    whole = make_run(tmp_path / "whole", **changes, num_processes=2)
    assert engine.start("train", whole.path).wait() == ExitCode.DONE
    run = make_run(tmp_path / "r", **changes, num_processes=2)

    child = start(engine, run, step=13)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait() == ExitCode.STOPPED
    assert run.read_checkpoints()[-1][1].step == last_step(run) < 40
    child = start(engine, run, step=last_step(run) + 2)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert engine.start("train", run.path).wait() == ExitCode.DONE
    assert rows_by_step(run) == rows_by_step(whole)
    assert hashes(run) == hashes(whole)


def test_followers_end_with_their_leader(engine: Engine, long_run: RunDir) -> None:
    """Nobody goes on to use a GPU for a run that is dead."""
    child = start(engine, long_run)
    (follower,) = followers_of(child)
    child.kill()
    child.wait()
    wait_until(lambda: ended(follower))


def test_a_follower_that_dies_fails_the_run_at_once(engine: Engine, long_run: RunDir) -> None:
    """The leader, which waits for it, notices, and says that it may be tried again."""
    child = start(engine, long_run)
    os.kill(followers_of(child)[0], signal.SIGKILL)
    assert child.wait(60) == ExitCode.CRASHED
    record = long_run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert (record.failure.kind, record.failure.retryable) == ("lost", True)
    assert "Process 2 of the 2" in record.failure.message
    assert "signal 9" in record.failure.message


def test_a_stop_without_a_checkpoint_ends_all(engine: Engine, long_run: RunDir) -> None:
    """As it does for one."""
    child = start(engine, long_run)
    (follower,) = followers_of(child)
    long_run.request_stop(save_checkpoint=False)
    assert child.wait(60) == ExitCode.STOPPED
    assert long_run.read_checkpoints() == []
    wait_until(lambda: ended(follower))


def test_fewer_gpus_than_processes_are_told(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run = make_run(tmp_path / "r", device="auto", num_processes=2)
    assert train(run.path) is ExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "num_processes is 2, and this machine shows 1" in record.failure.message


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Each has the optimizer's state of its own part."""
    run = make_run(tmp_path / "r", training_steps=4, checkpoint_every=2)
    assert train(run.path) is ExitCode.DONE
    run.exit.unlink()
    state = run.checkpoints / "step-4" / "engine.json"
    content = json.loads(state.read_bytes())
    state.write_text(json.dumps({**content, "processes": 2}))
    changed = run.checkpoints / "step-4" / "state.json"
    record = json.loads(changed.read_bytes())
    record["files"]["engine.json"] = state.stat().st_size
    del record["checksums"]
    changed.write_text(json.dumps(record))
    assert train(run.path) is ExitCode.BAD_INPUT
    end = run.read_exit()
    assert end is not None
    assert end.failure is not None
    assert "num_processes: 2" in end.failure.message


SAYS = """
import sys
print({said!r})
sys.exit(1)
"""


def never(error: EngineError) -> None:
    raise AssertionError(error)


def saying(failure: Failure) -> list[str]:
    """Return a program that fails and says why."""
    return [sys.executable, "-c", SAYS.format(said=failure.model_dump_json())]


def lead(failure: Failure, error: Exception) -> None:
    """Fail with an error while a follower fails for a reason of its own."""
    with followed(never, saying(failure)) as followers:
        followers.start(Path(), 0, [None])
        raise error


@pytest.mark.parametrize("wanted", [EngineError("no"), Stopped()])
def test_what_the_leader_itself_says_goes_first(wanted: Exception) -> None:
    """Followers fail for it, not it for them."""
    with pytest.raises(type(wanted)) as caught:
        lead(Failure(kind="internal", message="the connection is closed"), wanted)
    assert caught.value is wanted


def test_an_error_that_a_follower_caused_is_told_as_its() -> None:
    """The connection is closed because somebody had no memory."""
    failure = Failure(kind="out_of_memory", message="no room")
    with pytest.raises(EngineError) as caught:
        lead(failure, RuntimeError("connection closed by peer"))
    assert caught.value.failure == failure


def test_a_leader_that_waits_forever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU that will not answer: it is told from another thread."""
    monkeypatch.setattr(leading, "_GRACE", 0.01)
    failure = Failure(kind="internal", message="broken")
    told: list[EngineError] = []
    with followed(told.append, saying(failure)) as followers:
        followers.start(Path(), 0, [None])
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
    team = Team.__new__(Team)
    team.size = size
    assert team.join(shares) == values


def test_one_alone_has_everything() -> None:
    """It waits for nobody."""
    assert ALONE.leads
    assert ALONE.share([1, 2]) == [1, 2]
    assert ALONE.join([[1, 2]]) == [1, 2]
    assert (ALONE.tell(3), ALONE.gather(3)) == (3, [3])
