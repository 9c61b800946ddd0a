"""Compare streamed chats through the gateway with the inference server asked directly.

    python benchmarks/chat.py stub [STREAMS] [TOKENS] [ROUNDS]
    python benchmarks/chat.py MODEL_DIR [STREAMS] [TOKENS] [ROUNDS]

The stub sends RATE tokens a second on each stream, as a GPU does. With the directory of a model, it
is `transformers serve` on this machine. Both print tokens a second as the ratio of gateway to
server, what the gateway adds to the time to the first token, and its CPU time for each; the two
take turns, because a machine is never equally busy.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

RATE = 100.0
KEY = "a-key-for-the-benchmark"
CHUNK = {
    "id": "req_0a1b2c3d4e5f",
    "object": "chat.completion.chunk",
    "created": 1790000000,
    "model": "stub@main",
    "system_fingerprint": "",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}


@dataclass(frozen=True)
class Place:
    """Where chats are answered."""

    port: int
    path: str
    model: str


@dataclass(frozen=True)
class Told:
    """What a stream took.

    Attributes:
        chunks: Number of events.
        first: Seconds to the first.
        whole: Seconds to the last.
    """

    chunks: int
    first: float
    whole: float


async def stream(place: Place, tokens: int) -> Told:
    """Chat once, and count the events as they arrive."""
    body = {
        "model": place.model,
        "messages": [{"role": "user", "content": "Write a long story about a lighthouse."}],
        "max_tokens": tokens,
        "stream": True,
    }
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
    began = time.perf_counter()
    writer.write(
        f"POST {place.path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    count, first = 0, 0.0
    rest = b""
    while piece := await reader.read(65536):
        found = (rest + piece).count(b"data: {")
        rest = piece[-6:]
        if found and not count:
            first = time.perf_counter() - began
        count += found
    writer.close()
    return Told(count, first, time.perf_counter() - began)


async def streams(place: Place, number: int, tokens: int) -> tuple[float, float]:
    """Return tokens a second of several streams, and the median time to the first in ms."""
    began = time.perf_counter()
    told = await asyncio.gather(*(stream(place, tokens) for _ in range(number)))
    whole = time.perf_counter() - began
    if min(each.chunks for each in told) < tokens // 2:
        raise SystemExit(f"{place}: only {[each.chunks for each in told]} chunks")
    rate = sum(each.chunks for each in told) / whole
    return rate, 1000 * statistics.median(each.first for each in told)


async def stub() -> int:
    """Serve the stub on a port of its own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
        body = json.loads(await reader.readexactly(length) or b"{}")
        if b"/chat/" not in head.split(b"\r\n")[0]:
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}")
            writer.close()
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
        event = f"data: {json.dumps(CHUNK)}\n\n".encode()
        began = time.perf_counter()
        for number in range(body["max_tokens"]):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return int(server.sockets[0].getsockname()[1])


@asynccontextmanager
async def gateway(home: Path, **variables: str) -> AsyncIterator[tuple[int, int]]:
    """Run a gateway; yield its port and its process id."""
    environment = {
        **os.environ,
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": KEY,
        **variables,
    }
    command = [sys.executable, "-m", "training_backends", "serve", "--port", "0", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        url = json.loads(await process.stdout.readline())["url"]
        yield int(url.rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        await process.wait()


def cpu_seconds(pid: int) -> float:
    """Return what a process has used, all its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def alternating(
    rounds: int, *sides: Callable[[], Awaitable[tuple[float, float]]]
) -> list[list[tuple[float, float]]]:
    """Let the sides take turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            found[side].append(await sides[side]())
    return found


def report(
    name: str, direct: list[tuple[float, float]], through: list[tuple[float, float]]
) -> None:
    """Print the ratio of each round and their median."""
    ratios = [mine[0] / theirs[0] for mine, theirs in zip(through, direct, strict=True)]
    added = [mine[1] - theirs[1] for mine, theirs in zip(through, direct, strict=True)]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    rate = statistics.median(each[0] for each in direct)
    print(
        f"{name}: {statistics.median(ratios):.3f} of the throughput of the server asked directly "
        f"({rate:.0f} tokens/s; {shown}); first token +{statistics.median(added):.1f} ms"
    )


async def against_stub(number: int, tokens: int, rounds: int, home: Path) -> None:
    """Measure the cost of a chunk."""
    port = await stub()
    url = f"http://127.0.0.1:{port}/v1"
    async with gateway(home, TRAINING_BACKENDS_GATEWAY__INFERENCE_URL=url) as (front, pid):
        direct = Place(port, "/v1/chat/completions", "stub")
        through = Place(front, "/openai/v1/chat/completions", "tiny-mistral")
        await streams(through, number, 10)
        used = cpu_seconds(pid)
        await streams(through, number, tokens)
        cost = (cpu_seconds(pid) - used) / (number * tokens)
        print(f"stub: {cost * 1e6:.0f} µs of CPU in the gateway for each chunk")
        found = await alternating(
            rounds,
            lambda: streams(direct, number, tokens),
            lambda: streams(through, number, tokens),
        )
    report(f"stub, {number} streams of {RATE:.0f} tokens/s", *found)


def port_of_server(pid: int) -> int:
    """Return the port of the inference server that a gateway has started."""
    for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
        if b"serve" in words:
            return int(words[words.index(b"serve") + 1])
    raise SystemExit("the gateway has started no server")


def write_catalogue(home: Path, model: str) -> Path:
    """Offer a model as `real`."""
    home.mkdir()
    catalogue = home / "models.toml"
    catalogue.write_text(f'[models.real]\ntarget = "{model}"\n')
    return catalogue


async def against_serve(number: int, tokens: int, rounds: int, home: Path, model: str) -> None:
    """Measure what is left of the throughput of a real server on the same machine."""
    catalogue = write_catalogue(home, model)
    async with gateway(home, TRAINING_BACKENDS_GATEWAY__CATALOGUE=str(catalogue)) as (front, pid):
        through = Place(front, "/openai/v1/chat/completions", "real")
        await streams(through, 1, 4)
        direct = Place(port_of_server(pid), "/v1/chat/completions", ".")
        used = cpu_seconds(pid)
        found = await alternating(
            rounds,
            lambda: streams(direct, number, tokens),
            lambda: streams(through, number, tokens),
        )
        cost = (cpu_seconds(pid) - used) / (number * tokens * rounds)
    report(f"transformers serve, {number} streams", *found)
    print(f"transformers serve: {cost * 1e6:.0f} µs of CPU in the gateway for each token")


async def main() -> None:
    """Print both."""
    model, *words = [*sys.argv[1:]] or ["stub"]
    given = [int(word) for word in words]
    number, tokens, rounds = [*given, *(8, 400, 5)[len(given) :]]
    with tempfile.TemporaryDirectory() as directory:
        if model == "stub":
            await against_stub(number, tokens, rounds, Path(directory, "stub"))
        else:
            await against_serve(number, tokens, rounds, Path(directory, "serve"), model)


if __name__ == "__main__":
    asyncio.run(main())
