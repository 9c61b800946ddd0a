"""Checkpoints and fine-tuned models of the OpenAI API, used as models."""

import shutil
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
from anyio import to_thread
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.gateway.conftest import Site, jsonl, openai_client, own_id, site
from tests.waiting import until
from training_backends.core.run import Checkpoint, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


class KeepsCheckpoints(ScriptedBackend):
    """Also writes the checkpoints in its states as models."""

    def __init__(self) -> None:
        declared = ScriptedBackend().capabilities
        super().__init__(capabilities=declared.model_copy(update={"downloads_checkpoints": True}))

    async def download_checkpoint(self, run: TrainingRun, checkpoint: str, target: Path) -> Path:
        del run
        await anyio.Path(target).mkdir()
        await anyio.Path(target / "model.txt").write_text(checkpoint, encoding="utf-8")
        return target

    async def remove_checkpoints(self, run: TrainingRun, steps: Collection[int]) -> None:
        for point in run.checkpoints:
            if point.path is not None and point.step in steps:
                await to_thread.run_sync(shutil.rmtree, point.path)


@pytest.fixture
async def keeping(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway in front of that backend."""
    async with site(tmp_path / "home", KeepsCheckpoints()) as opened:
        yield opened


@pytest.fixture
async def sdk(keeping: Site) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(keeping) as client:
        yield client


async def trained(keeping: Site, sdk: AsyncOpenAI, *steps: int, result: str = "model") -> Any:
    """Take a job to its end, with checkpoints whose files are in `checkpoints` of the home."""
    file = await sdk.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
    job = await sdk.fine_tuning.jobs.create(
        model="tiny-mistral", training_file=file.id, suffix="mine"
    )
    (remote, *_) = await until(lambda: keeping.backend.created)
    paths = {step: keeping.home / f"step-{step}" for step in steps}
    for path in paths.values():
        path.mkdir()
    points = tuple(
        Checkpoint(step=step, at=utc_now(), metrics={"valid_loss": 1 / step}, path=path)
        for step, path in paths.items()
    )
    done = TrainingStatus.COMPLETED
    keeping.backend.say(remote, done, result_model=result, checkpoints=points)
    return await reached(sdk, job.id, "succeeded")


async def reached(sdk: AsyncOpenAI, job_id: str, status: str) -> FineTuningJob:
    """Wait until a job has a status."""
    jobs = sdk.fine_tuning.jobs
    return await until(lambda: jobs.retrieve(job_id), lambda job: job.status == status)


async def test_checkpoints_that_are_kept_are_models(keeping: Site, sdk: AsyncOpenAI) -> None:
    """The last one has the name of the final model; one that is removed is not listed."""
    job = await trained(keeping, sdk, 10, 20, 30)
    (keeping.home / "step-10").rmdir()
    last, earlier = (await sdk.fine_tuning.jobs.checkpoints.list(job.id)).data
    assert last.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert earlier.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-20"
    assert (earlier.step_number, earlier.metrics.valid_loss) == (20, 0.05)
    page = await sdk.fine_tuning.jobs.checkpoints.list(job.id, after=last.id, limit=1)
    assert ([point.id for point in page.data], page.has_more) == ([earlier.id], False)
    for point in (last, earlier):
        model = await sdk.models.retrieve(point.fine_tuned_model_checkpoint)
        assert (model.id, model.object) == (point.fine_tuned_model_checkpoint, "model")
    for step in ("10", "40", "x", "9" * 30):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await sdk.models.retrieve(f"{job.fine_tuned_model}:ckpt-step-{step}")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await sdk.models.retrieve("ft:tiny-mistral:x:y:12345678:ckpt-step-20")


async def test_a_job_starts_from_a_fine_tuned_model(keeping: Site, sdk: AsyncOpenAI) -> None:
    """Or from a checkpoint, which is written as a model once; neither path is shown."""
    first = await trained(keeping, sdk, 20, 30, result="/models/result")
    client = keeping.served.gateway.client
    written = keeping.home / "gateway" / "checkpoints" / f"{own_id(first.id)}-step-20"
    bases = {
        first.fine_tuned_model: "/models/result",
        f"{first.fine_tuned_model}:ckpt-step-20": str(written),
    }
    for name, target in bases.items():
        job = await sdk.fine_tuning.jobs.create(
            model=name, training_file=first.training_file, suffix="more"
        )
        assert job.model == name
        await reached(sdk, job.id, "running")
        config = (await client.get(own_id(job.id))).config
        assert config.model == target
        assert config.tuning is not None
        assert config.tuning.kind == "full"
        keeping.backend.finish(keeping.backend.created[-1])
        done = await reached(sdk, job.id, "succeeded")
        assert done.fine_tuned_model is not None
        assert done.fine_tuned_model.split(":")[:2] == ["ft", "tiny-mistral"]
        assert ":more:" in done.fine_tuned_model
    assert (written / "model.txt").read_text() == "step-20"
    await sdk.models.delete(first.fine_tuned_model)
    assert not written.exists()
    for name in bases:
        with pytest.raises(openai.BadRequestError, match="not available for fine-tuning"):
            await sdk.fine_tuning.jobs.create(model=name, training_file=first.training_file)


async def test_models_of_other_projects_are_no_bases(keeping: Site, sdk: AsyncOpenAI) -> None:
    """As if they did not exist, with their checkpoints."""
    done = await trained(keeping, sdk, 20, 30)
    keys = keeping.served.gateway.keys
    other = await anyio.to_thread.run_sync(lambda: keys.create(project="other"))
    theirs = sdk.with_options(api_key=other.key.get_secret_value())
    file = await theirs.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
    for name in (done.fine_tuned_model, f"{done.fine_tuned_model}:ckpt-step-20"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await theirs.models.retrieve(name)
        with pytest.raises(openai.BadRequestError, match="not available for fine-tuning"):
            await theirs.fine_tuning.jobs.create(model=name, training_file=file.id)
