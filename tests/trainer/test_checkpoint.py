"""The best checkpoint as the result, early stopping, and any checkpoint made a model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pages import code_blocks
from tests.trainer.continuing import KEPT, train_to_continue
from tests.trainer.plain import save_tiny
from training_backends.rundir.checkpoints import find_best
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.__main__ import main
from training_backends.trainer.checkpoint import load_tensors, trained_weights
from training_backends.trainer.control import EarlyStopping
from training_backends.trainer.loop import make_optimizer
from training_backends.trainer.process import train

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="module")
def overfitted(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that forgets at last what it was validated on: its result is the best checkpoint."""
    directory = tmp_path_factory.mktemp("runs")
    valid = directory / "valid.jsonl"
    valid.write_text('{"text": "0123456789 0123456789"}\n')
    other = directory / "other.jsonl"
    other.write_text('{"text": "zzzzzzzzzzzzzzzzzzzzzzzz"}\n')
    run = make_run(
        directory / "r",
        train=[other],
        validation=[valid],
        training_steps=8,
        checkpoint_every=1,
        keep_checkpoints=2,
        learning_rate=1e-2,
        warmup_fraction=0,
        batch_size=1,
        result_checkpoint="best",
        sample_prompt="0",
        sample_max_tokens=1,
    )
    assert train_to_continue(run) is TrainerExitCode.DONE
    return run


def losses(run: RunDir) -> dict[int, float]:
    """Return the validation loss at each checkpoint."""
    rows = [row for row, _ in run.read_metrics()]
    return {row.step: row.valid_loss for row in rows if row.valid_loss is not None}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a model on disk."""
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return found


def test_the_result_is_the_checkpoint_with_the_lowest_validation_loss(overfitted: RunDir) -> None:
    """It is kept beyond the newest, and the record, the log and the card name its step."""
    measured = losses(overfitted)
    best = min(measured, key=measured.__getitem__)
    assert best < 7, "or the test shows nothing"
    kept = [state.step for _, state in overfitted.read_checkpoints()]
    assert kept == [best, 7, 8]
    record = overfitted.read_exit()
    assert record is not None
    assert record.result is not None
    assert (record.step, record.result.step) == (8, best)
    said = [event.message for event, _ in overfitted.read_events()]
    assert f"checkpoint at step {best}: validation loss {measured[best]:.4f}" in "\n".join(said)
    card = (overfitted.result / "README.md").read_text()
    assert f"The weights are those of step {best}." in card


def test_the_page_loads_a_result(overfitted: RunDir) -> None:
    """Its program finds the model and the tokenizer."""
    (program,) = (each.text for each in code_blocks("local.md") if each.title == "load.py")
    names: dict[str, Any] = {}
    exec(program.replace("DIR", str(overfitted.result)), names)
    assert names["model"].config.vocab_size >= len(names["tokenizer"])


def test_any_checkpoint_becomes_a_model(overfitted: RunDir, tmp_path: Path) -> None:
    """The best is the result, the last is not; each has its tokenizer and card."""
    found = find_best(overfitted)
    assert found is not None
    for name in (found.path.name, "step-8"):
        assert main(["export", str(overfitted.path), name, str(tmp_path / name)]) == 0
    result, best, last = map(
        weights_of, (overfitted.result, tmp_path / found.path.name, tmp_path / "step-8")
    )
    assert all(torch.equal(result[name], best[name]) for name in result)
    assert not all(torch.equal(result[name], last[name]) for name in result)
    assert AutoTokenizer.from_pretrained(tmp_path / "step-8").chat_template
    assert "of step 8." in (tmp_path / "step-8" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] != []
    assert not [*tmp_path.glob(".*")]


def test_a_damaged_best_checkpoint_leaves_the_last_state(
    overfitted: RunDir, tmp_path: Path, make_run: MakeRun
) -> None:
    """With a warning; the run is not lost."""
    run = make_run(
        tmp_path / "r",
        **{
            **overfitted.read_spec().model_dump(exclude={"version", "run_id"}),
            "training_steps": 9,
        },
    )
    shutil.copytree(overfitted.path / KEPT, run.checkpoints)
    found = find_best(run)
    assert found is not None
    for path in found.path.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    assert train(run.path) is TrainerExitCode.DONE
    record = run.read_exit()
    assert record is not None
    assert record.result is not None
    assert record.result.step is None
    warnings = [event.message for event, _ in run.read_events() if event.level == "warning"]
    assert any(f"The best checkpoint, {found.path.name}, is damaged" in text for text in warnings)


def test_a_checkpoint_with_everything_in_one_place_is_loaded(tmp_path: Path) -> None:
    """As earlier versions saved it: weights, and the optimizer's state where it is asked for."""
    model = torch.nn.Linear(3, 2)
    weights = trained_weights(model)
    optimizer = make_optimizer(weights.values(), weight_decay=0)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    tensors = {
        "model": {name: weight.detach() for name, weight in weights.items()},
        "optimizer": {name: optimizer.state[weight] for name, weight in weights.items()},
    }
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    for loads_optimizer in (True, False):
        other = torch.nn.Linear(3, 2)
        found = trained_weights(other)
        fresh = make_optimizer(found.values(), weight_decay=0)
        load_tensors(tmp_path, found, fresh if loads_optimizer else None, alone=True)
        assert torch.equal(other.weight, model.weight)
        state = fresh.state[other.weight]
        assert float(state["step"]) == loads_optimizer
        expected = optimizer.state[model.weight]["exp_avg"] * loads_optimizer
        assert torch.equal(state["exp_avg"], expected)


def test_an_adapter_s_checkpoint_becomes_an_adapter(make_run: MakeRun, tmp_path: Path) -> None:
    """Merged or not as the run says; also of a run that did not complete."""
    base = save_tiny(tmp_path / "base")
    run = make_run(
        tmp_path / "r",
        model=str(base),
        tuning={"kind": "lora", "rank": 2},
        result="both",
        training_steps=2,
        validation=[],
        checkpoint_every=1,
    )
    assert train(run.path) is TrainerExitCode.DONE
    run.exit.unlink()
    assert main(["export", str(run.path), "step-2", str(tmp_path / "m")]) == 0
    expected, found = weights_of(run.result), weights_of(tmp_path / "m")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "m" / "adapter" / "adapter_config.json").is_file()
    assert (
        main(["export", str(run.path), "step-9", str(tmp_path / "n")]) == TrainerExitCode.BAD_INPUT
    )
    assert not (tmp_path / "n").exists()


def test_training_stops_once_the_validation_loss_has_not_improved(
    overfitted: RunDir, make_run: MakeRun, tmp_path: Path
) -> None:
    """After as many validations as the patience says; the run is completed, and says why."""
    changes: dict[str, Any] = overfitted.read_spec().model_dump(exclude={"version", "run_id"})
    changes |= {"early_stopping_patience": 2, "result_checkpoint": "last"}
    run = make_run(tmp_path / "r", **changes)
    assert train(run.path) is TrainerExitCode.DONE
    record = run.read_exit()
    assert record is not None
    whole = losses(overfitted)
    best = min(whole, key=whole.__getitem__)
    assert losses(run) == {step: loss for step, loss in whole.items() if step <= best + 2}
    assert record.step == best + 2
    said = [event.message for event, _ in run.read_events()]
    expected = f"Stopping early at step {best + 2}: the validation loss has not improved in 2"
    assert any(text.startswith(expected) for text in said)


def test_patience_counts_validations_since_the_lowest_loss() -> None:
    """An equal loss is no improvement; a continued run counts on; without patience never."""
    early = EarlyStopping(2)
    for step, loss in enumerate((3.0, 2.0, 2.0), 1):
        early.add(step, loss)
        assert not early.is_due
    continued = EarlyStopping(2, early.state)
    continued.add(4, 2.5)
    assert continued.is_due
    assert continued.state == {"loss": 2.0, "step": 2, "since": 2}
    continued.add(5, 1.0)
    assert continued.state["since"] == 0
    never = EarlyStopping(None, {"loss": 1.0, "step": 1, "since": 99})
    assert not never.is_due
