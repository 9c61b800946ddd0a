"""The server of `watch.py`: a provider with many jobs, some of which change constantly.

    python benchmarks/_watch_stub.py LIVE

Prints its port. It serves job lists and single jobs of the Mistral protocol as cheaply as possible
in Python: a job's list entry is rendered when the job changes. Besides the LIVE jobs it has twice
as many finished ones, as a provider would. Paths under `/control` belong to the benchmark.
"""

import bisect
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

SPACING = 20
"""Seconds between the creations of two jobs; the newest is an hour old."""
QUIET = 4 * 3600
"""Maximum seconds since the last change of a live job."""
TICK = 0.2
REST = 2.0
"""Minimum seconds between two changes of a job, because `modified_at` counts whole seconds."""
LIVE = ("QUEUED", "STARTED", "RUNNING")
AFTER = {"QUEUED": "STARTED", "STARTED": "RUNNING", "RUNNING": "SUCCESS"}

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_NOT_FOUND = (
    b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@dataclass(slots=True)
class Job:
    """One job."""

    id: str
    created: int
    status: str
    modified: int
    changed: float = 0.0
    """When it last changed, on this machine's monotonic clock."""
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    listed: bytes = b""

    def say(self, status: str, at: int) -> None:
        """Change the status."""
        self.status = status
        self.events.append({"name": "status-updated", "data": {"status": status}, "created_at": at})

    def reach(self, at: int) -> int:
        """Add a checkpoint; return its step."""
        step = 100 * (len(self.checkpoints) + 1)
        metrics = {"train_loss": 1 / step, "valid_loss": None, "valid_mean_token_accuracy": None}
        self.checkpoints.append({"metrics": metrics, "step_number": step, "created_at": at})
        return step

    def document(self) -> dict[str, Any]:
        """Return the job as in a list."""
        return {
            "id": self.id,
            "object": "job",
            "auto_start": False,
            "model": "open-mistral-7b",
            "status": self.status,
            "created_at": self.created,
            "modified_at": self.modified,
            "training_files": ["00000000-0000-4000-8000-00000000f11e"],
            "validation_files": [],
            "fine_tuned_model": f"ft:7b:{self.id[:8]}" if self.status == "SUCCESS" else None,
            "suffix": None,
            "integrations": [],
            "trained_tokens": None,
            "metadata": {
                "expected_duration_seconds": 86_400,
                "cost": 4.0,
                "cost_currency": "USD",
                "train_tokens_per_step": 131_072,
                "train_tokens": 131_072_000,
                "data_tokens": 1_000_000,
                "estimated_start_time": None,
            },
            "job_type": "completion",
            "hyperparameters": {"training_steps": 100_000, "learning_rate": 1e-4},
            "repositories": [],
        }

    def detailed(self) -> bytes:
        """Return the job as in a request for it alone."""
        newest_first = {"events": self.events[::-1], "checkpoints": self.checkpoints[::-1]}
        return json.dumps({**self.document(), **newest_first}).encode()


class Stub:
    """All jobs, counts of requests, and the changes so far."""

    def __init__(self, live: int) -> None:
        self._random = random.Random(3)
        self._lock = threading.Lock()
        self._by_status: dict[str, list[Job]] = {}
        self.jobs: dict[str, Job] = {}
        self.lists = 0
        self.details = 0
        self.changes: list[tuple[str, str, float]] = []
        self.rate = 0.0
        now = int(time.time())
        for number in range(3 * live):
            # Every third job is live; most of those are training.
            words = ("QUEUED", "STARTED", *("RUNNING",) * 8)
            status = words[number // 3 % 10] if number % 3 == 0 else "SUCCESS"
            self._add(number, now - 3600 - number * SPACING, status)

    def _add(self, number: int, created: int, status: str) -> None:
        job = Job(f"{number:08x}-0000-4000-8000-000000000000", created, status, created)
        for moment, word in enumerate(("VALIDATING", "VALIDATED", *LIVE, "SUCCESS")):
            job.say(word, created + moment)
            if word == status:
                break
        if status == "SUCCESS":
            job.modified = created + 100
        else:
            job.modified = max(created + 100, int(time.time()) - self._random.randrange(QUIET))
        if status in {"RUNNING", "SUCCESS"}:
            for moment in (created + 60, created + 80, job.modified):
                job.reach(moment)
        self.jobs[job.id] = job
        self._place(job)

    def _place(self, job: Job) -> None:
        job.listed = json.dumps(job.document()).encode()
        bisect.insort(self._by_status.setdefault(job.status, []), job, key=_newest_first)

    # -- changes ------------------------------------------------------------------------

    def move(self) -> None:
        """Change jobs forever at the current rate."""
        owed = 0.0
        while True:
            time.sleep(TICK)
            owed = owed + self.rate * TICK if self.rate else 0.0
            while owed >= 1:
                owed -= 1
                with self._lock:
                    self._change()

    def _change(self) -> None:
        """Advance one live job: by a checkpoint, or every tenth time by a status."""
        now, moment = int(time.time()), time.monotonic()
        status = self._random.choice(LIVE) if self._random.random() < 0.1 else "RUNNING"
        waiting = self._by_status.get(status, [])
        job = self._random.choice(waiting) if waiting else None
        if job is None or moment - job.changed < REST:
            return
        job.changed, job.modified = moment, now
        if status == "RUNNING" and self._random.random() < 0.95:
            what = str(job.reach(now))
            job.listed = json.dumps(job.document()).encode()
        else:
            waiting.remove(job)
            what = AFTER[status]
            job.say(what, now)
            self._place(job)
        self.changes.append((job.id, what, moment))

    # -- the protocol -------------------------------------------------------------------

    def answer(self, target: str) -> bytes:
        """Return the response to a GET request."""
        url = urlsplit(target)
        asked = dict(parse_qsl(url.query))
        with self._lock:
            if url.path.startswith("/control/"):
                return _response(_OK, json.dumps(self._control(url.path[9:], asked)).encode())
            job_id = url.path.removeprefix("/v1/fine_tuning/jobs").strip("/")
            if not job_id:
                self.lists += 1
                return _response(_OK, self._list(asked))
            self.details += 1
            job = self.jobs.get(job_id)
            if job is None:
                return _response(_NOT_FOUND, b'{"detail": "No fine tuning job matches."}')
            return _response(_OK, job.detailed())

    def _list(self, asked: Mapping[str, str]) -> bytes:
        if "status" in asked:
            found = self._by_status.get(asked["status"], [])
        else:
            found = sorted(self.jobs.values(), key=_newest_first)
        begin, end = 0, len(found)
        if "created_before" in asked:
            latest = _seconds(asked["created_before"])
            begin = bisect.bisect_left(found, -latest, key=_newest_first)
        if "created_after" in asked:
            earliest = _seconds(asked["created_after"])
            end = bisect.bisect_right(found, -earliest, key=_newest_first)
        size = int(asked.get("page_size", 100))
        place = begin + int(asked.get("page", 0)) * size
        shown = b",".join(job.listed for job in found[place : min(place + size, end)])
        total = max(end - begin, 0)
        return b'{"object":"list","total":%d,"data":[%s]}' % (total, shown)

    def _control(self, what: str, asked: Mapping[str, str]) -> Any:
        if what == "rate":
            self.rate = float(asked["value"])
        elif what == "jobs":
            live = (job for job in self.jobs.values() if job.status in LIVE)
            return [(job.id, job.status, job.created, job.modified) for job in live]
        elif what == "changes":
            return self.changes
        return {"lists": self.lists, "details": self.details, "changes": len(self.changes)}


def _newest_first(job: Job) -> int:
    return -job.created


def _seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _response(head: bytes, body: bytes) -> bytes:
    return head % len(body) + body


# -- the wire ---------------------------------------------------------------------------


def targets(connection: socket.socket) -> Iterator[str]:
    """Yield the request targets of one connection; requests have no body."""
    waiting = b""
    while True:
        while b"\r\n\r\n" not in waiting:
            got = connection.recv(65536)
            if not got:
                return
            waiting += got
        head, _, waiting = waiting.partition(b"\r\n\r\n")
        yield head.split(b" ", 2)[1].decode()


def serve(stub: Stub, connection: socket.socket) -> None:
    """Serve one connection until it is closed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        for target in targets(connection):
            connection.sendall(stub.answer(target))


def main() -> None:
    """Serve until killed."""
    stub = Stub(int(sys.argv[1]))
    threading.Thread(target=stub.move, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=[stub, connection], daemon=True).start()


if __name__ == "__main__":
    main()
