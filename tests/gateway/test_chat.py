"""Chat over both protocols, in front of an inference server that answers as a test says."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream
from mistralai.client import Mistral
from openai import APIError

from tests.gateway.conftest import KEY, Site, openai_client, scripted, shared_site, site
from tests.waiting import until
from training_backends.gateway.chat import ChatProblem, InferenceModel
from training_backends.http.client import HttpClient
from training_backends.testing.faults import CutAnswer, DropRequest, HangAnswer, OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("wire", ["/v1", "/openai/v1"])
ASKED = {"model": "tiny-mistral", "messages": [{"role": "user", "content": "Hello?"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def completion(model: str) -> dict[str, Any]:
    """Make an answer as `transformers serve` names its models."""
    message = {"role": "assistant", "content": "Hi."}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{model}@main",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def chunks(model: str) -> bytes:
    """Make a stream that leaves out what is null, without an end mark."""
    deltas: list[dict[str, Any]] = [
        {"delta": {"role": "assistant"}},
        {"delta": {"content": "Hi"}},
        {"delta": {"content": "."}},
        {"delta": {}, "finish_reason": "stop"},
    ]
    events = [
        {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": f"{model}@main",
            "choices": [{"index": 0, **delta}],
        }
        for delta in deltas
    ]
    events[-1]["usage"] = USAGE
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def answered(request: Received) -> StubReply:
    """Answer a chat, streamed if that is asked for; nothing else is known."""
    if request.method == "GET" or not request.path.endswith("/chat/completions"):
        return StubReply(status=404, content=b"{}")
    body = json.loads(request.body)
    if body.get("stream"):
        return StubReply(content=chunks(body["model"]), content_type="text/event-stream")
    return StubReply(content=json.dumps(completion(body["model"])).encode())


@pytest.fixture(scope="module")
def inference() -> Iterator[LoopbackServer]:
    """Serve the OpenAI protocol."""
    with LoopbackServer(answered) as server:
        yield server


@pytest.fixture
def upstream(inference: LoopbackServer) -> LoopbackServer:
    """That server, which works and has been asked nothing."""
    inference.heal()
    inference.requests.clear()
    return inference


@pytest.fixture(scope="module")
async def chatty(
    tmp_path_factory: pytest.TempPathFactory, inference: LoopbackServer
) -> AsyncIterator[Site]:
    """A gateway in front of that server."""
    url = f"{inference.base_url}/v1"
    async with shared_site(tmp_path_factory, inference_url=url) as opened:
        yield opened


def asked(upstream: LoopbackServer) -> list[dict[str, Any]]:
    """Return the chats that the server received."""
    return [json.loads(each.body) for each in upstream.asked("POST", "/v1/chat/completions")]


def events(answer: httpx.Response) -> list[Any]:
    """Return the events of a stream."""
    lines = [line for line in answer.text.split("\n\n") if line]
    return [json.loads(each.removeprefix("data: ")) for each in lines if each != "data: [DONE]"]


@BOTH
async def test_a_base_model_answers_under_the_name_asked_for(
    chatty: Site, upstream: LoopbackServer, wire: str
) -> None:
    """The server gets the name of the weights; the client sees the name that it sent."""
    answer = await chatty.http.post(f"{wire}/chat/completions", json={**ASKED, "top_k": 5})
    assert answer.json() == completion("x") | {"model": "tiny-mistral"}
    assert asked(upstream) == [{**ASKED, "top_k": 5}]


@BOTH
async def test_a_stream_has_what_sdks_require(chatty: Site, wire: str) -> None:
    """Every chunk has the model's name and a finish reason, and an end mark follows."""
    answer = await chatty.http.post(f"{wire}/chat/completions", json={**ASKED, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text.endswith("data: [DONE]\n\n")
    sent = events(answer)
    assert {each["model"] for each in sent} == {"tiny-mistral"}
    assert [each["choices"][0]["finish_reason"] for each in sent] == [None, None, None, "stop"]
    assert ("usage" in sent[-1]) is (wire == "/v1")


async def test_usage_is_streamed_as_openai_does(chatty: Site) -> None:
    """In a last chunk without choices, if asked for."""
    body = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}
    sent = events(await chatty.http.post("/openai/v1/chat/completions", json=body))
    assert [each["usage"] for each in sent] == [None, None, None, None, USAGE]
    assert sent[-1]["choices"] == []


async def test_mistral_fields_are_translated(chatty: Site, upstream: LoopbackServer) -> None:
    """`random_seed` and `any` have other names in the OpenAI protocol; null is the default."""
    body = {**ASKED, "random_seed": 7, "tool_choice": "any", "stop": None}
    assert (await chatty.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert asked(upstream) == [{**ASKED, "seed": 7, "tool_choice": "required"}]


async def test_both_sdks_talk_to_a_fine_tuned_model(chatty: Site) -> None:
    """`fine_tuned_model` of a finished job answers, streamed and not."""
    model = (await chatty.finished())["fine_tuned_model"]
    messages: Any = ASKED["messages"]
    url = chatty.served.url
    async with Mistral(api_key=KEY, server_url=url) as mistral:
        found = await mistral.chat.complete_async(model=model, messages=messages)
        assert (found.model, found.choices[0].message.content) == (model, "Hi.")
        stream = await mistral.chat.stream_async(model=model, messages=messages)
        heard = [event.data async for event in stream]
        assert "".join(str(each.choices[0].delta.content or "") for each in heard) == "Hi."
        assert heard[-1].usage is not None
    async with openai_client(chatty) as openai:
        create: Callable[..., Any] = openai.chat.completions.create
        whole = await create(model=model, messages=messages)
        assert (whole.model, whole.choices[0].message.content) == (model, "Hi.")
        parts = [part async for part in await create(model=model, messages=messages, stream=True)]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hi."


def reason(answer: httpx.Response) -> str:
    """Return the sentence of an error, which each protocol has elsewhere."""
    body = answer.json()
    if "error" in body:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return str(body["error"]["message"])
    return json.dumps(body["detail"])


@BOTH
async def test_a_model_that_cannot_answer_is_404_with_the_reason(chatty: Site, wire: str) -> None:
    """Unknown, of an unfinished job, and deleted."""

    async def ask(model: str) -> str:
        answer = await chatty.http.post(f"{wire}/chat/completions", json={**ASKED, "model": model})
        assert answer.status_code == 404
        return reason(answer)

    assert "does not exist" in await ask("gpt-4o")
    assert "does not exist" in await ask("/etc")
    job_id, _ = await chatty.started(suffix=wire.replace("/", "-"))
    await chatty.until(job_id, "RUNNING")
    assert f"its job {job_id} is RUNNING" in await ask(f"ft:tiny-mistral:x:20260101:{job_id[:8]}")
    assert f"its job {job_id} is RUNNING" in await ask(job_id)
    model = (await chatty.finished(suffix="gone"))["fine_tuned_model"]
    await chatty.http.delete(f"/v1/models/{model}")
    assert "has been deleted" in await ask(model)


async def test_a_model_of_another_project_does_not_exist(chatty: Site) -> None:
    """Its answer is that of an unknown name, and so is its job's."""
    model = (await chatty.finished())["fine_tuned_model"]
    made = await anyio.to_thread.run_sync(
        lambda: chatty.served.gateway.keys.create("other", project="other")
    )
    answer = await chatty.http.post(
        "/v1/chat/completions",
        json={**ASKED, "model": model},
        headers={"authorization": f"Bearer {made.key.get_secret_value()}"},
    )
    assert answer.status_code == 404
    assert answer.json() == {"detail": f"The model {model!r} does not exist."}


@BOTH
@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"model": "tiny-mistral"}', b'{"messages": []}', b"[" * 100_000],
)
async def test_a_body_that_is_no_chat_is_refused(chatty: Site, wire: str, body: bytes) -> None:
    """422 as Mistral does, 400 as OpenAI does."""
    answer = await chatty.http.post(f"{wire}/chat/completions", content=body)
    assert (answer.status_code, bool(reason(answer))) == (422 if wire == "/v1" else 400, True)


@BOTH
@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, None), (404, 404), (429, 429), (500, 503), (503, 503), (401, 502)],
)
async def test_errors_of_the_server_become_those_of_the_protocol(
    chatty: Site, upstream: LoopbackServer, wire: str, status: int, expected: int | None
) -> None:
    """A client's mistake is its own; what may pass has Retry-After."""
    odd = {"error": {"message": "temperature is odd"}}
    upstream.fail(OtherAnswer(status=status, body=odd), times=2)
    for stream in (False, True):
        answer = await chatty.http.post(
            f"{wire}/chat/completions", json={**ASKED, "stream": stream}
        )
        assert answer.status_code == (expected or (422 if wire == "/v1" else 400))
        assert ("retry-after" in answer.headers) is (expected in {429, 503})
        assert ("temperature is odd" in reason(answer)) is (status == 400)


@BOTH
async def test_a_lost_server_is_an_error_to_retry(
    chatty: Site, upstream: LoopbackServer, wire: str
) -> None:
    """503 before the first byte; the next request is answered."""
    upstream.fail(DropRequest(), times=1)
    answer = await chatty.http.post(f"{wire}/chat/completions", json=ASKED)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    again = await chatty.http.post(f"{wire}/chat/completions", json=ASKED)
    assert again.status_code == 200


async def test_a_stream_that_breaks_raises_in_the_sdk(
    chatty: Site, upstream: LoopbackServer
) -> None:
    """What arrived is not mistaken for a complete answer."""
    upstream.fail(CutAnswer(after=len(chunks("tiny-mistral")) // 2))
    async with openai_client(chatty) as openai:
        messages: Any = ASKED["messages"]
        stream = await openai.chat.completions.create(
            model="tiny-mistral", messages=messages, stream=True
        )
        with pytest.raises(APIError, match="unavailable"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_ends_the_request_to_the_server(tmp_path: Path, stream: bool) -> None:
    """Nobody waits for the answer any more, so its connection is closed."""
    received, closed = anyio.Event(), anyio.Event()

    async def say_nothing(connection: SocketStream) -> None:
        async with connection:
            async for _ in connection:
                received.set()
            closed.set()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    url = f"http://127.0.0.1:{port}/v1"
    async with listener, anyio.create_task_group() as server:
        server.start_soon(listener.serve, say_nothing)
        async with site(tmp_path / "home", inference_url=url) as here:
            async with anyio.create_task_group() as client:
                body = {**ASKED, "stream": stream}
                client.start_soon(lambda: here.http.post("/v1/chat/completions", json=body))
                await received.wait()
                assert not closed.is_set()
                client.cancel_scope.cancel()
            with anyio.fail_after(30):
                await closed.wait()
        server.cancel_scope.cancel()


async def test_chats_at_a_time_are_limited(tmp_path: Path, upstream: LoopbackServer) -> None:
    """One more gets 429 with Retry-After, and is answered once there is room."""
    url = f"{upstream.base_url}/v1"
    async with site(tmp_path / "home", inference_url=url, inference_requests=1) as here:
        upstream.fail(HangAnswer())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: here.http.post("/v1/chat/completions", json=ASKED))
            await until(lambda: asked(upstream))
            refused = await here.http.post("/openai/v1/chat/completions", json=ASKED)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            upstream.heal()
            tasks.cancel_scope.cancel()
        answer = await until(
            lambda: here.http.post("/v1/chat/completions", json=ASKED),
            lambda answer: answer.status_code != 429,
        )
        assert answer.status_code == 200


async def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, upstream: LoopbackServer
) -> None:
    """After `inference_timeout`, as an error to retry."""
    url = f"{upstream.base_url}/v1"
    async with site(tmp_path / "home", inference_url=url, inference_timeout=0.2) as here:
        upstream.fail(HangAnswer())
        answer = await here.http.post("/v1/chat/completions", json=ASKED)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


async def test_only_models_that_can_answer_claim_to(shared: Site, chatty: Site) -> None:
    """Without an inference server none does, and a chat says why."""
    for gateway, able in ((shared, False), (chatty, True)):
        model = (await gateway.finished())["fine_tuned_model"]
        cards = {card["id"]: card for card in (await gateway.http.get("/v1/models")).json()["data"]}
        assert cards[model]["capabilities"]["completion_chat"] is able
        assert cards["tiny-mistral"]["capabilities"]["completion_chat"] is able
        assert (await gateway.http.get(f"/v1/models/{model}")).json() == cards[model]
        answer = await gateway.http.post("/v1/chat/completions", json={**ASKED, "model": model})
        assert (answer.status_code, "inference server" in answer.text) == (
            (200, False) if able else (404, True)
        )


async def test_a_classifier_does_not_chat(tmp_path: Path, upstream: LoopbackServer) -> None:
    """It says so, and claims nothing else."""
    backend = scripted(methods=frozenset({"sft", "classifier"}))
    url = f"{upstream.base_url}/v1"
    async with site(tmp_path / "home", backend, inference_url=url) as here:
        rows = [{"text": f"t{n}", "labels": {"mood": "good" if n % 2 else "bad"}} for n in range(8)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        job = await here.finished(
            files=[await here.upload(content)],
            job_type="classifier",
            classifier_targets=[{"name": "mood", "labels": ["good", "bad"]}],
        )
        body = {**ASKED, "model": job["fine_tuned_model"]}
        answer = await here.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, "is a classifier" in answer.text) == (422, True)


async def test_the_key_of_the_server_is_sent_to_it_only(
    tmp_path: Path, upstream: LoopbackServer
) -> None:
    """The client's key stays here."""
    url = f"{upstream.base_url}/v1"
    async with site(
        tmp_path / "home", inference_url=url, inference_api_key="the-key-of-the-server"
    ) as here:
        assert (await here.http.post("/v1/chat/completions", json=ASKED)).status_code == 200
    (request,) = upstream.asked("POST")
    assert request.headers["authorization"] == "Bearer the-key-of-the-server"
    assert KEY not in str(request.headers)


def for_transformers(**fields: Any) -> dict[str, Any]:
    """Return what `transformers serve` would get."""
    client = HttpClient("http://127.0.0.1:9/v1")
    return InferenceModel(client=client, name=".", is_embedded=True).body({**ASKED, **fields})


def test_fields_without_effect_are_not_sent_to_transformers() -> None:
    """It would reject them or warn; a field at its default is one of them."""
    fields = {"user": "u", "n": 1, "tool_choice": "auto", "stream_options": {}, "safe_prompt": True}
    assert for_transformers(**fields, seed=1) == {**ASKED, "model": ".", "seed": 1}
    assert "tools" not in for_transformers(tools=[{}], tool_choice="none")
    assert for_transformers(tools=[{}], tool_choice="auto")["tools"] == [{}]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"generation_config": "{}"},
        {"chat_template_kwargs": {"chat_template": "x"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_transformers_does_not_do_is_an_error_that_names_it(fields: dict[str, Any]) -> None:
    """It would ignore them silently, or let a client choose files and templates."""
    with pytest.raises(ChatProblem) as refused:
        for_transformers(**fields)
    (name,) = fields
    assert (refused.value.status, refused.value.field) == (400, name)
    assert name in refused.value.sentence


def test_messages_name_no_files() -> None:
    """The server would open an image's URL or path."""
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    for content in ([image], [{"type": "text", "text": "a"}, image], ["a"]):
        with pytest.raises(ChatProblem, match="only contain text"):
            for_transformers(messages=[{"role": "user", "content": content}])
    texts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert for_transformers(messages=texts)["messages"] == texts
