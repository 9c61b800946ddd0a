"""The console: a page in the browser that uses the same API as every other client.

Its scripts call `/v1` and `/openai/v1` with the session's cookie. The routes here are what those
APIs have no word for: signing in, a list of runs with their progress, live updates, and a look at
data files.
"""

import gzip
import hashlib
import mimetypes
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field, SecretStr
from starlette.responses import JSONResponse, Response, StreamingResponse

from training_backends import __version__
from training_backends.core.errors import ConfigError, CredentialNotFound
from training_backends.core.status import statuses_of
from training_backends.gateway.catalogue import Offer
from training_backends.gateway.console_feed import MOST_FOLLOWED, FeedCursor
from training_backends.gateway.console_runs import (
    RunQuery,
    list_runs,
    load_run,
    records_before,
    run_metrics,
)
from training_backends.gateway.console_sessions import SESSION_SECONDS, csrf_token
from training_backends.gateway.errors import HTTPProblem, invalid, not_found, plain
from training_backends.gateway.files import upload_of
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.jobstore import require_job
from training_backends.gateway.keys import KeyInfo, Principal, Scope, read_expiry
from training_backends.gateway.routes import Caller, Opened, SmallBody
from training_backends.gateway.routes_files import receive_file
from training_backends.protocols.mistral.status import METHODS

__all__ = ["console_router"]

console_router = APIRouter(include_in_schema=False)

_ASSETS: Final = Path(__file__).with_name("console")
_PLACEHOLDER: Final = "console/assets/-/"
_POLICY: Final = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_NO_STORE: Final = {"cache-control": "no-store"}


# -- files of the page -----------------------------------------------------------------


@cache
def _assets() -> tuple[str, Mapping[str, tuple[str, bytes, bytes]]]:
    """Return a digest of all files, and type, content and compressed content by path."""
    contents = {
        path.relative_to(_ASSETS).as_posix(): path.read_bytes()
        for path in sorted(_ASSETS.rglob("*"))
        if path.is_file()
    }
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    # Relative, so that the page also works below a path of a proxy.
    contents["index.html"] = contents["index.html"].replace(
        _PLACEHOLDER.encode(), f"console/assets/{digest}/".encode()
    )
    return digest, {
        name: (_media_type(name), content, gzip.compress(content, mtime=0))
        for name, content in contents.items()
    }


def _media_type(name: str) -> str:
    # The system's table may have another type for scripts, which browsers would not run.
    if name.endswith(".js"):
        return "text/javascript"
    return mimetypes.guess_type(name)[0] or "text/plain"


async def _asset(request: Request, name: str, caching: str) -> Response:
    _, files = await to_thread.run_sync(_assets)
    if name not in files:
        raise not_found("file")
    kind, content, compressed = files[name]
    headers = {**_HEADERS, "cache-control": caching, "vary": "accept-encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        content = compressed
    return Response(content, headers=headers, media_type=kind)


@console_router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Return the page."""
    return await _asset(request, "index.html", "no-cache")


@console_router.get("/console/assets/{digest}/{name:path}")
async def asset(request: Request, digest: str, name: str) -> Response:
    """Return a script or style; its address changes with the content of any of them."""
    known, _ = await to_thread.run_sync(_assets)
    current = digest == known
    return await _asset(request, name, "max-age=31536000, immutable" if current else "no-cache")


# -- session ---------------------------------------------------------------------------


class SignIn(BaseModel):
    """An API key of the gateway."""

    key: SecretStr = Field(min_length=1, max_length=500)


@console_router.post("/console/session")
async def sign_in(request: Request, given: SignIn, gateway: Opened) -> JSONResponse:
    """Start a session for an API key."""
    gateway.sessions.check_site(_raw(request))
    key = given.key.get_secret_value().strip()
    state = request.state
    start = partial(gateway.sessions.open, key, address=state.address, request_id=state.request_id)
    token = await to_thread.run_sync(start)
    caller = await to_thread.run_sync(partial(gateway.sessions.admit, token, writes=False))
    body = await _session(gateway, caller, token)
    return JSONResponse(body, headers={**_NO_STORE, "set-cookie": gateway.sessions.cookie(token)})


@console_router.get("/console/session")
async def session(request: Request, gateway: Opened) -> JSONResponse:
    """Return who has signed in, and what the gateway can do; null without a session."""
    token = gateway.sessions.checked_token(_raw(request), writes=False)
    body = None
    if token is not None:
        try:
            caller = await to_thread.run_sync(partial(gateway.sessions.admit, token, writes=False))
            body = await _session(gateway, caller, token)
        except HTTPProblem as refusal:
            if refusal.status != 401:
                raise
    return JSONResponse(body, headers=_NO_STORE)


@console_router.delete("/console/session")
async def sign_out(request: Request, gateway: Opened) -> Response:
    """End the session."""
    token = gateway.sessions.checked_token(_raw(request), writes=True)
    if token is not None:
        await to_thread.run_sync(gateway.sessions.close, token)
    headers = {"set-cookie": gateway.sessions.cookie("")}
    return Response(status_code=204, headers=_NO_STORE | headers)


def _raw(request: Request) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in request.scope["headers"]}


async def _session(gateway: Gateway, caller: Principal, token: str) -> dict[str, Any]:
    key = await to_thread.run_sync(gateway.keys.info, caller)
    able = gateway.client.backend(gateway.backend).capabilities
    return {
        "key": {"id": key.id, "name": key.name, "scope": key.scope, "project": key.project},
        "token": csrf_token(token),
        "seconds": SESSION_SECONDS,
        "version": __version__,
        "backend": gateway.backend,
        "capabilities": {
            "stops": able.stops,
            "pauses": able.pauses,
            "validation_files": able.validation_files,
            "methods": sorted(able.methods),
            "hyperparameters": None
            if able.hyperparameters is None
            else sorted(able.hyperparameters),
        },
        "default_epochs": gateway.settings.default_epochs,
        "max_upload_bytes": gateway.settings.max_upload_bytes,
    }


# -- runs ------------------------------------------------------------------------------

Text = Annotated[str | None, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=500)]


@console_router.get("/console/runs")
async def runs(
    *,
    gateway: Opened,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=36)] = None,
    limit: Limit = 100,
    status: Text = None,
    text: Text = None,
    project: Text = None,
) -> JSONResponse:
    """List runs, newest first; `status` has names separated by commas."""
    try:
        statuses = tuple(statuses_of(*status.split(","))) if status else None
    except ValueError as error:
        raise invalid(["query", "status"], str(error)) from None
    query = RunQuery(statuses=statuses, text=text, project=project)
    found = await gateway.store.aread(
        lambda c: list_runs(c, query, caller, after=after, limit=limit)
    )
    return JSONResponse(found, headers=_NO_STORE)


@console_router.get("/console/runs/{run_id}")
async def run(run_id: UUID, gateway: Opened, caller: Caller) -> JSONResponse:
    """Return a run: its summary, failure and latest metrics."""
    found = await gateway.store.aread(lambda c: load_run(c, str(run_id), caller))
    return JSONResponse(found, headers=_NO_STORE)


@console_router.get("/console/runs/{run_id}/metrics")
async def measured(run_id: UUID, gateway: Opened, caller: Caller) -> JSONResponse:
    """Return the metrics of a run by name."""
    found = await gateway.store.aread(lambda c: run_metrics(c, str(run_id), caller))
    return JSONResponse(found, headers=_NO_STORE)


@console_router.get("/console/runs/{run_id}/log")
async def read_log(
    run_id: UUID,
    gateway: Opened,
    caller: Caller,
    before: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
    limit: Limit = 200,
) -> JSONResponse:
    """Return the last records of a run's log before a cursor, oldest first."""
    found = await gateway.store.aread(
        lambda c: records_before(c, str(run_id), caller, before=before, limit=limit)
    )
    mask = await _mask(gateway, str(run_id), caller)
    for record in found:
        record["message"] = mask(record["message"])
    return JSONResponse(found, headers=_NO_STORE)


@console_router.get("/console/stream")
async def stream(
    request: Request,
    gateway: Opened,
    caller: Caller,
    run: Annotated[list[UUID], Query(max_length=MOST_FOLLOWED)] = [],  # noqa: B006  # not changed
) -> StreamingResponse:
    """Send changes of runs, and the logs of the given ones, as server-sent events.

    `Last-Event-ID` says what has been seen.
    """
    gateway.feed.check_room()
    cursor = FeedCursor.parse(request.headers.get("last-event-id") or "0")
    followed = list(dict.fromkeys(map(str, run)))
    masks = {run_id: await _mask(gateway, run_id, caller) for run_id in followed}
    headers = _raw(request)
    token = gateway.sessions.checked_token(headers, writes=False)

    async def is_admitted() -> None:
        if token is not None:
            await to_thread.run_sync(partial(gateway.sessions.admit, token, writes=False))

    events = gateway.feed.events(caller, cursor, followed, is_admitted=is_admitted, masks=masks)
    return StreamingResponse(
        events,
        media_type="text/event-stream",
        # A proxy must not collect the events.
        headers=_NO_STORE | {"x-accel-buffering": "no"},
    )


async def _mask(gateway: Gateway, run_id: str, caller: Principal) -> Callable[[str], str]:
    """Return a function that names files in a text instead of local paths."""
    job = await gateway.store.aread(lambda c: require_job(c, run_id, caller))
    names = await gateway.files.names(job)

    def mask(text: str) -> str:
        for path, name in names.items():
            text = text.replace(path, name)
        return text.replace(str(gateway.home), "…")

    return mask


# -- data ------------------------------------------------------------------------------


@console_router.post("/console/files")
async def upload(request: Request, gateway: Opened, caller: Caller) -> JSONResponse:
    """Upload a data file, which is checked for the gateway's backend.

    The Mistral API accepts no preference pairs, and the OpenAI API does not check lines.
    """
    able = gateway.client.backend(gateway.backend).capabilities
    stored = await receive_file(request, gateway, caller, upload_of(able.provider_format))
    return JSONResponse(stored.model_dump(mode="json"))


@console_router.get("/console/files/{file_id}/inspection")
async def inspection(file_id: UUID, gateway: Opened, caller: Caller) -> JSONResponse:
    """Return statistics and issues of a data file."""
    file = await gateway.files.stored(str(file_id), caller)
    able = gateway.client.backend(gateway.backend).capabilities
    return JSONResponse(await gateway.data.inspection(file, able.provider_format))


@console_router.get("/console/files/{file_id}/preview")
async def preview_rows(
    file_id: UUID,
    gateway: Opened,
    caller: Caller,
    *,
    model: Annotated[str, Query(max_length=300)],
    method: Literal["sft", "classifier", "dpo"] = "sft",
    rows: Annotated[int, Query(ge=1, le=20)] = 5,
    seq_len: Annotated[int | None, Query(ge=1, le=2**20)] = None,
) -> JSONResponse:
    """Return the first rows of a data file with the tokens that are trained on."""
    file = await gateway.files.stored(str(file_id), caller)
    offer = gateway.catalogue.get(model)
    if offer is None:
        raise not_found("model")
    found = await gateway.data.preview(file, offer, method=method, rows=rows, seq_len=seq_len)
    return JSONResponse(found)


@console_router.get("/console/models")
async def trainable(gateway: Opened) -> JSONResponse:
    """Return the models that can be trained, with their methods."""
    methods = gateway.client.backend(gateway.backend).capabilities.methods

    def of(offer: Offer) -> set[str]:
        known: set[str] = {METHODS[kind] for kind in offer.job_types}
        return (known | {"dpo"} if "sft" in known else known) & methods

    found = [
        {
            "id": offer.name,
            "methods": sorted(of(offer)),
            "context_length": offer.context_length,
            "license": offer.licence,
            "tuning": offer.tuning.kind if offer.tuning else None,
        }
        for offer in gateway.catalogue.all()
    ]
    return JSONResponse([offer for offer in found if offer["methods"]])


# -- keys ------------------------------------------------------------------------------


class KeyIn(BaseModel):
    """A key to create."""

    name: str = ""
    scope: Scope = "write"
    project: str = "default"
    expires: str = Field(default="", max_length=40)


@console_router.get("/console/keys")
async def list_keys(gateway: Opened, caller: Caller) -> JSONResponse:
    """Return all keys; needs the admin scope."""
    _require_admin(caller)
    found = await to_thread.run_sync(gateway.keys.list)
    return JSONResponse([_key(key) for key in reversed(found)], headers=_NO_STORE)


@console_router.post("/console/keys", dependencies=[SmallBody])
async def create_key(given: KeyIn, gateway: Opened, caller: Caller) -> JSONResponse:
    """Create a key, shown in this response only; needs the admin scope."""
    _require_admin(caller)

    def work() -> dict[str, Any]:
        expires = read_expiry(given.expires) if given.expires.strip() else None
        made = gateway.keys.create(
            given.name, scope=given.scope, project=given.project, expires_at=expires, by=caller
        )
        return {**_key(made.info), "key": made.key.get_secret_value()}

    try:
        return JSONResponse(await to_thread.run_sync(work), headers=_NO_STORE)
    except ConfigError as error:
        hint = (error.hint or "").replace("--expires", "expiry")
        sentence = error.message.replace("--expires", "expiry")
        raise plain(422, f"{sentence} {hint}".strip()) from None


@console_router.delete("/console/keys/{key_id}")
async def revoke_key(key_id: str, gateway: Opened, caller: Caller) -> JSONResponse:
    """Revoke a key; needs the admin scope."""
    _require_admin(caller)
    try:
        revoke = partial(gateway.keys.revoke, key_id, by=caller)
        return JSONResponse(_key(await to_thread.run_sync(revoke)))
    except CredentialNotFound:
        raise not_found("key") from None


def _require_admin(caller: Principal) -> None:
    if not caller.admin:
        raise plain(403, "This needs a key with the admin scope.")


def _key(key: KeyInfo) -> dict[str, Any]:
    def seconds(moment: datetime | None) -> float | None:
        return moment.timestamp() if moment else None

    return {
        "id": key.id,
        "name": key.name,
        "scope": key.scope,
        "project": key.project,
        "state": key.state,
        "created_at": seconds(key.created_at),
        "expires_at": seconds(key.expires_at),
        "last_used_at": seconds(key.last_used_at),
    }
