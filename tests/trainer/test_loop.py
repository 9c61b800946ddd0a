"""The training loop's own arithmetic."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

from training_backends.trainer.checkpoint import trained_weights
from training_backends.trainer.loop import learning_rate, make_optimizer
from training_backends.trainer.models import make_tiny_model

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 20), (20, 20)])
def test_the_learning_rate_is_that_of_transformers(warmup: int, total: int) -> None:
    """Linear warm-up and cosine decay, equal to the last digit at every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(1, total + 1):
        found = learning_rate(step, peak=3e-3, warmup=warmup, total=total)
        assert found == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def test_matrices_decay_and_norms_do_not() -> None:
    """The trained weights are divided as transformers' Trainer divides them."""
    model = make_tiny_model(0)
    model.lm_head.weight.requires_grad_(False)
    decaying, others = make_optimizer(
        trained_weights(model).values(), weight_decay=0.1
    ).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "norm"])
    expected = {id(w) for n, w in model.named_parameters() if n in names and w.requires_grad}
    assert {id(weight) for weight in decaying["params"]} == expected
    assert all("norm" in name for name, w in model.named_parameters() if w.ndim == 1)
    assert len(others["params"]) == 9
