"""Dependencies and response models shared by all routes."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, Final, Protocol, TypeVar

from anyio import to_thread
from fastapi import Depends, Query, Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from training_backends.gateway.errors import plain
from training_backends.gateway.gateway import Gateway, beside
from training_backends.gateway.keys import Principal

__all__ = [
    "Caller",
    "ComputedResponse",
    "Conflict",
    "FileProblem",
    "Opened",
    "Page",
    "PageSize",
    "Problem",
    "SmallBody",
    "answers",
    "list_response",
]


class _HasId(Protocol):
    """An entry of a list: a pydantic model with an id."""

    id: str

    def model_dump_json(self, *, by_alias: bool) -> str:
        """Return it as JSON."""
        ...


_LONG: Final = 64 * 1024
"""Bytes above which a list is sent in parts."""
_Listed = TypeVar("_Listed", bound=_HasId)


async def list_response(
    pages: AsyncGenerator[Sequence[_Listed], None],
    ending: Callable[[Sequence[str]], Mapping[str, Any]] = lambda _: {},
) -> Response:
    """Return a complete list, in parts if it is long: each is read and encoded by itself.

    Args:
        ending: Returns what follows the entries, given the ids of the first and the last one.
    """
    parts = _parts(pages, ending)
    begun: list[bytes] = []
    async for part in parts:
        begun.append(part)
        if sum(map(len, begun)) > _LONG:
            break
    else:
        return Response(b"".join(begun), media_type="application/json")

    async def stream() -> AsyncGenerator[bytes, None]:
        async with aclosing(parts):
            yield b"".join(begun)
            async for part in parts:
                yield part

    return StreamingResponse(stream(), media_type="application/json")


async def _parts(
    pages: AsyncGenerator[Sequence[_Listed], None],
    ending: Callable[[Sequence[str]], Mapping[str, Any]],
) -> AsyncGenerator[bytes, None]:
    yield b'{"object":"list","data":['
    ids: list[str] = []
    async with aclosing(pages):
        async for page in pages:
            if page:
                encoded = await to_thread.run_sync(_encoded, page)
                yield b"," + encoded if ids else encoded
                ids = [*(ids[:1] or [page[0].id]), page[-1].id]
    last = json.dumps(ending([ids[0], ids[-1]] if ids else []), separators=(",", ":"))
    yield b"]" + (b"," if len(last) > len("{}") else b"") + last[1:].encode()


def _encoded(entries: Sequence[_Listed]) -> bytes:
    return b",".join(entry.model_dump_json(by_alias=True).encode() for entry in entries)


_MOST_VALUES: Final = 10_000
_DEEPEST: Final = 16


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _caller(request: Request) -> Principal:
    caller: Principal = request.state.caller
    return caller


async def _small_body(request: Request) -> None:
    """Reject a body with too many values before validation.

    FastAPI has already parsed the body and caches it, so this does not parse it again.
    """
    with suppress(ValueError):  # not JSON: reported by validation
        level = [await request.json()]
        count = 0
        for _ in range(_DEEPEST):
            level = [value for each in level for value in _values(each)]
            count += len(level)
            if not level:
                return
            if count > _MOST_VALUES:
                raise plain(413, f"Request body has too many values; the limit is {_MOST_VALUES}.")
        raise plain(413, f"Request body nested too deeply; the limit is {_DEEPEST} levels.")


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class ComputedResponse(Response):
    """A response that is computed while it is sent, and abandoned when the client disconnects."""

    def __init__(self, answer: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and send."""
        del scope
        async with beside() as tasks:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            await self._answer(send)
            tasks.cancel_scope.cancel()


SmallBody = Depends(_small_body)
Opened = Annotated[Gateway, Depends(_gateway)]
Caller = Annotated[Principal, Depends(_caller)]
# Their product must fit SQLite's 64-bit integers.
Page = Annotated[int, Query(ge=0, le=10**9)]
PageSize = Annotated[int, Query(ge=1, le=1000)]


class FieldProblem(BaseModel):
    """One invalid value of the request."""

    type: str
    loc: list[str | int]
    msg: str
    ctx: dict[str, Any] | None = None


class LineProblem(BaseModel):
    """One invalid line of an uploaded file."""

    message: str
    line_number: int


class Problem(BaseModel):
    """An error response: one sentence, or a list of invalid values."""

    detail: str | list[FieldProblem]


class FileProblem(Problem):
    """An error response for an invalid file."""

    description: str | None = None
    errors: list[LineProblem] | None = None


class Conflict(Problem):
    """An error response that names the conflicting job."""

    job_id: str


def answers(*more: int, **special: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's error responses.

    Args:
        more: Status codes in addition to those of every route.
        special: Response models by `_<status>`.
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem} for status in (401, 403, 408, 413, 422, 431, *more)
    }
    return found | {int(name[1:]): {"model": model} for name, model in special.items()}
