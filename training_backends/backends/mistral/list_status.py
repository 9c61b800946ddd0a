"""Get the status of many runs from job lists by status, a hundred jobs per request."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

from training_backends.backends.mistral.api import JobFilters, JobHead, MistralAPI
from training_backends.backends.mistral.job_state import short_state_of
from training_backends.backends.mistral.settings import CLOCK_SLACK
from training_backends.core.run import RunState, TrainingRun
from training_backends.protocols.mistral.status import (
    ACTIVE,
    ENDED,
    JOB_STATUSES,
    to_status,
    to_wire,
)

__all__ = ["FEW", "StatusSweep"]

FEW: Final = 3
"""Up to this many runs are requested one by one."""
_WORDS: Final = (*ACTIVE, *ENDED)
"""In the order of a job's life, so that jobs that advance meanwhile are found again."""


class StatusSweep:
    """Looks up runs in the provider's job lists, starting with their last known status.

    States omit what lists do not show. Jobs that change lists between two requests may be
    missed, but are never reported wrongly.
    """

    def __init__(self, api: MistralAPI, runs: Sequence[TrainingRun]) -> None:
        self._api = api
        self._wanted = {run.remote_id: run for run in runs if run.remote_id is not None}
        self._missing = dict(self._wanted)
        self._modified_at: dict[str, int] = {}
        self.found: dict[str, RunState] = {}
        """States by run id."""

    async def run(self) -> None:
        """Look up the runs, with at most as many requests as there are runs."""
        groups: dict[str | None, list[TrainingRun]] = {}
        for run in self._wanted.values():
            groups.setdefault(_word(run), []).append(run)
        for word in _WORDS:
            if word in groups:
                await self._list(word, groups[word], len(groups[word]))
        # Servers cannot filter by unknown statuses: look for such runs among all jobs.
        strange = groups.get(None, ())
        if len(strange) > FEW:
            await self._list(None, strange, len(strange))
        left = len(self._missing)
        for word in ACTIVE:
            if word not in groups and len(self._missing) > FEW and left:
                left -= await self._list(word, list(self._missing.values()), left)

    async def _list(self, word: str | None, runs: Sequence[TrainingRun], at_most: int) -> int:
        """Look up `runs` in one list and return the number of requests."""
        filters = JobFilters(
            status=word,
            created_after=min(run.created_at for run in runs) - CLOCK_SLACK,
            # A job may be created days after its run, but not after the run's last change.
            created_before=max(run.changed_at or run.created_at for run in runs) + CLOCK_SLACK,
        )
        sought = {run.remote_id for run in runs}
        requests = 0
        async with aclosing(self._api.job_heads(filters)) as pages:
            async for heads in pages:
                requests += 1
                for head in heads:
                    self._meet(head)
                if requests >= at_most or sought.isdisjoint(self._missing):
                    break  # the list may be very long
        return requests

    def _meet(self, head: JobHead) -> None:
        run = self._wanted.get(head.id)
        if run is None or head.modified_at < self._modified_at.get(head.id, head.modified_at):
            return
        self._missing.pop(head.id, None)
        self._modified_at[head.id] = head.modified_at
        status = to_status(head.status)
        if status.is_terminal and status is not run.status:
            self.found.pop(run.id, None)  # lists omit the result of finished jobs
        else:
            self.found[run.id] = short_state_of(head.status, head.modified_at)


def _word(run: TrainingRun) -> str | None:
    """Return the protocol status to list for a run; None if there is none."""
    word = run.raw_status or to_wire(run.status)
    return word if word in JOB_STATUSES else None
