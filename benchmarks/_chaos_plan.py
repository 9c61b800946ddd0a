"""The trials of the chaos benchmark."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks._chaos_proxy import Fault, Injection, Seen, in_row

__all__ = ["KINDS", "Clean", "Trial", "few", "planned"]


def _answer(status: str, content_type: str, body: str, *headers: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body.encode())}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


_JSON: Final = "application/json"
_500: Final = _answer("500 Internal Server Error", _JSON, '{"message": "Internal server error"}')
_502: Final = _answer(
    "502 Bad Gateway", "text/html", "<html><body><h1>502 Bad Gateway</h1></body></html>"
)
_429: Final = _answer(
    "429 Too Many Requests", _JSON, '{"message": "Rate limit exceeded"}', "Retry-After: 1"
)
_PAGE: Final = _answer(
    "200 OK", "text/html", "<!doctype html><title>Network</title><p>Please sign in first."
)

FAULTS: Final[Mapping[str, Sequence[Fault]]] = {
    "kill": [Fault("before", "kill"), Fault("after", "kill"), Fault("during", "kill")],
    "reset": [Fault("before", "reset"), Fault("after", "reset"), Fault("during", "reset")],
    "timeout": [Fault("before", "silence"), Fault("after", "silence"), Fault("during", "silence")],
    "500": [Fault("before", "reply", _500), Fault("after", "reply", _500)],
    "502 page": [
        Fault("before", "reply", _502),
        Fault("after", "reply", _502),
        Fault("during", "reply", _502),
    ],
    "429": [Fault("before", "reply", _429)],
    "broken JSON": [Fault("after", "halve"), Fault("after", "cut")],
    "HTML 200": [Fault("before", "reply", _PAGE), Fault("after", "reply", _PAGE)],
    "slow bytes": [Fault("after", "drip")],
    "sent twice": [Fault("after", "twice")],
}
"""By kind, the faults injected into every single request of a launch."""
_STOPS: Final[Sequence[Fault]] = [
    Fault("before", "stop server"),
    Fault("during", "stop server"),
    Fault("after", "stop server"),
]
_CREATE: Final = "POST fine_tuning/jobs"
KINDS: Final = (
    *FAULTS,
    "in a row",
    "storm",
    "store",
    "wait",
    "twins",
    "server",
    "doubt",
    "late",
    "engine",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run and the faults injected into it.

    Attributes:
        writes: For each launch in turn, the write to the store at which it is killed.
        wait_write: The write to the store at which `wait` is killed before it is repeated.
        twins: Whether two processes launch the run at the same time.
        lag: Seconds for which the gateway's lists omit new objects.
        engine: Whether a real model is trained.
    """

    kind: str
    name: str
    injections: tuple[Injection, ...] = ()
    writes: tuple[str, ...] = ()
    wait_write: str | None = None
    twins: bool = False
    lag: float = 0.0
    engine: bool = False


@dataclass(frozen=True, slots=True)
class Clean:
    """The requests and writes of a launch without faults.

    Attributes:
        writes: Number of writes to the store by the launch.
        wait_writes: Number of writes by the `wait` that follows.
    """

    requests: Sequence[Seen]
    writes: int
    wait_writes: int


def _singles(kind: str, requests: Sequence[Seen]) -> Iterator[Trial]:
    """Each fault of a kind, at each request of a launch."""
    for fault in FAULTS[kind]:
        for number, request in enumerate(requests):
            if fault.when != "during" or request.is_upload:
                name = f"{fault.effect} {fault.when} request {number} ({request.name})"
                yield Trial(kind, name, (Injection(fault, number),))


def _rows(rng: random.Random, requests: Sequence[Seen]) -> Iterator[Trial]:
    """The same fault several times in a row, up to more often than the client retries."""
    for kind, faults in FAULTS.items():
        for fault in faults:
            for times in (2, 4, 7):
                start = rng.randrange(len(requests))
                name = f"{times} times {kind}, {fault.effect} {fault.when}, from request {start}"
                yield Trial("in a row", name, in_row(fault, start, times))


def _storms(rng: random.Random) -> Iterator[Trial]:
    """Random faults at random requests."""
    every = [fault for faults in FAULTS.values() for fault in faults]
    for number in range(40):
        plan = tuple(Injection(rng.choice(every), rng.randrange(8)) for _ in range(6))
        yield Trial("storm", f"storm {number}", plan)


def _stores(rng: random.Random, writes: int) -> Iterator[Trial]:
    """Killed before and after each write to the store, and repeatedly at random writes."""
    for write in range(1, writes + 1):
        for when in ("before", "after"):
            yield Trial("store", f"killed {when} write {write}", writes=(f"{when}:{write}",))
    for number in range(10):
        chosen = tuple(f"{rng.choice(('before', 'after'))}:{rng.randint(2, 6)}" for _ in range(5))
        yield Trial("store", f"killed repeatedly, {number}: {' '.join(chosen)}", writes=chosen)


def _waits(writes: int) -> Iterator[Trial]:
    """`wait` is killed before and after each of its writes."""
    for write in range(1, writes + 1):
        for when in ("before", "after"):
            yield Trial("wait", f"killed {when} write {write}", wait_write=f"{when}:{write}")


def _twins(requests: Sequence[Seen]) -> Iterator[Trial]:
    """Two processes launch the same run, and the first one is killed."""
    for number, request in enumerate(requests):
        for fault in FAULTS["kill"][:2]:
            name = f"first killed {fault.when} request {number} ({request.name})"
            yield Trial("twins", name, (Injection(fault, number),), twins=True)


def _servers(rng: random.Random, requests: Sequence[Seen]) -> Iterator[Trial]:
    """The gateway is killed and restarted on its state; in the last trials the client too."""
    for number, request in enumerate(requests):
        if request.method == "POST" or number % 4 == 0:
            for fault in _STOPS:
                name = f"gateway killed {fault.when} request {number} ({request.name})"
                yield Trial("server", name, (Injection(fault, number),))
    for number in range(10):
        either = [*_STOPS, *FAULTS["kill"]]
        plan = tuple(Injection(rng.choice(either), rng.randrange(8)) for _ in range(4))
        yield Trial("server", f"either side killed, {number}", plan)


def _doubts() -> Iterator[Trial]:
    """The outcome of a create is unknown for a while, because lists lag or the create is late."""
    lost = [Fault("after", effect) for effect in ("reset", "kill", "silence")]
    for fault in lost:
        for lag in (0.5, 2.0, 6.0):
            name = f"{fault.effect} after create, lists {lag:g} s behind"
            yield Trial("doubt", name, (Injection(fault, only=_CREATE),), lag=lag)
    for effect, reply in (("429", _429), ("500", _500)):
        rejections = (Injection(Fault("before", "reply", reply), only=_CREATE),) * 4
        for fault in lost:
            name = f"{fault.effect} after create, lists 6 s behind, then {effect} to creates"
            yield Trial("doubt", name, (Injection(fault, only=_CREATE), *rejections), lag=6.0)
        late = Injection(Fault("before", "late"), only=_CREATE)
        yield Trial("doubt", f"late create, then {effect} to creates", (late, *rejections))


def _lates(requests: Sequence[Seen]) -> Iterator[Trial]:
    """A request with a side effect arrives after the client has given up."""
    for number, request in enumerate(requests):
        if request.method == "POST":
            for copy in range(4):
                name = f"late request {number} ({request.name}), {copy}"
                yield Trial("late", name, (Injection(Fault("before", "late"), number),))


def _engines(requests: Sequence[Seen]) -> Iterator[Trial]:
    """Killed before and after each request with a side effect, while a real model is trained."""
    for number, request in enumerate(requests):
        if request.method == "POST":
            for when in ("before", "after"):
                name = f"kill {when} request {number} ({request.name}), real training"
                plan = (Injection(Fault(when, "kill"), number),)
                yield Trial("engine", name, plan, engine=True)


def few(clean: Clean) -> Iterator[Trial]:
    """A few trials at the most critical points."""
    chosen = {
        "files": [Fault("during", "kill")],
        "jobs": [Fault("after", "kill")],
        "start": [Fault("after", "kill")],
    }
    for number, request in enumerate(clean.requests):
        if request.method == "POST":
            for fault in chosen.pop(request.path.rpartition("/")[2], ()):
                name = f"{fault.effect} {fault.when} request {number} ({request.name})"
                yield Trial("few", name, (Injection(fault, number),))
    middle = clean.writes // 2
    yield Trial("few", f"killed after write {middle}", writes=(f"after:{middle}",))


def planned(seed: int, clean: Clean) -> list[Trial]:
    """Return all trials; the random ones are determined by the seed."""
    rng = random.Random(seed)
    requests = clean.requests
    trials = [trial for kind in FAULTS for trial in _singles(kind, requests)]
    trials += _rows(rng, requests)
    trials += _storms(rng)
    trials += _stores(rng, clean.writes)
    trials += _waits(clean.wait_writes)
    trials += _twins(requests)
    trials += _servers(rng, requests)
    trials += _doubts()
    trials += _lates(requests)
    trials += _engines(requests)
    return trials
