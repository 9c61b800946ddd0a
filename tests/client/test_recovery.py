"""A damaged store: said, set aside, and made anew from what can be known."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.client.conftest import MakeConfig
from training_backends import (
    AsyncTrainingClient,
    Capabilities,
    RemoteFilters,
    RemoteRun,
    StoreError,
    TrainingConfig,
    TrainingStatus,
)
from training_backends.testing.backend import ScriptedBackend

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


class Telling(ScriptedBackend):
    """Lists its jobs, with what they were made of where it was told that."""

    def __init__(self) -> None:
        super().__init__(capabilities=Capabilities(resumes="checkpoint", lists_remote=True))
        self.configs: dict[str, TrainingConfig] = {}

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List all of them."""
        del filters
        return [
            RemoteRun(remote_id=job, model="m", state=state, config=self.configs.get(job))
            for job, state in self._jobs.items()
        ]


@pytest.fixture
def backend() -> Telling:
    return Telling()


def damage(home: Path) -> None:
    for part in home.glob("runs.db-*"):
        part.unlink()
    (home / "runs.db").write_bytes(b"this is no database" * 500)


async def test_a_damaged_store_is_reported_with_the_remedy(
    tmp_path: Path, backend: Telling, make_config: MakeConfig
) -> None:
    """Nothing is made anew unasked."""
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        await client.launch(make_config(), backend="scripted")
    damage(tmp_path)
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        with pytest.raises(StoreError, match="damaged") as caught:
            await client.list()
        assert "doctor --recover" in str(caught.value.hint)
        assert await client.check_store()


async def test_runs_come_back_from_their_providers(
    tmp_path: Path, backend: Telling, make_config: MakeConfig
) -> None:
    """What the file has lost is listed by the provider, goes on and can be stopped."""
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run = await client.launch(make_config(), backend="scripted")
        vague = await client.launch(make_config(), backend="scripted")
    backend.configs[str(run.remote_id)] = run.config
    damage(tmp_path)
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        done = await client.recover_store()
        assert (done.saved, done.left_out) == ([], 1)
        assert done.damaged is not None
        assert done.damaged.exists()
        (again,) = await client.list(backend="scripted")
        assert (again.remote_id, again.config.tags) == (run.remote_id, {"recovered": "true"})
        assert (await client.stop(again.id)).status is TrainingStatus.STOPPING
    assert vague.remote_id != run.remote_id


async def test_a_saved_run_is_not_launched_twice(
    tmp_path: Path, backend: Telling, make_config: MakeConfig
) -> None:
    """Its journal may have lost rows, so a repeated launch begins nothing."""
    config = make_config()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run = await client.launch(config, backend="scripted", run_id="mine")
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        done = await client.recover_store()
        assert "mine" in done.saved
        again = await client.launch(config, backend="scripted", run_id="mine")
    assert (again.remote_id, len(backend.created)) == (run.remote_id, 1)
