"""Routes of the models API."""

import base64
from contextlib import closing
from typing import Any, Final

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Send

from training_backends.gateway.errors import HTTPProblem
from training_backends.gateway.routes import (
    Caller,
    ComputedResponse,
    Opened,
    SmallBody,
    answers,
    list_response,
)
from training_backends.gateway.weights import read_range
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

_TAR: Final[dict[str, Any]] = {
    "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}
}
_WEIGHTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "A tar archive of the weights.", **_TAR},
    206: {"description": "The part of the archive that Range names.", **_TAR},
    416: {"description": "The range begins behind the end of the archive."},
}


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


@models_router.get(
    "/models/{model_id}/weights",
    response_class=Response,
    responses=_WEIGHTS | answers(404),
    name="download_weights",
)
async def download_weights(
    model_id: str, request: Request, gateway: Opened, caller: Caller
) -> Response:
    """Return the weights of a fine-tuned model as a tar archive."""
    archive, digest = await gateway.weights.archive(model_id, caller)
    tag = f'"{digest.hex()}"'
    headers = {
        "content-type": "application/x-tar",
        "content-disposition": 'attachment; filename="weights.tar"',
        "accept-ranges": "bytes",
        "etag": tag,
        "repr-digest": f"sha-256=:{base64.b64encode(digest).decode()}:",
        "cache-control": "no-store",
    }
    found = read_range(request.headers.get("range", ""), archive.size)
    if request.headers.get("if-range", tag) != tag:
        found = None
    start, stop = found or (0, archive.size)
    if start == stop:
        what = {"detail": "The range begins behind the end of the archive."}
        raise HTTPProblem(416, what, {"content-range": f"bytes */{archive.size}"})
    headers["content-length"] = str(stop - start)
    if found:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{archive.size}"
    await gateway.store.awrite(lambda c: caller.record(c, "weights.download", model_id))

    async def answer(send: Send) -> None:
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        status = 206 if found else 200
        await send({"type": "http.response.start", "status": status, "headers": fields})
        with closing(archive.read(start, stop)) as chunks:
            while chunk := await to_thread.run_sync(next, chunks, b""):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return ComputedResponse(answer)


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
