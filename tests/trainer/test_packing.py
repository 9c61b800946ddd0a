"""Several rows in one sequence: how they are laid out, and that none sees another."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig

from tests.trainer.continuing import assert_continues_bit_equal, train_to_continue
from tests.trainer.encoding import row_of
from training_backends.datasets.rows import ChatRow, Message
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.tokens.encoders import ByteEncoder
from training_backends.trainer.data import (
    EncodedRow,
    Order,
    Pack,
    PackedSchedule,
    collate_packs,
)
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.models import make_tiny_model
from training_backends.trainer.objectives.tokens import TokenObjective
from training_backends.trainer.run import require_separate_rows

MAX = 20


def blank(length: int) -> EncodedRow:
    """Make a row of which only the length matters."""
    return EncodedRow(torch.ones(length), torch.ones(length))


@given(
    st.lists(st.integers(1, MAX), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_sequences_hold_the_rows_in_order(
    lengths: list[int], batch_size: int, rows: int, seed: int
) -> None:
    """Every row once and whole, none too many in a sequence, batches full."""
    order = Order((len(lengths),), (1.0,), seed)
    examples = [blank(length) for length in lengths]
    schedule = PackedSchedule(examples, order, seq_len=MAX, batch_size=batch_size, rows=rows)
    assert len(schedule) % batch_size == 0
    position = 0
    for index in range(len(schedule)):
        assert schedule.rows(index) == position
        pack = schedule[index]
        assert pack.length <= MAX
        for sample in pack.samples:
            assert sample is examples[order.row(position)]
            position += 1
        following = examples[order.row(position)]
        assert pack.length + following.length > MAX, "as many to a sequence as fit"
    assert position >= rows
    assert schedule.rows(len(schedule) - batch_size) < rows, "no batch more than the rows need"


def test_positions_begin_anew_at_each_row() -> None:
    """Padding is a row of its own, so that nobody sees it."""
    one, two, three = (EncodedRow(torch.full((n,), n), torch.full((n,), n)) for n in (1, 2, 3))
    packs = [Pack((two, one)), Pack((three, two))]
    batch = collate_packs(packs, pad_id=9, flat=False)
    assert batch["input_ids"].tolist() == [[2, 2, 1, 9, 9], [3, 3, 3, 2, 2]]
    assert batch["labels"].tolist() == [[2, 2, 1, -100, -100], [3, 3, 3, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch
    flat = collate_packs(packs, pad_id=9, flat=True)
    assert flat["input_ids"].tolist() == [[2, 2, 1, 3, 3, 3, 2, 2]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_of_rows_by_themselves(attention: str, *, flat: bool) -> None:
    """To six digits, whether there is a line for each pack or one for all."""
    model = make_tiny_model(0).eval()
    model.set_attn_implementation(attention)
    samples = []
    for n in range(7):
        row = ChatRow([Message("user", "ab" * n), Message("assistant", "c" * (n + 1))])
        samples.append(row_of(ByteEncoder().encode(row)[0]))
    objective = TokenObjective(ByteEncoder(), flat=flat)
    packs = [Pack(tuple(samples[:4])), Pack(tuple(samples[4:]))]
    with torch.no_grad():
        packed = objective.compute_loss(model, objective.collate(packs))
        alone = [objective.compute_loss(model, objective.collate([sample])) for sample in samples]
    assert packed.losses.item() == pytest.approx(sum(j.losses.item() for j in alone), rel=1e-6)
    assert packed.counts.tolist() == objective.count(packs) == objective.count(samples)
    assert packed.correct.item() == sum(judged.correct.item() for judged in alone)


def test_an_architecture_that_mixes_rows_is_refused() -> None:
    """One that carries a state from token to token is found out by trying."""
    require_separate_rows(make_tiny_model(0), "tiny")
    experts = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    require_separate_rows(AutoModelForCausalLM.from_config(experts), "experts")
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TrainerError, match="'mamba' does not support packing"):
        require_separate_rows(mamba, "mamba")


@pytest.mark.engine
def test_a_packed_run_continues_bit_equal(make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    """Which rows are together is a function of the position alone."""
    run = make_run(
        tmp_path / "r", packing=True, seq_len=100, training_steps=None, epochs=1, checkpoint_every=3
    )
    assert train_to_continue(run) is TrainerExitCode.DONE
    last = max(row.step for row, _ in run.read_metrics())
    assert last < 15, "fewer steps than with a row for each place in a batch"
    assert_continues_bit_equal(run, tmp_path / "again", 3)
