"""Models over HTTP: offered, fine-tuned, renamed, archived, deleted."""

from typing import Any

import pytest

from tests.gateway.conftest import Site
from training_backends.core.errors import BackendUnavailable, RunNotFound

pytestmark = pytest.mark.anyio

TUNED = "/v1/fine_tuning/models"


async def test_base_models_are_listed_with_what_they_are_for(shared: Site) -> None:
    """The built-in catalogue, as base models that can be fine-tuned."""
    listed = (await shared.http.get("/v1/models")).json()
    cards = {card["id"]: card for card in listed["data"]}
    assert listed["object"] == "list"
    assert {"tiny-mistral", "open-mistral-7b"} <= set(cards)
    assert cards["tiny-mistral"]["type"] == "base"
    assert cards["tiny-mistral"]["capabilities"]["fine_tuning"] is True
    assert isinstance(cards["tiny-mistral"]["created"], int)
    one = (await shared.http.get("/v1/models/open-mistral-7b")).json()
    assert one == cards["open-mistral-7b"]
    assert "Apache-2.0" in one["description"]


async def test_a_fine_tuned_model_lives(shared: Site) -> None:
    """Listed, retrieved, renamed, archived, brought back, deleted."""
    job = await shared.finished(suffix="mine")
    model = job["fine_tuned_model"]
    card = (await shared.http.get(f"/v1/models/{model}")).json()
    assert (card["type"], card["job"], card["root"]) == ("fine-tuned", job["id"], "tiny-mistral")
    assert card in (await shared.http.get("/v1/models")).json()["data"]

    changed = (await shared.http.patch(f"{TUNED}/{model}", json={"name": "Ada"})).json()
    assert (changed["name"], changed["description"]) == ("Ada", None)
    assert (changed["model_type"], changed["workspace_id"]) == ("completion", "default")
    changed = (await shared.http.patch(f"{TUNED}/{model}", json={"description": "d"})).json()
    assert (changed["name"], changed["description"]) == ("Ada", "d")
    changed = (await shared.http.patch(f"{TUNED}/{model}", json={})).json()
    assert (changed["name"], changed["description"]) == ("Ada", "d")

    for _ in range(2):
        archived = await shared.http.post(f"{TUNED}/{model}/archive")
        assert archived.json() == {"id": model, "object": "model", "archived": True}
    assert (await shared.http.get(f"/v1/models/{model}")).json()["archived"] is True
    back = await shared.http.delete(f"{TUNED}/{model}/archive")
    assert back.json() == {"id": model, "object": "model", "archived": False}

    deleted = await shared.http.delete(f"/v1/models/{model}")
    assert deleted.json() == {"id": model, "object": "model", "deleted": True}
    assert (await shared.http.get(f"/v1/models/{model}")).status_code == 404
    assert (await shared.http.delete(f"/v1/models/{model}")).status_code == 404
    assert (await shared.http.patch(f"{TUNED}/{model}", json={"name": "x"})).status_code == 404
    assert (await shared.get(job["id"]))["fine_tuned_model"] == model


async def test_an_id_may_be_percent_encoded(shared: Site) -> None:
    """The TypeScript SDK sends %3A for a colon."""
    model = (await shared.finished())["fine_tuned_model"]
    encoded = model.replace(":", "%3A")
    assert (await shared.http.get(f"/v1/models/{encoded}")).json()["id"] == model
    assert (await shared.http.post(f"{TUNED}/{encoded}/archive")).json()["id"] == model


async def test_deleting_a_model_deletes_its_result(here: Site) -> None:
    """The backend is asked to delete, and the run is forgotten."""
    job = await here.finished()
    gateway = here.served.gateway
    assert (await gateway.client.get(job["id"])).result_model == "model"
    await here.http.delete(f"/v1/models/{job['fine_tuned_model']}")
    assert here.backend._jobs == {}
    with pytest.raises(RunNotFound):
        await gateway.client.get(job["id"])


async def test_a_result_that_cannot_be_deleted_now_is_logged(
    here: Site, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is gone for clients all the same."""
    model = (await here.finished())["fine_tuned_model"]

    async def away(run: object) -> None:
        raise BackendUnavailable("away")

    monkeypatch.setattr(here.backend, "delete", away)
    assert (await here.http.delete(f"/v1/models/{model}")).status_code == 200
    assert any(entry["event"] == "run not deleted" for entry in logs)


async def test_base_models_cannot_be_changed(shared: Site) -> None:
    """They are the operator's, in the catalogue."""
    for method, path in (
        ("DELETE", "/v1/models/tiny-mistral"),
        ("PATCH", f"{TUNED}/tiny-mistral"),
        ("POST", f"{TUNED}/tiny-mistral/archive"),
        ("DELETE", f"{TUNED}/tiny-mistral/archive"),
    ):
        body = {"name": "x"} if method == "PATCH" else None
        answer = await shared.http.request(method, path, json=body)
        assert (answer.status_code, "base model" in answer.json()["detail"]) == (403, True)


async def test_filters_of_the_list(here: Site) -> None:
    """By owner and by id."""
    job = await here.finished()
    model = job["fine_tuned_model"]

    async def ids(query: str) -> list[str]:
        return [card["id"] for card in (await here.http.get(f"/v1/models?{query}")).json()["data"]]

    assert await ids(f"model={model}") == [model]
    assert await ids(f"provider={model.split(':')[2]}") == [model]
    assert model not in await ids("provider=mistralai")
    assert await ids("model=none") == []


async def test_unknown_words_in_an_update_are_refused(shared: Site) -> None:
    """By name, as everywhere."""
    model = (await shared.finished())["fine_tuned_model"]
    answer = await shared.http.patch(f"{TUNED}/{model}", json={"nmae": "x"})
    assert answer.json()["detail"][0]["loc"] == ["body", "nmae"]
