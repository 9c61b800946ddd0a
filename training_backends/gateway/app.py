"""The ASGI application: the Mistral and the OpenAI fine-tuning API over one gateway."""

from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from training_backends import __version__
from training_backends.core.errors import TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.gateway.auth import METRICS, Guard
from training_backends.gateway.errors import (
    HTTPProblem,
    failure_answer,
    field_errors,
    is_temporary,
    wire_error,
)
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.metrics import GatewayMetrics
from training_backends.gateway.read_cache import ReadCache
from training_backends.gateway.readiness import Readiness
from training_backends.gateway.routes import answers
from training_backends.gateway.routes_chat import chat_router
from training_backends.gateway.routes_console import console_router
from training_backends.gateway.routes_files import files_router, links_router
from training_backends.gateway.routes_jobs import jobs_router
from training_backends.gateway.routes_models import models_router
from training_backends.gateway.routes_openai import openai_router
from training_backends.protocols.mistral.errors import error_items

__all__ = ["create_app"]

log = get_logger()

HEALTH_SECONDS = 1.0
"""How long a health result is cached."""


def create_app(gateway: Gateway) -> FastAPI:
    """Return the ASGI application for an open gateway."""
    metrics = GatewayMetrics(gateway.store)
    app = FastAPI(
        title="training-backends gateway",
        summary="The fine-tuning APIs of Mistral and OpenAI in front of any backend.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # `include_router` would build every route again: 0.07 s for each application.
        routes=[
            *files_router.routes,
            *links_router.routes,
            *jobs_router.routes,
            *models_router.routes,
            *chat_router.routes,
            *openai_router.routes,
            *(console_router.routes if gateway.settings.console else ()),
            *health_router.routes,
        ],
        # A redirect would point to whatever the request's Host header names.
        redirect_slashes=False,
        middleware=[
            Middleware(
                Guard,
                keys=gateway.keys,
                sessions=gateway.sessions,
                store=gateway.store,
                versions=gateway.versions,
                settings=gateway.settings,
                metrics=metrics,
            ),
            Middleware(ReadCache),
        ],
        exception_handlers={
            HTTPProblem: _rejected,
            HTTPException: _http_error,
            RequestValidationError: _invalid,
            TrainingBackendError: _backend_failed,
        },
    )
    app.state.gateway = gateway
    app.state.is_stopping = False
    app.state.health = _Health(gateway)
    app.state.readiness = Readiness(gateway)
    app.state.metrics = metrics
    return app


class ReadinessOut(BaseModel):
    """Whether the gateway can serve."""

    status: str
    checks: dict[str, str]


# Functions of the module: FastAPI keeps those inside `create_app`, and the gateway with them.
health_router = APIRouter(tags=["health"])


@health_router.get("/health", responses={503: {"model": dict[str, str | list[str]]}})
async def get_health(request: Request) -> JSONResponse:
    """Return the health of the gateway and its databases, and the supported integrations."""
    health: _Health = request.app.state.health
    return await health.answer()


@health_router.get("/healthz")
async def get_liveness() -> dict[str, str]:
    """Return 200 while the process answers."""
    return {"status": "ok"}


@health_router.get("/readyz", responses={503: {"model": ReadinessOut}})
async def get_readiness(request: Request) -> JSONResponse:
    """Return whether requests should be sent here, and the state of each part."""
    readiness: Readiness = request.app.state.readiness
    checks = await readiness.check()
    status = "ready" if set(checks.values()) == {"ok"} else "unavailable"
    if request.app.state.is_stopping:
        status = "stopping"
    found = ReadinessOut(status=status, checks=dict(checks))
    return JSONResponse(found.model_dump(), 200 if status == "ready" else 503)


@health_router.get(METRICS, response_class=PlainTextResponse, responses=answers())
async def get_metrics(request: Request) -> Response:
    """Return metrics for Prometheus."""
    metrics: GatewayMetrics = request.app.state.metrics
    content, content_type = await metrics.exposition(request.headers.get("accept", ""))
    return Response(content, media_type=content_type)


class _Health:
    """Caches the health check: the endpoint needs no key and may be called at any rate."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = anyio.Lock()
        self._until = float("-inf")
        self._ok = True

    async def answer(self) -> JSONResponse:
        """Return the gateway's health, without details of a failure."""
        async with self._lock:
            if anyio.current_time() >= self._until:
                self._ok = await self._probe()
                self._until = anyio.current_time() + HEALTH_SECONDS
        gateway = self._gateway
        body = {
            "status": "ok",
            "backend": gateway.backend,
            "version": __version__,
            "integrations": sorted(
                gateway.client.backend(gateway.backend).capabilities.integrations
            ),
        }
        if self._ok:
            return JSONResponse(body)
        body |= {"status": "unavailable", "reason": "A database of the gateway is unavailable."}
        return JSONResponse(body, 503)

    async def _probe(self) -> bool:
        try:
            await self._gateway.check()
        except Exception as error:
            if not is_temporary(error):
                raise
            log.error("health check failed", reason=str(error))  # noqa: TRY400
            return False
        return True


def _error(
    request: Request,
    status: int,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    status, body = wire_error(request.scope["path"], status, body)
    return JSONResponse(body, status, headers)


async def _rejected(request: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, HTTPProblem)  # noqa: S101  # registered for it only
    return _error(request, refusal.status, refusal.body, refusal.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for it only
    return _error(request, error.status_code, {"detail": error.detail}, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # registered for it only
    return _error(request, 422, field_errors(error_items(error.errors())))


async def _backend_failed(request: Request, error: Exception) -> JSONResponse:
    """Answer with a 5xx that reveals no local paths."""
    assert isinstance(error, TrainingBackendError)  # noqa: S101  # registered for it only
    log.error("request failed", path=request.scope["path"], reason=error.message)
    return _error(request, *failure_answer(error, request.state.request_id))
