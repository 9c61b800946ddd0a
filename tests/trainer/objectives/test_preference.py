"""Preference pairs: which rows they are read from, and what is learnt of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import DecodeError

from tests.trainer.continuing import assert_continues_bit_equal, train_to_continue
from tests.trainer.encoding import examples_of
from training_backends.datasets.rows import ChatRow, Message, byte_encode
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.tokens.encoders import ByteEncoder, UnusableRow
from training_backends.tokens.examples import ExampleReader
from training_backends.trainer.objectives.preference import Pair, PreferenceObjective
from training_backends.trainer.process import train

MakeRun = Callable[..., RunDir]

QUESTION = {"role": "user", "content": "why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}
FORMS: list[dict[str, Any]] = [
    {
        "input": {"messages": [QUESTION]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "why?", "chosen": "Because.", "rejected": "No."},
    {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
]


@pytest.fixture(scope="module")
def objective() -> PreferenceObjective:
    """What learns from pairs."""
    return PreferenceObjective(ByteEncoder(), beta=0.1, label_smoothing=0.0)


READER = ExampleReader(ByteEncoder(), 64, method="dpo")
"""Reads pairs of at most 64 tokens an answer."""


def read(objective: PreferenceObjective, row: dict[str, Any]) -> Any:
    """Encode a row; return its example or None, and whether it was truncated."""
    examples, is_truncated = examples_of(objective, READER, row)
    return (examples[0] if examples else None), is_truncated


@pytest.mark.parametrize("row", FORMS)
def test_all_forms_are_the_same_pair(objective: PreferenceObjective, row: dict[str, Any]) -> None:
    """OpenAI's form, TRL's, TRL's with bare texts, TRL's with the prompt in both answers."""
    pair, cut = read(objective, row)
    assert isinstance(pair, Pair)
    assert not cut
    for sample, answer in ((pair.chosen, "Because."), (pair.rejected, "No.")):
        ids, trained = byte_encode(ChatRow([Message("user", "why?"), Message("assistant", answer)]))
        assert sample.ids.tolist() == ids
        assert (sample.labels != -100).tolist() == trained
    assert pair.length == pair.chosen.length + pair.rejected.length


def test_only_the_answers_are_compared(objective: PreferenceObjective) -> None:
    """What the assistant said earlier is part of the question."""
    earlier = [QUESTION, {"role": "assistant", "content": "Guess."}, QUESTION]
    pair, _ = read(objective, {**FORMS[1], "prompt": earlier})
    assert int((pair.chosen.labels != -100).sum()) == len("Because.") + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chosen": []}, "must share a prompt and differ"),
        ({"prompt": None}, "must share a prompt and differ"),
        ({"rejected": [GOOD]}, "must share a prompt and differ"),
        ({"rejected": None}, "no known format"),
        ({"messages": [QUESTION, GOOD]}, "not a preference pair"),
    ],
)
def test_half_a_pair_is_unusable(
    objective: PreferenceObjective, changes: dict[str, Any], said: str
) -> None:
    """A pair has a question and two answers that are not the same."""
    with pytest.raises((UnusableRow, DecodeError), match=said):
        read(objective, {**FORMS[1], **changes})


def test_a_pair_whose_answer_is_cut_off_is_left_out(objective: PreferenceObjective) -> None:
    """With nothing left to compare there is nothing to learn."""
    asked = {"role": "user", "content": "x" * 80}
    assert read(objective, {**FORMS[1], "prompt": [asked]}) == (None, True)


def test_smoothing_takes_some_pairs_to_be_wrong() -> None:
    """The loss is the mixture of both directions."""
    rewards = torch.tensor([0.3])

    class Fixed(PreferenceObjective):
        def margins(self, model: Any, batch: Any) -> torch.Tensor:
            del model, batch
            return rewards / 0.1

    objective = Fixed(ByteEncoder(), beta=0.1, label_smoothing=0.2)
    judged = objective.compute_loss(None, {"reference": torch.zeros(1)})
    right, wrong = (-(sign * rewards).sigmoid().log() for sign in (1, -1))
    assert judged.losses.item() == pytest.approx((0.8 * right + 0.2 * wrong).item())
    assert judged.measures["reward_margin"].item() == pytest.approx(0.3)


@pytest.fixture(scope="module")
def finished(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that learnt which answers are the better ones."""
    path = tmp_path_factory.mktemp("pairs")
    for name, first in (("train", 0), ("valid", 100)):
        with (path / f"{name}.jsonl").open("w") as file:
            for n in range(first, first + 40):
                row = {"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "No."}
                file.write(json.dumps(row) + "\n")
    run = make_run(
        path / "run",
        method="dpo",
        train=[path / "train.jsonl"],
        validation=[path / "valid.jsonl"],
        learning_rate=3e-4,
        training_steps=10,
        checkpoint_every=5,
    )
    assert train_to_continue(run) is TrainerExitCode.DONE
    return run


@pytest.mark.engine
def test_better_answers_become_likelier(finished: RunDir) -> None:
    """The share of pairs that are told apart grows to all, on pairs not trained on too."""
    rows = [row for row, _ in finished.read_metrics()]
    assert rows[0].more["train_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1].more["valid_reward_accuracy"] == 1
    assert rows[-1].more["valid_reward_margin"] > 0.1
    assert rows[-1].valid_loss is not None
    assert rows[-1].valid_loss < rows[0].train_loss
    assert rows[-1].valid_mean_token_accuracy is None, "no tokens are predicted"


@pytest.mark.engine
def test_it_continues_bit_equal(finished: RunDir, tmp_path: Path) -> None:
    """The reference comes from the checkpoint: it is the model of the first beginning."""
    assert_continues_bit_equal(finished, tmp_path / "r", 5)


@pytest.mark.engine
def test_other_data_is_no_continuation(finished: RunDir, tmp_path: Path) -> None:
    """A checkpoint whose pairs are not those of the files is refused."""
    run = RunDir(tmp_path / "r")
    shutil.copytree(finished.path, run.path)
    run.exit.unlink()
    spec = run.read_spec()
    (source,) = spec.train
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_bytes(b"".join(source.local_path.read_bytes().splitlines(keepends=True)[:30]))
    changed = spec.model_copy(update={"train": (source.model_copy(update={"path": fewer}),)})
    run.write_spec(changed)
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "has 40 pairs, but the data now has 30" in record.failure.message
