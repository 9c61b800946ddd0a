"""Routes of the chat APIs, in the protocols of Mistral and OpenAI."""

import json
from contextlib import aclosing
from functools import partial
from typing import Any, Final, Protocol

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Send

from training_backends.gateway.chat import ChatProblem, ChatRequest, ChatService, InferenceModel
from training_backends.gateway.chat_stream import rewritten
from training_backends.gateway.errors import HTTPProblem, field_errors, plain
from training_backends.gateway.keys import Principal
from training_backends.gateway.routes import Caller, ComputedResponse, Opened
from training_backends.protocols.mistral.errors import error_items

__all__ = ["chat_router"]

chat_router = APIRouter(tags=["chat"], include_in_schema=False)

_STREAM: Final = {"Accept": "text/event-stream", "Cache-Control": "no-store"}


class _ChatProtocol(Protocol):
    """What differs between the two protocols."""

    @property
    def no_usage(self) -> bytes | None:
        """Field of a chunk without a usage, if usages are asked for."""

    def problem(self, problem: ChatProblem) -> HTTPProblem:
        """Return the error response."""

    def invalid(self, error: ValidationError) -> HTTPProblem:
        """Return the error response for a request that is none."""

    def request(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a request as OpenAI names them."""

    def chunk(self, chunk: dict[str, Any], *, usage: bool) -> list[dict[str, Any]]:
        """Return the chunks to send for one of the server's."""


class _MistralChat:
    """The errors and fields of api.mistral.ai."""

    no_usage = None

    def problem(self, problem: ChatProblem) -> HTTPProblem:
        if problem.status == 400:
            place = ["body", *([problem.field] if problem.field else [])]
            item: Any = {"type": "value_error", "loc": place, "msg": problem.sentence}
            return HTTPProblem(422, field_errors([item]))
        found = plain(problem.status, problem.sentence)
        found.headers |= problem.headers
        return found

    def invalid(self, error: ValidationError) -> HTTPProblem:
        items = error_items(error.errors(include_context=False), ["body"])
        return HTTPProblem(422, field_errors(items))

    def request(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "random_seed" in fields:
            fields["seed"] = fields.pop("random_seed")
        if fields.get("tool_choice") == "any":
            fields["tool_choice"] = "required"
        if fields.get("stream"):
            fields["stream_options"] = {"include_usage": True}
        return fields

    def chunk(self, chunk: dict[str, Any], *, usage: bool) -> list[dict[str, Any]]:
        del usage  # always sent
        return [chunk]


class _OpenAIChat:
    """The errors and fields of api.openai.com."""

    no_usage = b'"usage":null,'

    def problem(self, problem: ChatProblem) -> HTTPProblem:
        kind = "server_error" if problem.status >= 500 else "invalid_request_error"
        if problem.status == 429:
            kind = "rate_limit_error"
        error = {
            "message": problem.sentence,
            "type": kind,
            "param": problem.field,
            "code": problem.code,
        }
        return HTTPProblem(problem.status, {"error": error}, problem.headers)

    def invalid(self, error: ValidationError) -> HTTPProblem:
        first = error.errors(include_context=False)[0]
        field = ".".join(map(str, first["loc"]))[:200] or None
        sentence = f"Invalid {field or 'body'}: {first['msg']}."
        return self.problem(ChatProblem(400, sentence, field=field, code="invalid_value"))

    def request(self, fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    def chunk(self, chunk: dict[str, Any], *, usage: bool) -> list[dict[str, Any]]:
        counted = chunk.pop("usage", None)
        if not usage:
            return [chunk] if chunk["choices"] else []
        chunk["usage"] = None
        if not chunk["choices"]:
            return [chunk | {"usage": counted}]
        return [chunk, chunk | {"choices": [], "usage": counted}] if counted else [chunk]


@chat_router.post("/v1/chat/completions", name="chat")
async def chat(request: Request, gateway: Opened, caller: Caller) -> Response:
    """Answer a chat in the Mistral protocol."""
    return await _respond(request, gateway.chat, caller, _MistralChat())


@chat_router.post("/openai/v1/chat/completions", name="openai_chat")
async def openai_chat(request: Request, gateway: Opened, caller: Caller) -> Response:
    """Answer a chat in the OpenAI protocol."""
    return await _respond(request, gateway.chat, caller, _OpenAIChat())


async def _respond(
    request: Request, service: ChatService, caller: Principal, wire: _ChatProtocol
) -> Response:
    try:
        document = await request.json()
    except (ValueError, RecursionError):
        raise wire.problem(ChatProblem(400, "The request body is not valid JSON.")) from None
    if isinstance(document, dict):
        document = wire.request(document)
    try:
        asked = ChatRequest.model_validate(document)
    except ValidationError as error:
        raise wire.invalid(error) from None

    async def answer(send: Send) -> None:
        reply = _ChatReply(send)
        try:
            async with service.asking(asked.model, caller) as model:
                await _answer(model, asked, wire, reply)
        except ChatProblem as problem:
            found = wire.problem(problem)
            if not reply.has_begun:
                raise found from None
            # Too late for a status; both SDKs raise an error for this event.
            await reply.events(f"data: {_compact(found.body)}\n\n".encode())
            await reply.end()

    return ComputedResponse(answer)


class _ChatReply:
    """Sends a document, or events; the head with the first of them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def document(self, document: Any) -> None:
        await self._part(_compact(document).encode(), b"application/json")
        await self.end()

    async def events(self, events: bytes) -> None:
        await self._part(events, b"text/event-stream")

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _part(self, content: bytes, kind: bytes) -> None:
        if not self.has_begun:
            self.has_begun = True
            headers = [(b"content-type", kind), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": True})


def _compact(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


async def _answer(
    model: InferenceModel, asked: ChatRequest, wire: _ChatProtocol, reply: _ChatReply
) -> None:
    fields = asked.fields()
    body = model.body(fields)
    if not asked.stream:
        document = await model.client.json("POST", "/chat/completions", body=body)
        await reply.document(document | {"model": asked.model})
        return
    options = fields.get("stream_options")
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    pieces = model.client.pieces("/chat/completions", body=body, headers=_STREAM)
    chunks = rewritten(
        pieces,
        model=asked.model,
        adapt=partial(wire.chunk, usage=usage),
        usage=wire.no_usage if usage else None,
    )
    async with aclosing(pieces), aclosing(chunks):
        async for events in chunks:
            await reply.events(events)
    await reply.events(b"data: [DONE]\n\n")
    await reply.end()
