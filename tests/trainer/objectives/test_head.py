"""The last layer and its loss in one: the same numbers as without."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from training_backends.trainer.objectives.tokens import fits_one_head, sum_loss

pytestmark = pytest.mark.engine

# With so many words, sixteen tokens are computed at a time, so that the last part is smaller.
TOKENS, WIDTH, WORDS = 20, 4, 2**19


def made(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states, a matrix and what is wanted."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, WORDS, (TOKENS,))


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Compute all logits and what comes of them."""
    logits = hidden @ weight.T
    loss = cross_entropy(logits.float(), targets, reduction="sum")
    return loss, int((logits.argmax(dim=1) == targets).sum())


def test_the_loss_and_its_gradients_are_those_of_all_logits() -> None:
    """For both inputs, and scaled as the loss is."""
    hidden, weight, targets = made(torch.float32)
    loss, correct = plain(hidden, weight, targets)
    expected = torch.autograd.grad(0.3 * loss, (hidden, weight))
    found = sum_loss(hidden, weight, targets)
    assert found.loss.item() == pytest.approx(loss.item())
    assert int(found.correct) == correct
    gradients = torch.autograd.grad(0.3 * found.loss, (hidden, weight))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-3)


def test_it_computes_in_what_autocast_says() -> None:
    """The gradients still have the precision of what they belong to."""
    hidden, weight, targets = made(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = plain(hidden, weight, targets)
        found = sum_loss(hidden, weight, targets)
    expected = torch.autograd.grad(loss, (hidden, weight))
    gradients = torch.autograd.grad(found.loss, (hidden, weight))
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_a_frozen_matrix_gets_no_gradient() -> None:
    """As under an adapter, where none is computed either."""
    hidden, weight, targets = made(torch.float32)
    loss, _ = plain(hidden, weight, targets)
    (expected,) = torch.autograd.grad(loss, hidden)
    found = sum_loss(hidden, weight.detach(), targets)
    (gradient,) = torch.autograd.grad(found.loss, hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(sum_loss(hidden, weight.detach(), targets).loss, weight)


def test_without_gradients_and_without_tokens() -> None:
    """Measuring keeps nothing; no token has no loss."""
    hidden, weight, targets = made(torch.float32)
    with torch.no_grad():
        assert not sum_loss(hidden, weight, targets).loss.requires_grad
    empty = sum_loss(hidden[:0], weight, targets[:0])
    assert (empty.loss.item(), int(empty.correct)) == (0.0, 0)
    (gradient,) = torch.autograd.grad(empty.loss, weight)
    assert not gradient.any()


def test_a_head_with_more_to_it_is_left_to_its_model() -> None:
    """A bias, or an adapter around it."""
    assert fits_one_head(torch.nn.Linear(4, 8, bias=False))
    assert not fits_one_head(torch.nn.Linear(4, 8))
    assert not fits_one_head(torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False)))
