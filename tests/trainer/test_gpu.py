"""What only a GPU can show; all of it is left out where there is none."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import Engine
from tests.trainer.continuing import last_step
from tests.trainer.tasks import METHODS, changes_for, write_tasks
from tests.waiting import wait_until
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.process import train

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MakeRun = Callable[..., RunDir]

ROUNDING = 2e-3
"""Relative, over eight steps: kernels of a GPU add in another order."""
HALVED = 5e-2
"""The same where one side computes in bfloat16, which has eight bits."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the rows of each method."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def losses(run: RunDir) -> list[float]:
    """Train a run to its end and return what was lost at each step."""
    assert train(run.path) is TrainerExitCode.DONE, run.read_exit()
    return [row.train_loss for row, _ in run.read_metrics()]


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_processor(
    make_run: MakeRun, tasks: Path, tmp_path: Path, method: str
) -> None:
    """In float32; computing twice changes nothing."""
    changes = {**changes_for(method, tasks), "dtype": "float32"}
    expected = losses(make_run(tmp_path / "cpu", **changes))
    found = losses(make_run(tmp_path / "gpu", **changes, device="cuda"))
    assert found == pytest.approx(expected, rel=ROUNDING)


def test_bfloat16_comes_near(make_run: MakeRun, tasks: Path, tmp_path: Path) -> None:
    """It is what a GPU computes in if nothing else is asked for."""
    changes = changes_for("all weights", tasks)
    expected = losses(make_run(tmp_path / "cpu", **changes))
    found = losses(make_run(tmp_path / "gpu", **changes, device="cuda"))
    assert found == pytest.approx(expected, rel=HALVED)


def test_a_base_in_four_bits_is_trained_and_merged(
    make_run: MakeRun, tasks: Path, tmp_path: Path
) -> None:
    """As on a processor, whose bits are the same."""
    pytest.importorskip("bitsandbytes")
    changes = {**changes_for("all weights", tasks), "tuning": {"kind": "qlora", "rank": 4}}
    changes |= {"result": "both", "learning_rate": 1e-2, "dtype": "float32"}
    expected = losses(make_run(tmp_path / "cpu", **changes))
    run = make_run(tmp_path / "gpu", **changes, device="cuda")
    assert losses(run) == pytest.approx(expected, rel=HALVED)
    assert (run.result / "adapter" / "adapter_model.safetensors").is_file()
    assert (run.result / "model.safetensors").is_file()


def test_kernels_change_nothing(make_run: MakeRun, tasks: Path, tmp_path: Path) -> None:
    """And the run says that it has used them."""
    pytest.importorskip("liger_kernel")
    changes = {**changes_for("all weights", tasks), "dtype": "float32", "device": "cuda"}
    expected = losses(make_run(tmp_path / "without", **changes, kernels="none"))
    run = make_run(tmp_path / "with", **changes)
    assert losses(run) == pytest.approx(expected, rel=ROUNDING)
    assert any("liger-kernel" in event.message for event, _ in run.read_events())


def test_flash_attention_keeps_packed_rows_apart(
    make_run: MakeRun, tasks: Path, tmp_path: Path
) -> None:
    """It is given the rows in one line, and finds their ends by itself."""
    pytest.importorskip("flash_attn")
    changes = {**changes_for("packing", tasks), "device": "cuda", "dtype": "bfloat16"}
    expected = losses(make_run(tmp_path / "sdpa", **changes))
    found = losses(make_run(tmp_path / "flash", **changes, attention="flash_attention_2"))
    assert found == pytest.approx(expected, rel=HALVED)


def test_rows_that_do_not_fit_are_halved(make_run: MakeRun, tasks: Path, tmp_path: Path) -> None:
    """With the same losses; how many fit is told."""
    rows = tmp_path / "long.jsonl"
    rows.write_text('{"text": "%s"}\n' % ("word " * 400) * 64)
    changes: dict[str, Any] = {"model": str(tasks / "base"), "train": [rows], "validation": []}
    changes |= {"training_steps": 2, "batch_size": 64, "dtype": "float32", "device": "cuda"}
    changes |= {"gradient_checkpointing": False}
    expected = losses(make_run(tmp_path / "small", **changes, micro_batch_size=2))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        run = make_run(tmp_path / "large", **changes)
        assert losses(run) == pytest.approx(expected, rel=ROUNDING)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    told = [event.data.get("micro_batch_size") for event, _ in run.read_events()]
    assert 32 in told


def test_stopped_and_continued_the_losses_are_nearly_the_same(
    make_run: MakeRun, tasks: Path, engine: Engine, tmp_path: Path
) -> None:
    """With dropout: the state of the GPU's random numbers is kept."""
    changes = {**changes_for("all weights", tasks), "dtype": "float32", "device": "cuda"}
    changes |= {"training_steps": 200, "tuning": {"kind": "lora", "rank": 4, "dropout": 0.2}}
    expected = losses(make_run(tmp_path / "whole", **changes))
    run = make_run(tmp_path / "r", **changes)
    child = engine.start("train", run.path)
    wait_until(lambda: child.poll() is not None or last_step(run) >= 20)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == TrainerExitCode.STOPPED
    assert losses(run) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_learn_what_one_learns(
    make_run: MakeRun, tasks: Path, engine: Engine, tmp_path: Path, method: str
) -> None:
    """Their gradients are summed by NCCL."""
    changes = {**changes_for(method, tasks), "dtype": "float32", "device": "cuda"}
    expected = losses(make_run(tmp_path / "one", **changes))
    run = make_run(tmp_path / "two", **changes, num_processes=2)
    assert engine.start("train", run.path).wait() == TrainerExitCode.DONE, run.read_exit()
    found = [row.train_loss for row, _ in run.read_metrics()]
    assert found == pytest.approx(expected, rel=ROUNDING)
