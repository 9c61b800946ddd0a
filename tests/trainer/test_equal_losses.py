"""The steps of each method equal those of plain loops in float64."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from tests.trainer.plain import (
    answer_loss,
    batches,
    preference_loss,
    save_tiny,
    train_on,
    train_plainly,
)
from training_backends.core.config import ClassifierTarget
from training_backends.datasets.rows import ChatRow, Message, byte_encode, parse_row
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.data import Order
from training_backends.trainer.models import make_tiny_model
from training_backends.trainer.objectives.classifier import add_heads
from training_backends.trainer.process import train

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]

STEPS = 8
TOLERANCE = 1e-5
"""Relative: what float32 may differ from float64 after these steps."""


def losses(run: RunDir) -> list[float]:
    """Train, and return the loss of each step."""
    assert train(run.path) is TrainerExitCode.DONE
    return [row.train_loss for row, _ in run.read_metrics()]


@pytest.fixture(scope="module")
def make(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that writes the spec of a run of a few steps."""

    def make(**changes: Any) -> RunDir:
        path = tmp_path_factory.mktemp("runs") / "r"
        length = {"training_steps": STEPS, "checkpoint_every": STEPS}
        common = {**length, "validation": [], "micro_batch_size": 2}
        return make_run(path, **{**common, **changes})

    return make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def test_full_tuning(make: MakeRun) -> None:
    """All weights, two rows at a time, against all rows one by one."""
    run = make()
    expected = train_plainly(make_tiny_model(3), run.read_spec(), answer_loss)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter(make: MakeRun, base: Path, *, checkpointing: bool) -> None:
    """LoRA on a model from disk, whether or not it computes twice."""
    lora = {"kind": "lora", "rank": 4}
    run = make(model=str(base), tuning=lora, gradient_checkpointing=checkpointing)
    set_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = train_plainly(model, run.read_spec(), answer_loss)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)


TARGETS = (
    ClassifierTarget(name="sign", labels=("small", "big"), weight=2.0),
    ClassifierTarget(
        name="digits", labels=tuple("0123456789"), loss_function="multi_class", weight=0.5
    ),
)


def write_sums(path: Path) -> Path:
    """Write sums with two targets; every fifth row says nothing of the first."""
    with path.open("w") as file:
        for n in range(60):
            a, b = n % 7, n % 10
            labels: dict[str, Any] = {"digits": sorted({str(a), str(b)})}
            if n % 5:
                labels["sign"] = "big" if a + b > 8 else "small"
            file.write(json.dumps({"text": f"{a} and {b}", "labels": labels}) + "\n")
    return path


def classifier_loss(model: Any, lines: Sequence[bytes]) -> torch.Tensor:
    """Return the weighted sum of both targets' mean losses, written out label by label."""
    signs, digits = [], []
    for line in lines:
        row = json.loads(line)
        ids, _ = byte_encode(parse_row(json.dumps({"text": row["text"]}).encode()))
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        said = model.score.weight @ hidden
        if "sign" in row["labels"]:
            signs.append(-said[:2].log_softmax(0)[int(row["labels"]["sign"] == "big")])
        each = [
            -(said[2 + d] if str(d) in row["labels"]["digits"] else -said[2 + d]).sigmoid().log()
            for d in range(10)
        ]
        digits.append(torch.stack(each).mean())
    return 2.0 * torch.stack(signs).mean() + 0.5 * torch.stack(digits).mean()


def test_a_classifier_of_two_targets(make: MakeRun, tmp_path: Path) -> None:
    """One label a row and many labels a row, weighted, with rows that lack a target."""
    path = write_sums(tmp_path / "train.jsonl")
    run = make(method="classifier", classifier_targets=TARGETS, train=[path])
    set_seed(3)
    model = add_heads(make_tiny_model(3), TARGETS)
    expected = train_plainly(model, run.read_spec(), classifier_loss)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)


def write_pairs(path: Path) -> Path:
    """Write pairs in which the longer answer is the better one."""
    with path.open("w") as file:
        for n in range(40):
            pair = {
                "input": {"messages": [{"role": "user", "content": f"{n}?"}]},
                "preferred_output": [{"role": "assistant", "content": f"It is {n}."}],
                "non_preferred_output": [{"role": "assistant", "content": "No." * (n % 3 + 1)}],
            }
            file.write(json.dumps(pair) + "\n")
    return path


def encoded(line: bytes, key: str) -> tuple[list[int], list[bool]]:
    """Encode one of a pair's answers behind its question."""
    pair = json.loads(line)
    messages = [Message(**m) for m in [*pair["input"]["messages"], *pair[key]]]
    return byte_encode(ChatRow(messages))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_preference_pairs(make: MakeRun, base: Path, tmp_path: Path, tuning: str) -> None:
    """DPO against a frozen copy of the model that one begins with."""
    run = make(
        method="dpo",
        model=str(base),
        tuning={"kind": tuning, "rank": 4},
        train=[write_pairs(tmp_path / "pairs.jsonl")],
        learning_rate=1e-3,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    reference = deepcopy(model).double()
    if tuning == "lora":
        set_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)

    def loss(model: Any, lines: Sequence[bytes]) -> torch.Tensor:
        keys = ("preferred_output", "non_preferred_output")
        pairs = [(encoded(line, keys[0]), encoded(line, keys[1])) for line in lines]
        return preference_loss(model, reference, pairs, 0.1)

    expected = train_plainly(model, run.read_spec(), loss)
    found = losses(run)
    assert found[0] == pytest.approx(0.6931472, rel=1e-6), "nothing is preferred at first"
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_packed_rows(make: MakeRun) -> None:
    """The same rows packed into sequences: each counts as if it were alone."""
    run = make(packing=True, seq_len=100, batch_size=2, micro_batch_size=1)
    spec = run.read_spec()
    lines = spec.train[0].local_path.read_bytes().splitlines()
    order = Order((len(lines),), (1.0,), spec.seed)
    packs: list[list[bytes]] = []
    position = filled = 0
    while len(packs) <= STEPS * spec.batch_size:
        line = lines[order.row(position)]
        length = len(byte_encode(parse_row(line))[0])
        if not packs or filled + length > spec.seq_len:
            packs.append([])
            filled = 0
        packs[-1].append(line)
        filled += length
        position += 1
    assert all(len(pack) > 1 for pack in packs[:-1])
    steps = [packs[n] + packs[n + 1] for n in range(0, STEPS * 2, 2)]
    expected = train_on(make_tiny_model(3), spec, answer_loss, iter(steps))
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)
    rows = [row for row, _ in run.read_metrics()]
    seen = [round(row.epoch * len(lines)) for row in rows]
    assert [b - a for a, b in pairwise([0, *seen])] == [len(step) for step in steps]


def test_batches_are_those_of_the_plain_loop(make: MakeRun) -> None:
    """The loop that the engine is held against sees every row once an epoch."""
    spec = make(training_steps=15).read_spec()
    seen = [line for lines in batches(spec) for line in lines]
    assert sorted(seen) == sorted(spec.train[0].local_path.read_bytes().splitlines())
