"""A model tuned through the gateway answers both official SDKs, by `transformers serve`."""

from pathlib import Path
from typing import Any

import pytest
from mistralai.client import Mistral
from openai import NotFoundError, OpenAI

from tests.e2e.conftest import Served
from tests.waiting import wait_until

MESSAGES: Any = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.mark.e2e
@pytest.mark.engine
@pytest.mark.timeout(400)
def test_a_tuned_model_answers_both_sdks(served: Served, samples: tuple[Path, Path]) -> None:
    """Right after SUCCESS, streamed and not, with the same words; deleted, it is gone."""
    client = Mistral(api_key=served.key, server_url=served.url, timeout_ms=300_000)
    content = samples[0].read_bytes()
    uploaded = client.files.upload(file={"file_name": "chat.jsonl", "content": content})
    job: Any = client.fine_tuning.jobs.create(
        model="tiny-mistral",
        training_files=[{"file_id": uploaded.id, "weight": 1}],
        hyperparameters={"training_steps": 20, "learning_rate": 0.005},
        suffix="chat",
        auto_start=True,
    )
    finished: Any = wait_until(
        lambda: client.fine_tuning.jobs.get(job_id=job.id),
        lambda job: job.status in {"SUCCESS", "FAILED"},
        patience=300,
    )
    model = finished.fine_tuned_model
    card: Any = client.models.retrieve(model_id=model)
    assert card.capabilities.completion_chat

    said: Any = client.chat.complete(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0, random_seed=1
    )
    assert (said.model, said.usage.completion_tokens) == (model, 12)
    text = said.choices[0].message.content
    assert text
    with client.chat.stream(model=model, messages=MESSAGES, max_tokens=12, temperature=0) as stream:
        parts: list[Any] = [event.data for event in stream]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[-1].choices[0].finish_reason == "length"

    openai = OpenAI(api_key=served.key, base_url=f"{served.url}/openai/v1", max_retries=0)
    whole: Any = openai.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=12, temperature=0, seed=1
    )
    assert (whole.model, whole.choices[0].message.content) == (model, text)
    chunks: Any = openai.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    heard = [*chunks]
    assert "".join(part.choices[0].delta.content or "" for part in heard if part.choices) == text
    assert heard[-1].usage.completion_tokens == 12

    client.models.delete(model_id=model)
    with pytest.raises(NotFoundError, match="has been deleted"):
        openai.chat.completions.create(model=model, messages=MESSAGES)
