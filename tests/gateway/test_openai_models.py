"""Models of the OpenAI API, driven by the official client."""

import openai
import pytest
from openai import AsyncOpenAI

from tests.gateway.conftest import Site

pytestmark = pytest.mark.anyio


async def test_a_model_lives(shared: Site, shared_sdk: AsyncOpenAI) -> None:
    """Listed and retrieved by its name with colons, then deleted for both APIs."""
    name = (await shared.finished(suffix="mine"))["fine_tuned_model"]
    assert name.count(":") == 5
    listed = {model.id: model async for model in shared_sdk.models.list()}
    assert {name, "tiny-mistral"} <= listed.keys()
    model = await shared_sdk.models.retrieve(name)
    assert (model.id, model.object) == (name, "model")
    assert listed[name] == model
    assert isinstance(model.created, int)
    assert (await shared_sdk.models.retrieve("tiny-mistral")).id == "tiny-mistral"
    gone = await shared_sdk.models.delete(name)
    assert (gone.id, gone.object, gone.deleted) == (name, "model", True)
    assert (await shared.http.get(f"/v1/models/{name}")).status_code == 404
    with pytest.raises(openai.NotFoundError):
        await shared_sdk.models.delete(name)


async def test_errors_are_the_classes_of_the_client(shared_sdk: AsyncOpenAI) -> None:
    """Names with slashes, which the client encodes, arrive decoded; base models stay."""
    for name in ("ft:123", "org/name"):
        with pytest.raises(openai.NotFoundError, match=f"The model '{name}' does not") as gone:
            await shared_sdk.models.retrieve(name)
        assert (gone.value.param, gone.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        await shared_sdk.models.delete("tiny-mistral")
