"""Dependencies and response models shared by all routes."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request
from pydantic import BaseModel
from starlette.responses import Response
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
]

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
