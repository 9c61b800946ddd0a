"""A language model's last layer and its loss in one, without the logits of all tokens at once."""

from typing import Any, Final, NamedTuple

import torch
from torch.autograd.function import once_differentiable

__all__ = ["SummedLoss", "fits_one_head", "sum_loss"]

_LOGITS: Final = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits held at a time: few stay in a processor's caches, many keep a GPU busy."""


class SummedLoss(NamedTuple):
    """Sums over all tokens.

    Attributes:
        loss: Nats; gradients flow back from here, where wanted.
        correct: Tokens that come out first.
    """

    loss: torch.Tensor
    correct: torch.Tensor


def fits_one_head(head: Any) -> bool:
    """Tell whether a model's last layer is a matrix and nothing else, such as an adapter."""
    return type(head) is torch.nn.Linear and head.bias is None


def sum_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> SummedLoss:
    """Return the cross entropy of `hidden @ weight.T`, summed.

    Logits are made for some tokens at a time, and their gradients with them, so nothing of
    them is kept or computed again. This works because of a sum all tokens weigh the same.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    loss, correct = _SummedLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return SummedLoss(loss, correct)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        computes_less = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if computes_less else weight.dtype
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        of_weight = torch.zeros_like(weight) if weight.requires_grad else None
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), device=hidden.device, dtype=torch.int64)
        size = max(1, _LOGITS.get(kind, _LOGITS["cuda"]) // len(weight))
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for first in range(0, len(hidden), size):
                part = hidden[first : first + size].to(dtype)
                wanted = targets[first : first + size, None]
                logits = (part @ matrix.T).float()
                top, best = logits.max(dim=1, keepdim=True)
                correct += (best == wanted).sum()
                said = logits.gather(1, wanted)
                shares = logits.sub_(top).exp_()
                sums = shares.sum(dim=1, keepdim=True)
                loss += (top + sums.log() - said).sum()
                if of_hidden is None and of_weight is None:
                    continue
                shares.div_(sums).scatter_add_(1, wanted, torch.full_like(sums, -1.0))
                shares = shares.to(dtype)
                if of_hidden is not None:
                    of_hidden[first : first + size] = shares @ matrix
                if of_weight is not None and of_weight.dtype == dtype:
                    of_weight.addmm_(shares.T, part)
                elif of_weight is not None:
                    of_weight += shares.T @ part
        # Not as saved tensors: those would live on while the gradients are taken over.
        ctx.gradients = of_hidden, of_weight
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, loss: torch.Tensor, correct: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        del correct
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients
        return (
            None if of_hidden is None else of_hidden.mul_(loss),
            None if of_weight is None else of_weight.mul_(loss),
            None,
        )
