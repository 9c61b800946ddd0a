"""The order of rows and the batches made of them."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from training_backends.trainer.data import EncodedRow, Order, collate


@given(st.integers(0, 99), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_equal_weights_show_every_row_once_an_epoch(seed: int, rows: list[int]) -> None:
    """An epoch is a permutation of all rows, and another one in the next epoch's place."""
    order = Order(tuple(rows), (1.0,) * len(rows), seed)
    total = sum(rows)
    assert order.epoch_size == total
    for epoch in range(2):
        shown = [order.row(epoch * total + place) for place in range(total)]
        assert sorted(shown) == list(range(total))


def test_order_depends_on_seed_and_position_only() -> None:
    """Asked in any sequence, a position has the same row; another seed has another order."""
    order = Order((20,), (1.0,), seed=1)
    forward = [order.row(position) for position in range(60)]
    again = Order((20,), (1.0,), seed=1)
    assert [again.row(position) for position in reversed(range(60))] == forward[::-1]
    assert forward[:20] != forward[20:40]
    other = Order((20,), (1.0,), seed=2)
    assert [other.row(position) for position in range(20)] != forward[:20]


def test_a_heavier_file_comes_as_often_as_its_weight_says() -> None:
    """With 3 to 1 on equal files, a row of the first is seen three times as often."""
    order = Order((10, 10), (3.0, 1.0), seed=0)
    seen = Counter(order.row(position) < 10 for position in range(400))
    assert seen == {True: 300, False: 100}
    rows = Counter(order.row(position) for position in range(20))
    assert all(rows[row] in {1, 2} for row in range(10)), "whole passes first, then a rest"


def test_batches_are_padded_on_the_right() -> None:
    """Padding is neither attended to nor counted by the loss."""
    short = EncodedRow(torch.tensor([5]), torch.tensor([-100]))
    long = EncodedRow(torch.tensor([6, 7]), torch.tensor([-100, 7]))
    batch = collate([short, long], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch["labels"].tolist() == [[-100, -100], [-100, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
