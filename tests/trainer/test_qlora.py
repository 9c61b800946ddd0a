"""Adapters on a base that is held in four bits."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, set_seed

from tests.trainer.continuing import before_its_end, train_to_continue
from tests.trainer.plain import answer_loss, save_tiny, train_plainly
from training_backends.core.config import ClassifierTarget, Tuning
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer
from training_backends.trainer import models
from training_backends.trainer.__main__ import main
from training_backends.trainer.environment import importing
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.models import load_model
from training_backends.trainer.objectives.classifier import classify
from training_backends.trainer.process import train

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]

CPU = torch.device("cpu")
TUNING = {"kind": "qlora", "rank": 4}
IDS = torch.tensor([[256, 259, *b"3 plus 4?", 260]])
TOLERANCE = 1e-5
"""Relative: what float32 may differ from float64 after ten steps."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def load(directory: Path, kind: Literal["qlora", "full"] = "qlora") -> Any:
    """Load a model, in four bits if not told otherwise, as a run does."""
    return load_model(str(directory), seed=0, tuning=Tuning(kind=kind), device=CPU).model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far two tensors are from each other, relative to the second."""
    return float((one - other).norm() / other.norm())


def size(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_layers_are_in_four_bits_and_nothing_else(base: Path) -> None:
    """Half a byte a weight; embeddings, norms and the last layer stay as they are."""
    whole, model = AutoModelForCausalLM.from_pretrained(base), load(base)
    layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 7 * len(model.model.layers)
    for layer in layers:
        assert isinstance(layer, Linear4bit)
        assert layer.weight.dtype is torch.uint8
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    assert type(model.lm_head) is torch.nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert size(model.model.layers) < 0.13 * size(whole.model.layers)


def test_being_asked_leaves_the_weights_as_they_are(base: Path) -> None:
    """Trained on behind an evaluation, a model has the logits and gradients of before."""
    model = load(base)
    hidden = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = model.train()(inputs_embeds=hidden).logits
        return out.detach(), torch.autograd.grad(out.square().sum(), hidden)[0]

    before = step()
    assert apart(logits(model), before[0]) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_those_of_a_plain_loop(
    make_run: MakeRun, base: Path, data: Path, tmp_path: Path, *, checkpointing: bool
) -> None:
    """Ten steps, validated in between, against float64 over what the four bits stand for."""
    run = make_run(
        tmp_path / "r",
        model=str(base),
        tuning=TUNING,
        training_steps=10,
        micro_batch_size=2,
        gradient_checkpointing=checkpointing,
    )
    assert train(run.path) is TrainerExitCode.DONE
    set_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(base).dequantize(torch.float32), config)
    expected = train_plainly(model, run.read_spec(), answer_loss)
    rows = [row for row, _ in run.read_metrics()]
    assert sum(row.valid_loss is not None for row in rows) == 2
    assert [row.train_loss for row in rows] == pytest.approx(expected, rel=TOLERANCE)


@pytest.fixture(scope="module")
def both(make_run: MakeRun, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that leaves its adapter and the model that it was merged into."""
    run = make_run(
        tmp_path_factory.mktemp("runs") / "r",
        model=str(base),
        tuning=TUNING,
        result="both",
        checkpoint_every=None,
        learning_rate=1e-2,
    )
    assert train(run.path) is TrainerExitCode.DONE
    return run


def test_the_loss_falls(both: RunDir) -> None:
    """In training and in validation."""
    rows = [row for row, _ in both.read_metrics()]
    assert rows[-1].train_loss < 0.9 * rows[0].train_loss
    valid = [row.valid_loss for row in rows if row.valid_loss is not None]
    assert valid == sorted(valid, reverse=True)


def test_the_merged_model_is_whole(both: RunDir, base: Path) -> None:
    """It is the adapter on the base in full, and near what was trained in four bits."""
    config = json.loads((both.result / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(both.result)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    found = logits(merged)
    whole, four = AutoModelForCausalLM.from_pretrained(base), load(base)
    before, rounded = logits(whole), logits(four)
    exact = logits(PeftModel.from_pretrained(whole, both.result / "adapter"))
    trained = logits(PeftModel.from_pretrained(four, both.result / "adapter"))
    assert torch.allclose(found, exact, atol=1e-4)
    assert apart(found, trained) < apart(before, rounded), "as far as four bits are from the base"
    assert apart(found, before) > 1, "much was learnt"


def test_a_base_that_is_stored_in_four_bits(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    """It is taken as it is; what is merged into is what its bits stand for."""
    stored = tmp_path / "base"
    load(base).save_pretrained(stored)
    save_tiny_tokenizer(stored)
    common = {"tuning": TUNING, "result": "both", "training_steps": 4, "validation": []}
    run = make_run(tmp_path / "r", model=str(stored), learning_rate=1e-2, **common)
    assert train(run.path) is TrainerExitCode.DONE
    merged = AutoModelForCausalLM.from_pretrained(run.result)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    trained = PeftModel.from_pretrained(load(stored), run.result / "adapter")
    assert torch.allclose(logits(merged), logits(trained), atol=1e-4)

    with pytest.raises(TrainerError, match="Use qlora"):
        load(stored, "full")


def test_the_hub_is_asked_once(
    make_run: MakeRun, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the end comes, it may have other weights of this name, or none."""
    answers = iter([base])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: next(answers))
    changes = {"tuning": TUNING, "result": "merged", "training_steps": 1, "validation": []}
    run = make_run(tmp_path / "r", model="org/base", **changes)
    assert train(run.path) is TrainerExitCode.DONE


TARGET = ClassifierTarget(name="sign", labels=("small", "big"))


def test_a_classifier(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    """Its heads are trained in full and merged with the rest."""
    path = tmp_path / "train.jsonl"
    with path.open("w") as file:
        for n in range(60):
            labels = {"sign": "big" if n % 7 + n % 10 > 8 else "small"}
            file.write(json.dumps({"text": f"{n % 7} and {n % 10}", "labels": labels}) + "\n")
    run = make_run(
        tmp_path / "r",
        model=str(base),
        tuning=TUNING,
        method="classifier",
        classifier_targets=(TARGET,),
        train=[path],
        validation=[],
        training_steps=40,
        result="merged",
    )
    assert train(run.path) is TrainerExitCode.DONE
    loaded = load_model(str(run.result), seed=0, tuning=None, device=CPU)
    assert not models.is_in_four_bits(loaded.model)
    for text, label in (("6 and 9", "big"), ("1 and 2", "small")):
        shares = classify(loaded.model, loaded.encoder, loaded.targets, text)
        assert max(shares["sign"], key=shares["sign"].__getitem__) == label


def told(run: RunDir) -> list[tuple[object, ...]]:
    return [(r.step, r.train_loss, r.grad_norm, r.valid_loss) for r, _ in run.read_metrics()]


def digest(run: RunDir) -> str:
    return hashlib.sha256((run.result / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_resumed_it_is_the_same_and_can_be_asked(
    make_run: MakeRun, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number to the last digit, and the weights; the adapter answers over the whole base."""
    changes = {"model": str(base), "tuning": {**TUNING, "dropout": 0.2}, "training_steps": 12}
    whole = make_run(tmp_path / "whole", **changes)
    assert train_to_continue(whole) is TrainerExitCode.DONE
    run = before_its_end(whole, tmp_path / "r")
    for path in (run.result, run.checkpoints / "step-10", run.checkpoints / "step-12"):
        shutil.rmtree(path)
    assert train(run.path) is TrainerExitCode.DONE
    assert any(e.message.startswith("Resuming at step 5") for e, _ in run.read_events())
    assert set(told(run)) == set(told(whole))
    assert digest(run) == digest(whole)
    capsys.readouterr()
    assert main(["sample", str(run.result), "--prompt", "3 plus 4?", "--max-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"]


def test_experts_that_stay_in_full_are_told(make_run: MakeRun, tmp_path: Path) -> None:
    """Who counts on the memory that is saved learns how much of the model is left out."""
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=272, pad_token_id=258, **tiny, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    save_tiny_tokenizer(tmp_path / "base")
    base = str(tmp_path / "base")
    run = make_run(tmp_path / "r", model=base, tuning=TUNING, training_steps=1, validation=[])
    assert train(run.path) is TrainerExitCode.DONE
    (warning,) = [e.message for e, _ in run.read_events() if e.level == "warning"]
    assert warning == f"{2 * 3 * 32 * 64:,} expert weights are not quantized to 4 bits"


def test_without_the_package_it_is_said_how_to_install_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what goes without."""
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(
        TrainerError, match=r"pip install 'training-backends\[qlora\]'; or use lora"
    ):
        load(base)


def test_the_built_in_model_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts without it, as it is never quantized; any other model may be."""
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with importing("org/model"):
        assert "bitsandbytes" not in sys.modules, "it can be loaded"
    with importing("tiny-mistral"):
        assert sys.modules["bitsandbytes"] is None
