"""What all routes share."""

from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request
from pydantic import BaseModel

from training_backends.gateway.errors import plain
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.keys import Principal

__all__ = [
    "Caller",
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
    """Reject a body with too many values before each of them is validated.

    FastAPI has parsed it by now, and keeps what it parsed.
    """
    with suppress(ValueError):  # not JSON: validation says so
        level = [await request.json()]
        count = 0
        for _ in range(_DEEPEST):
            level = [value for each in level for value in _values(each)]
            count += len(level)
            if not level:
                return
            if count > _MOST_VALUES:
                raise plain(413, f"The body has too many values; at most {_MOST_VALUES} are read.")
        raise plain(413, f"The body is nested too deeply; at most {_DEEPEST} levels are read.")


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


SmallBody = Depends(_small_body)
Opened = Annotated[Gateway, Depends(_gateway)]
Caller = Annotated[Principal, Depends(_caller)]
# SQLite counts with 64 bits, so the product of these must stay below.
Page = Annotated[int, Query(ge=0, le=10**9)]
PageSize = Annotated[int, Query(ge=1, le=1000)]


class FieldProblem(BaseModel):
    """One value of the request that cannot be used."""

    type: str
    loc: list[str | int]
    msg: str
    ctx: dict[str, Any] | None = None


class LineProblem(BaseModel):
    """One line of an uploaded file that cannot be used."""

    message: str
    line_number: int


class Problem(BaseModel):
    """Why a request was refused: in a sentence, or value by value."""

    detail: str | list[FieldProblem]


class FileProblem(Problem):
    """Why a file was refused."""

    description: str | None = None
    errors: list[LineProblem] | None = None


class Conflict(Problem):
    """What is in the way."""

    job_id: str


def answers(*more: int, **special: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Describe a route's refusals.

    Args:
        more: Statuses beside those that any request may be given.
        special: Bodies of their own, by `_<status>`.
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem} for status in (401, 403, 408, 413, 422, 431, *more)
    }
    return found | {int(name[1:]): {"model": model} for name, model in special.items()}
