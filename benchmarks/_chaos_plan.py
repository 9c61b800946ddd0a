"""The trials of the chaos benchmark."""

import itertools
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

_TWICE: Final = Fault("after", "twice")

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
    "sent twice": [_TWICE],
}
"""By kind, the faults injected into every single request of a launch."""
_STOPS: Final[Sequence[Fault]] = [
    Fault("before", "stop server"),
    Fault("during", "stop server"),
    Fault("after", "stop server"),
]
KINDS: Final = (
    *FAULTS,
    "in a row",
    "storm",
    "store",
    "wait",
    "twins",
    "server",
    "doubt",
    "lists",
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
        lag: Seconds for which the server's lists omit new objects.
        doubles: Whether a second job may have been created, if it was cancelled.
        engine: Whether a real model is trained.
    """

    kind: str
    name: str
    injections: tuple[Injection, ...] = ()
    writes: tuple[str, ...] = ()
    wait_write: str | None = None
    twins: bool = False
    lag: float = 0.0
    doubles: bool = False
    engine: bool = False


@dataclass(frozen=True, slots=True)
class Clean:
    """The requests and writes of a launch without faults.

    Attributes:
        writes: Number of writes to the store by the launch.
        wait_writes: Number of writes by the `wait` that follows.
        create: Name of the requests that create a job.
    """

    requests: Sequence[Seen]
    writes: int
    wait_writes: int
    create: str


def _singles(kind: str, requests: Sequence[Seen]) -> Iterator[Trial]:
    """Each fault of a kind, at each request of a launch."""
    for fault in FAULTS[kind]:
        for number, request in enumerate(requests):
            if fault.when != "during" or request.is_upload:
                name = f"{fault.effect} {fault.when} request {number} ({request.name})"
                yield Trial(kind, name, (Injection(fault, number),))


def _rows(
    rng: random.Random, requests: Sequence[Seen], faults: Mapping[str, Sequence[Fault]]
) -> Iterator[Trial]:
    """The same fault several times in a row, up to more often than the client retries."""
    for kind, each in faults.items():
        for fault in each:
            for times in (2, 4, 7):
                start = rng.randrange(len(requests))
                name = f"{times} times {kind}, {fault.effect} {fault.when}, from request {start}"
                yield Trial("in a row", name, in_row(fault, start, times))


def _storms(rng: random.Random, faults: Mapping[str, Sequence[Fault]]) -> Iterator[Trial]:
    """Random faults at random requests."""
    every = [fault for each in faults.values() for fault in each]
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


def _doubts(create: str, *, hosted: bool) -> Iterator[Trial]:
    """The outcome of a create is unknown for a while, because lists lag or the create is late."""
    lost = [Fault("after", effect) for effect in ("reset", "kill", "silence")]
    # Longer than the client waits for a lost create. A gateway rejects a second job; a hosted
    # service creates it, and it must be cancelled.
    longest, doubles = 6.0, hosted
    for fault in lost:
        lose = Injection(fault, only=create)
        for lag in (0.5, 2.0, longest):
            name = f"{fault.effect} after create, lists {lag:g} s behind"
            yield Trial("doubt", name, (lose,), lag=lag, doubles=doubles and lag == longest)
    for effect, reply in (("429", _429), ("500", _500)):
        rejections = (Injection(Fault("before", "reply", reply), only=create),) * 4
        for fault in lost:
            name = f"{fault.effect} after create, lists 6 s behind, then {effect} to creates"
            plan = (Injection(fault, only=create), *rejections)
            yield Trial("doubt", name, plan, lag=longest, doubles=doubles)
        late = (Injection(Fault("before", "late"), only=create), *rejections)
        yield Trial("doubt", f"late create, then {effect} to creates", late)


def _lists(create: str) -> Iterator[Trial]:
    """The response to a create is lost, and then those to the requests that look for its job."""
    lost = itertools.cycle(Fault("after", effect) for effect in ("reset", "kill", "silence"))
    for kind, faults in FAULTS.items():
        for times, fault in zip((1, 3), lost, strict=False):
            name = f"{fault.effect} after create, then {times} times {kind}"
            plan = (Injection(fault, only=create), *(Injection(faults[-1]),) * times)
            yield Trial("lists", name, plan)


def _lates(requests: Sequence[Seen], *, hosted: bool) -> Iterator[Trial]:
    """A request with a side effect arrives after the client has given up."""
    for number, request in enumerate(requests):
        if request.method == "POST" and not (hosted and request.name == "POST files"):
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


def few(clean: Clean, *, hosted: bool) -> Iterator[Trial]:
    """A few trials at the most critical points."""
    numbered = list(enumerate(clean.requests))
    upload = next(number for number, request in numbered if request.is_upload)
    plans = [("kill during the first upload", Injection(Fault("during", "kill"), upload))]
    plans += [("kill after the create", Injection(Fault("after", "kill"), only=clean.create))]
    for number, request in numbered:
        if request.path.endswith("/start"):
            plans += [("kill after the start", Injection(Fault("after", "kill"), number))]
    for name, injection in plans:
        yield Trial("few", name, (injection,))
    if hosted:
        for when in ("before", "after"):
            plan = (Injection(Fault(when, "reply", _500), only=clean.create),)
            yield Trial("few", f"500 {when} the create, lists 1 s behind", plan, lag=1.0)
    middle = clean.writes // 2
    yield Trial("few", f"killed after write {middle}", writes=(f"after:{middle}",))


def planned(seed: int, clean: Clean, *, hosted: bool) -> list[Trial]:
    """Return all trials; the random ones are determined by the seed.

    Args:
        hosted: The server is a scripted provider, which loses its state when it is killed.
    """
    rng = random.Random(seed)
    requests, faults = clean.requests, FAULTS
    trials = [trial for kind in FAULTS for trial in _singles(kind, requests)]
    if hosted:
        # Files have no idempotency keys: one that a proxy uploads twice, or late, is stored twice.
        trials = [one for one in trials if one.kind != "sent twice"]
        plan = (Injection(_TWICE, only=clean.create),)
        trials.append(Trial("sent twice", "twice after the create", plan, doubles=True))
        faults = {kind: faults for kind, faults in FAULTS.items() if kind != "sent twice"}
    trials += _rows(rng, requests, faults)
    trials += _storms(rng, faults)
    trials += _stores(rng, clean.writes)
    trials += _waits(clean.wait_writes)
    trials += _twins(requests)
    trials += _doubts(clean.create, hosted=hosted)
    trials += _lates(requests, hosted=hosted)
    if hosted:
        trials += _lists(clean.create)
    else:
        trials += _servers(rng, requests)
        trials += _engines(requests)
    return trials
