"""Classifiers: which rows they take, what is told of them, what they leave behind."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import DecodeError
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.pages import code_blocks
from tests.trainer.continuing import assert_continues_bit_equal, train_to_continue
from tests.trainer.encoding import examples_of
from tests.trainer.plain import save_tiny
from training_backends.core.config import ClassifierTarget
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.tokens.encoders import ByteEncoder, UnusableRow
from training_backends.tokens.examples import ExampleReader
from training_backends.trainer.__main__ import main
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.models import load_model
from training_backends.trainer.objective import Totals
from training_backends.trainer.objectives.classifier import ClassifierObjective, classify
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]

TOPIC = ClassifierTarget(name="topic", labels=("pets", "sky", "roads"))
WORDS = ClassifierTarget(name="words", labels=("cat", "sun", "bus"), loss_function="multi_class")
KEYWORDS = {"cat": "pets", "sun": "sky", "bus": "roads"}
FILLING = ("one", "two", "red", "old", "new", "far")


def write_topics(path: Path, count: int, seed: int) -> Path:
    """Write texts with a word that decides, as texts and as messages in turn."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for n in range(count):
            word = chance.choice([*KEYWORDS])
            words = [*chance.choices(FILLING, k=3), word]
            chance.shuffle(words)
            text = " ".join(words)
            said = {"messages": [{"role": "user", "content": text}]} if n % 2 else {"text": text}
            labels = {"topic": KEYWORDS[word], "words": [word]}
            file.write(json.dumps({**said, "labels": labels}) + "\n")
    return path


@pytest.fixture(scope="module")
def objective() -> ClassifierObjective:
    """What learns both targets."""
    return ClassifierObjective(ByteEncoder(), (TOPIC, WORDS))


READER = ExampleReader(ByteEncoder(), 32, method="classifier", targets=(TOPIC, WORDS))


def read(objective: ClassifierObjective, **row: Any) -> Any:
    """Encode a row; return its example or None, and whether it was truncated."""
    examples, is_truncated = examples_of(objective, READER, row)
    return (examples[0] if examples else None), is_truncated


def test_a_row_marks_the_outputs_that_are_right(objective: ClassifierObjective) -> None:
    """Outputs are the labels of all targets in order; a target may be left out."""
    both, cut = read(objective, text="a cat", labels={"topic": "pets", "words": ["cat", "bus"]})
    assert both.marks.tolist() == [1, 0, 0, 1, 0, 1]
    assert both.known.tolist() == [True, True]
    assert not cut
    one, _ = read(objective, text="?", labels={"words": []})
    assert (one.marks.tolist(), one.known.tolist()) == ([0] * 6, [False, True])
    alone, _ = read(objective, text="?", labels={"topic": ["sky"], "words": "sun"})
    assert alone.marks.tolist() == [0, 1, 0, 0, 1, 0]
    assert objective.count([both, one, alone]) == [2, 3]


def test_a_conversation_may_end_with_anyone(objective: ClassifierObjective) -> None:
    """Messages are read as they are laid out for answers, and cut off at the longest length."""
    messages = [{"role": "user", "content": "x" * 40}]
    example, cut = read(objective, messages=messages, labels={"topic": "sky"})
    assert (example.length, cut) == (32, True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "?"}, "no `labels`"),
        ({"text": "?", "labels": {"colour": "red"}}, "'colour' is not one of classifier_targets"),
        ({"text": "?", "labels": {"topic": "sea"}}, "'sea' is not a label of 'topic'"),
        ({"text": "?", "labels": {"topic": ["sky", "pets"]}}, "takes one label"),
        ({"labels": {"topic": "sky"}}, "neither `messages` nor `text`"),
    ],
)
def test_a_row_that_cannot_be_learnt_says_why(
    objective: ClassifierObjective, row: dict[str, Any], said: str
) -> None:
    """Nothing is guessed: what is not declared is not learnt."""
    with pytest.raises((UnusableRow, DecodeError), match=said):
        read(objective, **row)


def test_a_batch_without_a_target_has_no_loss_of_it(objective: ClassifierObjective) -> None:
    """Its part is zero, not no number, and is left out of what is told."""
    example, _ = read(objective, text="?", labels={"words": ["cat"]})
    loaded = load_model(
        "tiny-mistral",
        seed=0,
        tuning=None,
        device=torch.device("cpu"),
        targets=(TOPIC, WORDS),
    )
    judged = objective.compute_loss(loaded.model, objective.collate([example]))
    assert judged.losses[0] == 0
    totals = Totals(objective)
    totals.add(judged)
    found = totals.take()
    assert found is not None
    assert set(found.named) == {"loss/words", "accuracy/words"}


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with rows to learn from and others to be asked."""
    directory = tmp_path_factory.mktemp("topics")
    write_topics(directory / "train.jsonl", 240, seed=1)
    write_topics(directory / "valid.jsonl", 60, seed=2)
    return directory


@pytest.fixture(scope="module")
def make_classifier(make_run: MakeRun, topics: Path) -> MakeRun:
    """Return a function that writes the spec of a run that learns both targets."""

    def make(path: Path, **changes: Any) -> RunDir:
        values = {
            "method": "classifier",
            "classifier_targets": (TOPIC, WORDS),
            "train": [topics / "train.jsonl"],
            "validation": [topics / "valid.jsonl"],
            "training_steps": 30,
            "checkpoint_every": 15,
            "batch_size": 16,
        }
        return make_run(path, **{**values, **changes})

    return make


@pytest.fixture(scope="module")
def finished(make_classifier: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that was trained from beginning to end."""
    run = make_classifier(tmp_path_factory.mktemp("runs") / "r", sample_prompt="old red cat one")
    assert train_to_continue(run) is TrainerExitCode.DONE
    return run


@pytest.mark.engine
def test_it_learns_what_it_has_not_seen(finished: RunDir) -> None:
    """Held-out rows are decided rightly, and each target's loss and accuracy is told."""
    first, *_, last = [row for row, _ in finished.read_metrics()]
    assert last.valid_mean_token_accuracy is not None
    assert last.valid_mean_token_accuracy >= 0.95
    stages = ("train", "valid")
    names = {
        f"{s}_{m}/{t}" for s in stages for m in ("loss", "accuracy") for t in ("topic", "words")
    }
    assert set(last.more) == names
    assert last.valid_loss == pytest.approx(
        last.more["valid_loss/topic"] + last.more["valid_loss/words"]
    )
    assert first.train_loss == pytest.approx(
        first.more["train_loss/topic"] + first.more["train_loss/words"], rel=1e-6
    )
    samples = [e.data["answer"] for e, _ in finished.read_events() if e.name == "sample"]
    assert samples[-1].startswith("topic: pets (")


@pytest.mark.engine
def test_it_is_asked_by_the_command(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line with the labels of each target, even for a text that is no UTF-8."""
    assert main(["sample", str(finished.result), "--prompt", "old \udcff cat one"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"].keys() == {"topic", "words"}


@pytest.mark.engine
def test_the_result_is_a_classifier_of_transformers(finished: RunDir, topics: Path) -> None:
    """The documented lines load it, and it says of each row what the run has measured."""
    model = AutoModelForSequenceClassification.from_pretrained(finished.result)
    tokenizer = AutoTokenizer.from_pretrained(finished.result)
    targets = json.loads((finished.result / "classifier.json").read_text())["targets"]
    assert [target["loss_function"] for target in targets] == ["single_class", "multi_class"]
    assert model.config.id2label[0] == "topic/pets"
    right = rows = 0
    for line in (topics / "valid.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "text" not in row:
            continue
        text = tokenizer.bos_token + row["text"] + tokenizer.eos_token
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        rows += 1
        right += targets[0]["labels"][int(logits[:3].argmax())] == row["labels"]["topic"]
    assert right / rows >= 0.95


@pytest.mark.engine
def test_the_page_loads_a_classifier(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its program prints the probabilities of each target's labels."""
    (program,) = (each.text for each in code_blocks("local.md") if each.title == "classify.py")
    monkeypatch.chdir(finished.path)
    exec(program.replace("DIR", str(finished.result.relative_to(finished.path))), {})
    topic, words = capsys.readouterr().out.splitlines()
    assert topic.startswith("topic {'pets': 0.")
    assert words.startswith("words {'cat': ")


@pytest.mark.engine
def test_it_continues_bit_equal(finished: RunDir, tmp_path: Path) -> None:
    """Ended behind its first checkpoint and continued, it is the same to the last bit."""
    assert_continues_bit_equal(finished, tmp_path / "r", 15)


@pytest.mark.engine
def test_an_adapter_keeps_its_heads(make_classifier: MakeRun, tmp_path: Path) -> None:
    """With LoRA the heads lie beside the adapter, and merging both changes no answer."""
    base = save_tiny(tmp_path / "base")
    run = make_classifier(
        tmp_path / "r",
        model=str(base),
        tuning={"kind": "lora", "rank": 4},
        result="both",
        training_steps=5,
        validation=[],
    )
    assert train(run.path) is TrainerExitCode.DONE
    described = json.loads((run.result / "adapter" / "classifier.json").read_text())
    outputs = sum(len(target["labels"]) for target in described["targets"])
    adapted = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=outputs, pad_token_id=described["pad_token_id"]
    )
    adapted = PeftModel.from_pretrained(adapted, run.result / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(run.result)
    ids = torch.tensor([[256, *b"a cat", 257, 258, 258], [256, *b"the sun", 257]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    loaded = load_model(str(run.result), seed=0, tuning=None, device=torch.device("cpu"))
    said = classify(loaded.model, loaded.encoder, loaded.targets, "a cat")
    assert [*said] == ["topic", "words"]
    assert sum(said["topic"].values()) == pytest.approx(1)
    other = make_classifier(
        tmp_path / "other", model=str(run.result), classifier_targets=(TOPIC,), training_steps=1
    )
    assert train(other.path) is TrainerExitCode.BAD_INPUT
    record = other.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "classifier with the targets topic, words" in record.failure.message


def test_a_model_that_cannot_classify_is_named(tmp_path: Path) -> None:
    """What transformers has no classifier of is refused with its name."""
    base = save_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "clvp"}))
    with pytest.raises(TrainerError, match="cannot be loaded as a classifier"):
        load_model(str(base), seed=0, tuning=None, device=torch.device("cpu"), targets=(TOPIC,))
