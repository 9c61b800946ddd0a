"""What happens when memory runs out in the middle of a run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.continuing import before_its_end, train_to_continue
from tests.trainer.plain import save_tiny
from training_backends.rundir.directory import MetricsRow, RunDir, TrainerExitCode
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.objectives.tokens import TokenObjective
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]


def test_the_number_of_rows_is_halved_until_they_fit() -> None:
    """For good, each time told, what was begun taken back."""
    tried: list[int] = []
    told: list[int] = []
    undone: list[None] = []
    micro = MicroBatch(12, told.append, lambda: "")

    def work(size: int) -> str:
        tried.append(size)
        if size > 3:
            torch.empty(2**60, dtype=torch.uint8)
        return "done"

    assert micro.attempt(work, lambda: undone.append(None)) == "done"
    assert (tried, told, len(undone)) == ([12, 6, 3], [6, 3], 2)
    assert micro.attempt(work) == "done"
    assert tried[3:] == [3]


def test_other_errors_pass() -> None:
    """Only want of memory is tried again."""
    micro = MicroBatch(4, print, lambda: "")

    def work(size: int) -> None:
        raise ValueError(size)

    with pytest.raises(ValueError, match="4"):
        micro.attempt(work)


def test_a_single_row_that_does_not_fit_ends_the_run() -> None:
    """The failure says what would fit."""
    micro = MicroBatch(2, print, lambda: "Take less.")

    def work(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainerError, match=r"one row at a time: CUDA .* Take less\.") as raised:
        micro.attempt(work)
    assert raised.value.failure.kind == "out_of_memory"


LARGE = 2**30
STARTS_ANOTHER = f"""
import os, sys
held = b"x" * {LARGE}
del held
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
TELLS = """
import sys
from types import SimpleNamespace
sys.modules["torch"] = SimpleNamespace(device=SimpleNamespace)  # takes seconds, and no part in this
from training_backends.trainer.memory import peak_memory
print(peak_memory(SimpleNamespace(type="cpu")))
"""


@pytest.mark.engine
def test_the_memory_of_a_parent_is_not_ours() -> None:
    """A process that a large one starts begins at nothing, though the system counts that on."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS_ANOTHER, TELLS], capture_output=True, text=True, check=True
    )
    assert 2**22 < int(done.stdout) < LARGE


class Short:
    """Stands in for a machine in which only so many rows fit from a certain batch on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits = 99
        self.batches = 0
        self.from_batch = 0
        compute_loss = TokenObjective.compute_loss

        def watched(objective: TokenObjective, model: Any, batch: Any) -> Any:
            self.batches += 1
            found = compute_loss(objective, model, batch)
            if self.batches > self.from_batch and len(batch["input_ids"]) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return found

        monkeypatch.setattr(TokenObjective, "compute_loss", watched)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Short:
    """A machine that runs out of memory when it is told to."""
    return Short(monkeypatch)


def numbers(run: RunDir) -> list[tuple[int, float, float | None, int]]:
    """Return what was learnt at each step."""
    rows: dict[int, MetricsRow] = {row.step: row for row, _ in run.read_metrics()}
    return [(row.step, row.train_loss, row.grad_norm, row.tokens) for row in rows.values()]


@pytest.mark.engine
def test_a_step_that_does_not_fit_begins_again_in_smaller_parts(
    make_run: MakeRun, tmp_path: Path, short: Short
) -> None:
    """Same rows, same batch, same schedule; the losses differ by rounding alone.

    With dropout the random numbers are those of the smaller parts from the step's beginning
    on, so the run equals one that was cut into these parts all along.
    """
    base = save_tiny(tmp_path / "base")
    common = {
        "model": str(base),
        "tuning": {"kind": "lora", "rank": 4, "dropout": 0.2},
        "training_steps": 4,
        "checkpoint_every": 2,
        "validation": [],
    }
    small = make_run(tmp_path / "small", micro_batch_size=2, **common)
    assert train(small.path) is TrainerExitCode.DONE
    short.fits = 2
    halved = make_run(tmp_path / "halved", **common)
    assert train(halved.path) is TrainerExitCode.DONE
    assert numbers(halved) == numbers(small)
    (told,) = [e for e, _ in halved.read_events() if e.level == "warning"]
    assert (told.message, told.data) == (
        "Out of memory: retrying with 2 rows at a time",
        {"micro_batch_size": 2},
    )


@pytest.mark.engine
def test_a_continued_run_keeps_to_what_fitted(
    make_run: MakeRun, tmp_path: Path, short: Short
) -> None:
    """Bit-equal to the run that was not stopped, although the rows would all fit again."""
    common = {"training_steps": 6, "checkpoint_every": 2, "validation": []}
    short.fits, short.from_batch = 2, 1  # from the second step on
    finished = make_run(tmp_path / "r", **common)
    assert train_to_continue(finished) is TrainerExitCode.DONE
    whole = numbers(finished)
    short.fits = 99
    run = before_its_end(finished, tmp_path / "again")
    for name in ("step-4", "step-6"):
        (run.checkpoints / name / "state.json").unlink()
    assert train(run.path) is TrainerExitCode.DONE
    assert numbers(run) == whole


@pytest.mark.engine
def test_no_room_for_a_row_is_a_failure_with_advice(
    make_run: MakeRun, tmp_path: Path, short: Short
) -> None:
    """Kind out_of_memory; names tuning, checkpointing and the length, with figures."""
    short.fits = 0
    run = make_run(tmp_path / "r", training_steps=2, validation=[], seq_len=1024)
    assert train(run.path) is TrainerExitCode.CRASHED
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert record.failure.kind == "out_of_memory"
    for advice in ("tuning: lora", "gradient_checkpointing: true", "seq_len: 512", "GiB"):
        assert advice in record.failure.message


@pytest.mark.engine
def test_validation_shrinks_too(make_run: MakeRun, tmp_path: Path, short: Short) -> None:
    """Its loss is the mean over all rows whichever way they are cut up."""
    whole = make_run(tmp_path / "whole", training_steps=1)
    assert train(whole.path) is TrainerExitCode.DONE
    short.batches, short.from_batch, short.fits = 0, 1, 1  # from the validation on
    halved = make_run(tmp_path / "halved", training_steps=1)
    assert train(halved.path) is TrainerExitCode.DONE
    (one,), (other,) = ([row for row, _ in run.read_metrics()] for run in (whole, halved))
    assert other.valid_loss == pytest.approx(one.valid_loss, rel=1e-6)
    assert other.valid_mean_token_accuracy == one.valid_mean_token_accuracy
