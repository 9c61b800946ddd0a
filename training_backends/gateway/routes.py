"""What all routes share."""

from typing import Annotated, Any

from fastapi import Depends, Query, Request
from pydantic import BaseModel

from training_backends.gateway.keys import Principal
from training_backends.gateway.service import Gateway

__all__ = [
    "Caller",
    "Conflict",
    "FileProblem",
    "Opened",
    "Page",
    "PageSize",
    "Problem",
    "answers",
]


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _caller(request: Request) -> Principal:
    caller: Principal = request.state.caller
    return caller


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
