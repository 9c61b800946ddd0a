"""Routes of the models API."""

from fastapi import APIRouter
from starlette.responses import Response

from training_backends.gateway.routes import Caller, Opened, SmallBody, answers, list_response
from training_backends.protocols.mistral.wire import (
    ArchiveFTModelOut,
    BaseModelCard,
    ClassifierFTModelOut,
    CompletionFTModelOut,
    DeleteModelOut,
    FTModelCard,
    ModelList,
    UnarchiveFTModelOut,
    UpdateFTModelIn,
)

__all__ = ["models_router"]

models_router = APIRouter(prefix="/v1", tags=["models"])


@models_router.get("/models", responses=answers(), name="list_models", response_model=ModelList)
async def list_models(
    gateway: Opened, caller: Caller, provider: str | None = None, model: str | None = None
) -> Response:
    """List base models and fine-tuned models."""
    return await list_response(gateway.models.pages(caller, provider=provider, model=model))


@models_router.get("/models/{model_id}", responses=answers(404), name="retrieve_model")
async def retrieve_model(
    model_id: str, gateway: Opened, caller: Caller
) -> BaseModelCard | FTModelCard:
    """Return one model."""
    return await gateway.models.retrieve(model_id, caller)


@models_router.delete("/models/{model_id}", responses=answers(403, 404), name="delete_model")
async def delete_model(model_id: str, gateway: Opened, caller: Caller) -> DeleteModelOut:
    """Delete a fine-tuned model."""
    return await gateway.models.delete(model_id, caller)


@models_router.patch(
    "/fine_tuning/models/{model_id}",
    responses=answers(403, 404),
    name="update_model",
    dependencies=[SmallBody],
)
async def update_model(
    model_id: str, change: UpdateFTModelIn, gateway: Opened, caller: Caller
) -> CompletionFTModelOut | ClassifierFTModelOut:
    """Change a fine-tuned model's name or description."""
    return await gateway.models.update(model_id, change, caller)


@models_router.post(
    "/fine_tuning/models/{model_id}/archive", responses=answers(403, 404), name="archive_model"
)
async def archive_model(model_id: str, gateway: Opened, caller: Caller) -> ArchiveFTModelOut:
    """Archive a fine-tuned model."""
    return await gateway.models.archive(model_id, caller)


@models_router.delete(
    "/fine_tuning/models/{model_id}/archive", responses=answers(403, 404), name="unarchive_model"
)
async def unarchive_model(model_id: str, gateway: Opened, caller: Caller) -> UnarchiveFTModelOut:
    """Unarchive a fine-tuned model."""
    return await gateway.models.unarchive(model_id, caller)
