"""Chat by a server that the operator runs, which loads adapters as vLLM does."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Site, site
from tests.gateway.test_chat import completion
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

BASE = "tiny-mistral"


class VLLM(LoopbackServer):
    """One base model, and adapters that are loaded at run time.

    Attributes:
        updates: Whether it was started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
        adapters: Their directories by name.
    """

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.updates = True
        self.adapters: dict[str, str] = {}

    def _respond(self, request: Received) -> StubReply:
        asked = json.loads(request.body or b"{}")
        if request.path == "/v1/models":
            names = [BASE, *self.adapters]
            return reply({"object": "list", "data": [{"id": name} for name in names]})
        if request.path == "/v1/load_lora_adapter" and self.updates:
            if "lora_name" not in asked or "lora_path" not in asked:
                return reply({"error": "Both 'lora_name' and 'lora_path' must be provided."}, 400)
            if not Path(asked["lora_path"], "adapter_config.json").is_file():
                return reply({"error": f"No adapter found for {asked['lora_path']}"}, 404)
            self.adapters[asked["lora_name"]] = asked["lora_path"]
            return reply("Success: LoRA adapter added successfully.")
        if request.path == "/v1/unload_lora_adapter" and self.updates:
            del self.adapters[asked["lora_name"]]
            return reply("Success: LoRA adapter removed successfully.")
        if request.path == "/v1/chat/completions":
            if asked["model"] in {BASE, *self.adapters}:
                return reply(completion(asked["model"]))
            return reply({"error": {"message": "The model does not exist."}}, 404)
        return reply({"detail": "Not Found"}, 404)

    def loads(self) -> list[Any]:
        """Return which adapters it was asked to load, probes aside."""
        asked = [json.loads(each.body) for each in self.asked("POST", "/load_lora_adapter")]
        return [each for each in asked if each]


def reply(document: Any, status: int = 200) -> StubReply:
    """Answer with JSON."""
    return StubReply(status=status, content=json.dumps(document).encode())


@pytest.fixture
def vllm() -> Iterator[VLLM]:
    """Run the server."""
    with VLLM() as server:
        yield server


@pytest.fixture
async def here(tmp_path: Path, vllm: VLLM) -> AsyncIterator[Site]:
    """A gateway in front of it."""
    async with site(tmp_path / "home", inference_url=f"{vllm.base_url}/v1") as opened:
        yield opened


async def tuned(here: Site, *, adapter: bool = True) -> str:
    """Return the name of a model whose weights are where the local backend has them."""
    job_id, remote_id = await here.started()
    weights = here.home / "gateway" / "runs" / job_id / "result"
    weights.mkdir(parents=True)
    (weights / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    here.backend.finish(remote_id, result_model=str(weights))
    return str((await here.until(job_id, "SUCCESS"))["fine_tuned_model"])


async def ask(here: Site, model: str) -> httpx.Response:
    """Chat with a model."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}]}
    return await here.http.post("/v1/chat/completions", json=body)


async def claims(here: Site) -> dict[str, bool]:
    """Return by model whether it claims to chat."""
    cards = (await here.http.get("/v1/models")).json()["data"]
    return {card["id"]: card["capabilities"]["completion_chat"] for card in cards}


async def test_an_adapter_is_loaded_for_its_first_chat_and_unloaded_with_its_model(
    here: Site, vllm: VLLM
) -> None:
    """Under the model's name, once."""
    model = await tuned(here)
    for _ in range(3):
        answer = await ask(here, model)
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    job_id = (await here.http.get(f"/v1/models/{model}")).json()["job"]
    path = str(here.home / "gateway" / "runs" / job_id / "result")
    assert vllm.loads() == [{"lora_name": model, "lora_path": path}]
    await here.http.delete(f"/v1/models/{model}")
    assert vllm.adapters == {}


async def test_an_adapter_is_loaded_again_after_the_server_was_restarted(
    here: Site, vllm: VLLM
) -> None:
    """One chat fails, the next is answered."""
    model = await tuned(here)
    assert (await ask(here, model)).status_code == 200
    vllm.adapters.clear()
    assert (await ask(here, model)).status_code == 404
    assert (await ask(here, model)).status_code == 200
    assert len(vllm.loads()) == 2


async def test_only_models_that_the_server_can_answer_with_claim_to(here: Site, vllm: VLLM) -> None:
    """Base models that it has, and adapters that it has or can load."""
    adapter, full = await tuned(here), await tuned(here, adapter=False)
    found = await claims(here)
    assert (found[BASE], found["open-mistral-7b"]) == (True, False)
    assert (found[adapter], found[full]) == (True, False)


async def test_without_updates_nothing_is_claimed_that_is_not_there(here: Site, vllm: VLLM) -> None:
    """What it has been started with is."""
    vllm.updates = False
    loaded, other = await tuned(here), await tuned(here)
    vllm.adapters[loaded] = "from the command line"
    found = await claims(here)
    assert (found[loaded], found[other]) == (True, False)
    assert (await ask(here, loaded)).status_code == 200
    assert vllm.loads() == []


async def test_a_server_that_takes_directories_gets_the_complete_model(
    here: Site, vllm: VLLM
) -> None:
    """As `transformers serve` does; also after it was restarted."""
    vllm.updates = False
    model = await tuned(here, adapter=False)
    job_id = (await here.http.get(f"/v1/models/{model}")).json()["job"]
    path = str(here.home / "gateway" / "runs" / job_id / "result")
    await ask(here, model)
    (body,) = [json.loads(each.body) for each in vllm.asked("POST", "/chat/completions")]
    assert body["model"] == path


async def test_an_adapter_that_cannot_be_loaded_is_404_and_its_reason_logged(
    here: Site, vllm: VLLM, logs: list[Any]
) -> None:
    """The client learns no path."""
    model = await tuned(here)
    refusal = OtherAnswer(status=400, body={"error": "rank 64 is above max_lora_rank 16"})
    vllm.fail(refusal, path="/load_lora_adapter", skip=1)
    answer = await ask(here, model)
    assert answer.status_code == 404
    assert str(here.home) not in answer.text
    (entry,) = [each for each in logs if each["event"] == "adapter not loaded"]
    assert "rank 64" in entry["reason"]


async def test_a_server_that_is_away_is_an_error_to_retry(here: Site, vllm: VLLM) -> None:
    """And nothing claims to answer."""
    model = await tuned(here)
    vllm.fail(OtherAnswer(status=503), path="/models", times=2)
    answer = await ask(here, model)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert set((await claims(here)).values()) == {False}
    assert (await ask(here, model)).status_code == 200
