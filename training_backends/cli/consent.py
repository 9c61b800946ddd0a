"""Consent to the cost of runs."""

import sys
from typing import TYPE_CHECKING, Any, Final

from training_backends.cli.terminal import ask, no_consent

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, Estimate, TrainingConfig

__all__ = ["UNSTARTED", "agreement", "is_under_way", "need_consent"]

UNSTARTED: Final = frozenset({"pending", "validating", "ready"})
"""Statuses of runs that may not have been started yet."""


async def is_under_way(client: "AsyncTrainingClient", run_id: str) -> bool:
    """Return whether the run with this id has already been started."""
    from training_backends import RunNotFound

    try:
        known = await client.get(run_id)
    except RunNotFound:
        return False
    return known.id == run_id and known.status not in UNSTARTED


def need_consent(
    client: "AsyncTrainingClient", backend: str, config: "TrainingConfig", *, yes: bool
) -> None:
    """Fail before the upload if consent will be needed and there is no terminal to ask on.

    Raises:
        UsageError: See above.
    """
    if yes or config.budget.max_cost is not None or sys.stdin.isatty():
        return
    if client.backend(backend).capabilities.quotes:
        raise no_consent("This run may cost money", "Pass --yes, or set budget.max_cost.")


def agreement(config: "TrainingConfig", *, yes: bool, subject: str = "this run") -> Any:
    """Return the callback that confirms the cost of a run, or of several."""
    budget = config.budget

    async def agree(estimate: "Estimate") -> bool:
        from training_backends import BudgetExceeded
        from training_backends.cli.views.render import price_text

        if yes or budget.decides(estimate):
            return True
        price = price_text(estimate)
        reason, hint = (
            f"{subject.capitalize()} costs {price}",
            "Pass --yes, or set budget.max_cost.",
        )
        question = f"Start {subject} for {price}"
        if not price:
            reason, hint = f"The price of {subject} is unknown", "Pass --yes to launch anyway."
            if budget.max_cost is not None:
                reason += ", so budget.max_cost cannot be checked"
            question = f"{reason}. Start it"
        if not sys.stdin.isatty():
            error = no_consent(reason, hint)
            if estimate.basis == "quote":
                # The job exists by now; on this error the backend cancels it.
                raise BudgetExceeded(str(error), hint=hint)
            raise error
        ours = price_text(estimate.ours) if estimate.ours else None
        return ask(f"{question}{f' (local estimate: {ours})' if ours else ''}?")

    return agree
