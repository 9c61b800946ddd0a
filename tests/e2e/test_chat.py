"""A model tuned through the gateway answers both official SDKs, by `transformers serve`."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mistralai.client import Mistral
from openai import AsyncOpenAI, NotFoundError
from pydantic import SecretStr

from tests.trainer.plain import save_tiny
from tests.waiting import until
from training_backends.gateway.server import running
from training_backends.gateway.settings import GatewaySettings

KEY = "a-static-key-for-tests"
MESSAGES: Any = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.mark.anyio
@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("forked")
async def test_an_adapter_answers_both_sdks(tmp_path: Path, samples: tuple[Path, Path]) -> None:
    """Right after SUCCESS, streamed and not, with the same words; deleted, it is gone."""
    catalogue, home = tmp_path / "catalogue.toml", tmp_path / "ho:me@here"
    base = save_tiny(tmp_path / "base")
    catalogue.write_text(f'[models.small]\ntarget = "{base}"\ntuning = "lora"\n')
    settings = GatewaySettings(api_key=SecretStr(KEY), catalogue=catalogue)
    async with (
        running(settings, home=home, backend="local", port=0) as served,
        Mistral(api_key=KEY, server_url=served.url, timeout_ms=300_000) as mistral,
        AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/openai/v1", max_retries=0) as openai,
    ):
        model = await tuned(mistral, samples[0])
        merged = [*(home / "gateway" / "inference").glob("models/*")]
        assert merged == []
        text = await answers_mistral(mistral, model)
        assert await answers_openai(openai, model) == text
        (merged_into,) = (home / "gateway" / "inference").glob("models/*")
        assert not (merged_into / "adapter_config.json").exists()

        await mistral.models.delete_async(model_id=model)
        assert not merged_into.exists()
        with pytest.raises(NotFoundError, match="has been deleted"):
            await openai.chat.completions.create(model=model, messages=MESSAGES)


async def tuned(mistral: Mistral, rows: Path) -> str:
    """Return the name of a model that was tuned for a few steps."""
    content = rows.read_bytes()
    uploaded = await mistral.files.upload_async(
        file={"file_name": "chat.jsonl", "content": content}
    )
    jobs: Any = mistral.fine_tuning.jobs
    job = await jobs.create_async(
        model="small",
        training_files=[{"file_id": uploaded.id, "weight": 1}],
        hyperparameters={"training_steps": 10, "learning_rate": 0.01},
        auto_start=True,
    )
    finished = await until(
        partial(jobs.get_async, job_id=job.id), lambda job: job.status in {"SUCCESS", "FAILED"}
    )
    card: Any = await mistral.models.retrieve_async(model_id=finished.fine_tuned_model)
    assert card.capabilities.completion_chat
    return str(finished.fine_tuned_model)


async def answers_mistral(mistral: Mistral, model: str) -> str:
    """Return what a model answers, streamed and not."""
    ask: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 12}
    said: Any = await mistral.chat.complete_async(**ask, temperature=0, random_seed=1)
    assert (said.model, said.usage.completion_tokens) == (model, 12)
    text = str(said.choices[0].message.content)
    parts: list[Any] = [part.data async for part in await mistral.chat.stream_async(**ask)]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[-1].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 12
    return text


async def answers_openai(openai: AsyncOpenAI, model: str) -> str:
    """Return what a model answers, streamed and not."""
    create: Any = partial(
        openai.chat.completions.create, model=model, messages=MESSAGES, temperature=0
    )
    whole = await create(max_completion_tokens=12, seed=1, n=1)
    assert whole.model == model
    text = str(whole.choices[0].message.content)
    heard = await create(max_tokens=12, stream=True, stream_options={"include_usage": True})
    parts = [part async for part in heard]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
    assert parts[-1].usage.completion_tokens == 12
    return text
