"""Which weights of a model are trained, in which precision it is saved, and what it starts from."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.trainer.encoding import examples_of
from tests.trainer.plain import MODELS_OF_TODAY, save_fp8, save_of_today, save_tiny
from training_backends.core.config import ClassifierTarget, Tuning
from training_backends.datasets.rows import ChatRow, Message
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer
from training_backends.tokens.examples import ExampleReader
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.models import (
    LoadedModel,
    load_model,
    prepare_tuning,
    save_result,
)
from training_backends.trainer.objectives.tokens import TokenObjective, predict
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]
CPU = torch.device("cpu")
LORA = {"kind": "lora", "rank": 4}


def loaded(directory: Path, kind: str | None) -> LoadedModel:
    """Load a model for a way of tuning."""
    tuning = None if kind is None else Tuning.model_validate({"kind": kind, "rank": 4})
    return load_model(str(directory), seed=0, tuning=tuning, device=CPU)


def trained_part(model: Any) -> set[str]:
    """Return the names of the weights that training changes."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def completed(run: RunDir) -> RunDir:
    """Train a run to its end."""
    assert train(run.path) is TrainerExitCode.DONE, run.read_exit()
    return run


@pytest.fixture(scope="module")
def of_today(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a small model of an architecture of today."""
    return lambda name: save_of_today(tmp_path_factory.mktemp("base") / "m", name)


@pytest.mark.parametrize("name", MODELS_OF_TODAY)
def test_only_the_text_part_of_an_image_text_model_is_trained(
    of_today: Callable[[str], Path], name: str
) -> None:
    """With an adapter and in full; vision tower and projector keep their weights."""
    directory = of_today(name)
    full = prepare_tuning(loaded(directory, "full").model, Tuning(kind="full"), name)
    names = {key for key, _ in full.named_parameters()}
    images = {key for key in names if "vis" in key or "projector" in key}
    assert bool(images) is (name != "mistral4")
    assert trained_part(full) == names - images
    base = loaded(directory, "lora").model
    adapted = prepare_tuning(base, Tuning.model_validate(LORA), name)
    trained = trained_part(adapted)
    assert trained
    assert all("lora_" in key and "vis" not in key and "proj" in key for key in trained)
    assert not any("projector" in key for key in trained)
    assert {weight.dtype for weight in adapted.parameters()} == {torch.float32}


def test_a_model_in_8_bits_is_trained_and_saved_dequantized(tmp_path: Path) -> None:
    """In the precision that was asked for; its merged result is a plain model in bfloat16."""
    exact = save_fp8(tmp_path / "base")
    found = loaded(tmp_path / "base", "full")
    weights = dict(found.model.named_parameters())
    assert weights.keys() == exact.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact[name]), name
    found = loaded(tmp_path / "base", "lora")
    tuned = prepare_tuning(found.model, Tuning.model_validate(LORA), "base")
    save_result(replace(found, model=tuned), tmp_path / "merged", save_as="merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_bytes())
    assert "quantization_config" not in config
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == exact.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["mistral3", "8 bits"])
def test_a_model_without_weights_has_the_structure_of_one_with_them(
    of_today: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    """So that its weights can be received from another process."""
    directory = of_today(name) if name in MODELS_OF_TODAY else tmp_path / "base"
    if not directory.exists():
        save_fp8(directory)
    tuning = Tuning.model_validate({"kind": kind, "rank": 4})
    empty = load_model(str(directory), seed=0, tuning=tuning, device=CPU, is_empty=True)
    found = [
        [(key, weight.shape, weight.dtype, weight.requires_grad) for key, weight in weights]
        for each in (empty, loaded(directory, kind))
        for weights in [prepare_tuning(each.model, tuning, name).named_parameters()]
    ]
    assert found[0] == found[1]
    assert {weight.device.type for weight in empty.model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", MODELS_OF_TODAY)
def test_the_loss_of_a_model_is_that_of_its_logits(
    of_today: Callable[[str], Path], name: str
) -> None:
    """Whichever way it is computed, and every trained weight has a gradient."""
    found = loaded(of_today(name), "lora")
    model = prepare_tuning(found.model, Tuning.model_validate(LORA), name).eval()
    objective = TokenObjective(found.encoder)
    row = {"messages": [{"role": r, "content": "2 plus 3?"} for r in ("user", "assistant")]}
    [example], _ = examples_of(objective, ExampleReader(found.encoder, 64), row)
    batch = objective.collate([example])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    expected = -logits[counted].gather(1, labels[counted][:, None]).sum()
    assert torch.allclose(predict(model, batch).losses.sum(), expected, rtol=1e-5)
    loss = objective.compute_loss(model, batch).losses.sum()
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)


@pytest.mark.engine
def test_an_image_text_model_is_saved_complete(
    make_run: MakeRun, of_today: Callable[[str], Path], tmp_path: Path
) -> None:
    """It loads as before, in its own precision, with the files that prepare its images."""
    base = of_today("mistral3")
    (base / "processor_config.json").write_text('{"patch_size": 14}')
    run = completed(
        make_run(
            tmp_path / "r",
            model=str(base),
            tuning=LORA,
            result="merged",
            training_steps=3,
            sample_prompt="2 plus 3?",
            sample_max_tokens=2,
        )
    )
    before = AutoModelForImageTextToText.from_pretrained(base)
    after = AutoModelForImageTextToText.from_pretrained(run.result)
    assert type(after) is type(before)
    assert after.dtype is torch.bfloat16
    config = json.loads((run.result / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert json.loads((run.result / "processor_config.json").read_text()) == {"patch_size": 14}
    assert AutoTokenizer.from_pretrained(run.result).chat_template
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_is_saved_in_the_precision_of_its_base(
    make_run: MakeRun, tmp_path: Path, kind: str
) -> None:
    """It is trained in float32, and checkpoints keep that; the result takes no more space."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=259,
    )  # fmt: skip
    base = tmp_path / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    save_tiny_tokenizer(base)
    run = completed(
        make_run(
            tmp_path / "r",
            model=str(base),
            tuning=kind,
            result="merged",
            training_steps=2,
            validation=[],
        )
    )
    model = AutoModelForCausalLM.from_pretrained(run.result)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    sizes = [(each / "model.safetensors").stat().st_size for each in (base, run.result)]
    assert sizes[1] <= sizes[0] * 1.01


@pytest.fixture(scope="module")
def adapter_run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that trained an adapter with SFT."""
    directory = tmp_path_factory.mktemp("adapter")
    return completed(
        make_run(
            directory / "sft",
            model=str(save_tiny(directory / "base")),
            tuning={"kind": "lora", "rank": 12},
            training_steps=4,
            learning_rate=1e-2,
            validation=[],
        )
    )


def adapter_weights(directory: Path, base: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    return {name: w for name, w in model.state_dict().items() if "lora_" in name}


@pytest.mark.engine
def test_dpo_continues_the_adapter_of_an_sft_run(
    make_run: MakeRun, adapter_run: RunDir, tmp_path: Path
) -> None:
    """It is the reference model, it is what is trained, and its base stays the base."""
    base = adapter_run.path.parent / "base"
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "why?", "chosen": "Because.", "rejected": "No."}
    pairs.write_text("\n".join([json.dumps(row)] * 4))
    run = completed(
        make_run(
            tmp_path / "dpo",
            model=str(adapter_run.result),
            method="dpo",
            tuning=LORA,
            train=[pairs],
            validation=[],
            training_steps=3,
            learning_rate=1e-2,
        )
    )
    first = run.read_metrics()[0][0]
    assert first.train_loss == pytest.approx(math.log(2), abs=1e-5)
    record = run.read_exit()
    assert record is not None
    assert record.result is not None
    assert (record.result.format, record.result.base_model) == ("adapter", str(base))
    before, after = adapter_weights(adapter_run.result, base), adapter_weights(run.result, base)
    assert before.keys() == after.keys()
    assert {tuple(w.shape) for w in before.values()} == {tuple(w.shape) for w in after.values()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (AutoTokenizer.from_pretrained(run.result)).chat_template
    card = (run.result / "README.md").read_text()
    assert "An adapter for `base`: " in card
    assert "LoRA, continuing an adapter." in card
    assert "--max-lora-rank 16" in card


def test_full_fine_tuning_of_an_adapter_starts_from_the_merged_model(adapter_run: RunDir) -> None:
    """All of its weights are trained, and it says what the adapter says."""
    plain, full = loaded(adapter_run.result, None), loaded(adapter_run.result, "full")
    model = prepare_tuning(full.model, Tuning(kind="full"), "m")
    assert not isinstance(model, PeftModel)
    assert len(trained_part(model)) == len([*model.parameters()])
    ids = torch.tensor([full.encoder.prompt(ChatRow([Message("user", "3 plus 4?")]))])
    with torch.no_grad():
        assert torch.allclose(plain.model(ids).logits, model(ids).logits, atol=1e-4)
    assert full.base == str(adapter_run.path.parent / "base")


def test_an_adapter_without_its_base_says_what_to_do(adapter_run: RunDir, tmp_path: Path) -> None:
    """A copy names no path; foreign files may be of anything."""
    for path in adapter_run.result.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TrainerError, match=r"'base' of the adapter .* not found.*adapter_config"):
        loaded(tmp_path, "lora")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(TrainerError, match="names no base model"):
        loaded(tmp_path, "lora")


def test_a_classifier_cannot_start_from_the_adapter_of_a_language_model(
    adapter_run: RunDir,
) -> None:
    """Its heads would not be part of the adapter."""
    with pytest.raises(TrainerError, match="Merge it into its base model first"):
        load_model(
            str(adapter_run.result),
            seed=0,
            tuning=Tuning(kind="lora"),
            device=CPU,
            targets=[ClassifierTarget(name="t", labels=("a", "b"))],
        )


def test_a_library_s_error_names_the_log(make_run: MakeRun, tmp_path: Path) -> None:
    """`status` shows its first line, and where the rest is."""
    base = save_tiny(tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "voxtral"}')
    run = make_run(tmp_path / "runs" / "r", model=str(base), tuning="lora")
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "cannot be loaded as a model: Unrecognized configuration" in record.failure.message
    assert record.failure.message.endswith(" The complete error is in runs/r/log.txt.")
    assert len(record.failure.message) < 1000
