"""A launch that is cancelled while the provider creates its job."""

from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tests.waiting import until
from training_backends import AsyncTrainingClient, TrainingBackend, TrainingConfig, TrainingStatus
from training_backends.testing.faults import HangAnswer


async def check_cancelled_launch(
    home: Path, backend: TrainingBackend, provider: Any, config: TrainingConfig, *, path: str
) -> None:
    """Cancel a call of `run` once the job exists, before its id is known: the job is stopped.

    Args:
        path: Where jobs are created.
    """
    provider.fail(HangAnswer(), method="POST", path=path)
    async with AsyncTrainingClient(home=home, backends={backend.name: backend}) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(client.run, config, backend=backend.name, run_id="mine"))
            await until(lambda: provider.jobs)
            tasks.cancel_scope.cancel()
        run = await client.get("mine")
    (job,) = provider.jobs.values()
    assert run.remote_id == job.id
    assert run.status in {TrainingStatus.STOPPING, TrainingStatus.CANCELLED}
    assert job.status.lower() in {"cancelled", "cancel_requested"}
