"""What a run leaves behind and tells on its way: adapters, merged models, measures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.plain import save_tiny
from training_backends.rundir.directory import RunDir, RunSpec, TrainerExitCode
from training_backends.trainer.loop import Plan
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk."""
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def both(make_run: MakeRun, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that leaves its adapter and the model that it was merged into."""
    run = make_run(
        tmp_path_factory.mktemp("runs") / "r",
        model=str(base),
        tuning={"kind": "lora", "rank": 4},
        result="both",
        training_steps=12,
        checkpoint_every=None,
        learning_rate=1e-2,
        dtype="float32",
        attention="eager",
    )
    assert train(run.path) is TrainerExitCode.DONE
    return run


@pytest.mark.engine
def test_the_merged_model_says_what_the_adapter_says(both: RunDir, base: Path) -> None:
    """Their logits are the same but for rounding, and not those of the base."""
    record = both.read_exit()
    assert record is not None
    assert record.result is not None
    assert (record.result.format, record.result.path) == ("full", "result")
    assert record.result.adapter == "result/adapter"
    ids = torch.tensor([[256, 259, *b"3 plus 4?", 260]])
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(both.result)
    with torch.no_grad():
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, both.path / record.result.adapter)
        expected = adapted.eval()(ids).logits
        found = merged(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-1)


@pytest.mark.engine
def test_both_can_be_loaded_by_themselves(both: RunDir) -> None:
    """Each has its tokenizer; neither names a path of this machine."""
    for directory in (both.result, both.result / "adapter"):
        assert AutoTokenizer.from_pretrained(directory).chat_template
        for path in directory.iterdir():
            assert path.is_dir() or str(both.path.parent).encode() not in path.read_bytes()
    assert not (both.result / "adapter_config.json").exists()


@pytest.mark.engine
def test_a_merged_result_has_no_adapter(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    """It is a whole model and nothing else."""
    run = make_run(
        tmp_path / "r",
        model=str(base),
        tuning="lora",
        result="merged",
        training_steps=1,
        validation=[],
    )
    assert train(run.path) is TrainerExitCode.DONE
    record = run.read_exit()
    assert record is not None
    assert record.result is not None
    assert (record.result.format, record.result.adapter) == ("full", None)
    assert not (run.result / "adapter").exists()
    AutoModelForCausalLM.from_pretrained(run.result)


@pytest.mark.engine
def test_every_step_is_told_and_validation_now_and_then(both: RunDir) -> None:
    """Loss, rate, norm, speed and memory at each step; validation ten steps apart and last."""
    rows = [row for row, _ in both.read_metrics()]
    assert [row.step for row in rows] == [*range(1, 13)]
    assert [row.step for row in rows if row.valid_loss is not None] == [10, 12]
    for row in rows:
        assert row.grad_norm is not None
        assert row.tokens_per_second is not None
        assert row.memory_bytes is not None
        assert row.tokens_per_second > 0
        assert row.memory_bytes > 2**20
        assert row.more == {}
        assert {"train_loss", "learning_rate", "tokens_per_second"} <= row.measures().keys()


@pytest.mark.parametrize(("steps", "every"), [(5, 10), (99, 10), (100, 10), (101, 11), (1000, 100)])
def test_checkpoints_are_a_tenth_apart_and_ten_steps(steps: int, every: int) -> None:
    """Unless the spec says something else."""
    values = {"run_id": "r", "model": "m", "train": ["x"], "training_steps": steps}
    plan = Plan(RunSpec.model_validate(values), [], (0,))
    assert plan.checkpoint_every == every
    plan = Plan(RunSpec.model_validate({**values, "checkpoint_every": 3}), [], (0,))
    assert plan.is_checkpoint(3)
