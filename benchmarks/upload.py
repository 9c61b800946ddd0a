"""Compare uploads of a large file by this client, the official SDK and `curl -F`.

    python benchmarks/upload.py [MB] [ROUNDS]

All uploads go to a sink on loopback in its own process, which discards the bytes as cheaply as the
system allows. Each upload runs in a fresh process. The clients alternate, so that a slow moment
affects all of them, and all figures are from this run. MB is 10⁶ bytes.

Memory is the peak during the upload minus the resident memory just before it, after all imports
and the upload of one small file (Linux only). Blocking of the event loop is measured by a task
that wakes up every millisecond: how late it woke up, and how much CPU time the loop's thread used
since the last wake-up. The row "idle" is the same task in an otherwise idle process while `curl`
and the sink keep the machine busy: its delays are caused by the system.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from mistralai.client import Mistral
from pydantic import SecretStr

from training_backends import TrainingBackendError
from training_backends.http.client import HttpClient
from training_backends.http.upload import FileUpload, HashedFile, hash_file

MEMORY_MB = 64
AGAINST_SDK = 1.8
AGAINST_CURL = 0.5
HELD_MS = 10

OURS = "ours"
SDK = "official SDK, async"
CURL = "curl -F"
IDLE = "idle"

Upload = Callable[[Path], Awaitable[object]]
Ticks = list[tuple[float, float]]
"""Delay of each wake-up and CPU time of the thread since the last one, both in ms."""


# -- the sink -----------------------------------------------------------------------------------

_ANSWER = json.dumps(
    {
        "id": "00000000-0000-4000-8000-000000000000",
        "object": "file",
        "bytes": 1,
        "created_at": 1_700_000_000,
        "filename": "data.jsonl",
        "purpose": "fine-tune",
        "sample_type": "instruct",
        "source": "upload",
    }
).encode()
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
# On Linux the kernel then discards received TCP data without copying it.
_DISCARD = socket.MSG_TRUNC if sys.platform == "linux" else 0


def sink() -> None:
    """Respond to every request as a file store would, reading only its length."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=swallow, args=[connection], daemon=True).start()


def swallow(connection: socket.socket) -> None:
    """Serve one connection until it is closed."""
    buffer = bytearray(2**20)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            head = b""
            while b"\r\n\r\n" not in head:
                got = connection.recv(65536)
                if not got:
                    return
                head += got
            head, _, body = head.partition(b"\r\n\r\n")
            if re.search(rb"(?i)\nexpect: 100-continue", head):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            left = (int(length[1]) if length else 0) - len(body)
            while left > 0:
                taken = connection.recv_into(buffer, min(left, len(buffer)), _DISCARD)
                if not taken:
                    return
                left -= taken
            connection.sendall(_HEAD % len(_ANSWER) + _ANSWER)


# -- one upload, in its own process ---------------------------------------------------------------


async def measure(name: str, url: str, path: Path, *, ticking: bool) -> dict[str, Any]:
    """Upload once; return duration, memory and ticks."""
    ticks: Ticks = []
    upload = client(name, url, await hash_file(path))
    await upload(path.with_suffix(".small"))
    forget_high_water()
    before = memory("VmRSS")
    async with anyio.create_task_group() as tasks:
        if ticking:
            tasks.start_soon(tick, ticks)
            await anyio.sleep(0.05)
            ticks.clear()
        began = time.perf_counter()
        await upload(path)
        seconds = time.perf_counter() - began
        tasks.cancel_scope.cancel()
    return {"seconds": seconds, "memory": memory("VmHWM") - before, "ticks": ticks}


def client(name: str, url: str, hashed: HashedFile) -> Upload:
    """Return the upload function of one of the clients."""
    if name == IDLE:
        return lambda _: anyio.sleep(hashed.size / 1e9)  # about as long as an upload
    if name == SDK:
        return sdk(url)
    return ours(url, hashed)


def ours(url: str, hashed: HashedFile) -> Upload:
    """Upload a file that has been hashed, as this package's backends do."""

    async def key() -> SecretStr:
        return SecretStr("no-key")

    def decode(status: int, headers: Mapping[str, str], body: bytes) -> TrainingBackendError:
        del headers
        return TrainingBackendError(f"{status}: {body!r}")

    http = HttpClient(url, key=key, decode_error=decode)

    async def upload(path: Path) -> object:
        known = None if path.suffix == ".small" else hashed
        form = FileUpload(path, fields={"purpose": "fine-tune"}, hashed=known)
        return await http.upload("/v1/files", form)

    return upload


def sdk(url: str) -> Upload:
    """Upload with the official SDK from an open file, which it streams."""
    made = Mistral(api_key="no-key", server_url=url)

    async def upload(path: Path) -> object:
        with path.open("rb") as handle:
            content: Any = handle
            return await made.files.upload_async(
                file={"file_name": path.name, "content": content}, purpose="fine-tune"
            )

    return upload


async def tick(ticks: Ticks) -> None:
    """Wake up every millisecond and record the delay."""
    while True:
        began, used = time.perf_counter(), time.thread_time()
        await anyio.sleep(0.001)
        late = time.perf_counter() - began - 0.001
        ticks.append((late * 1e3, (time.thread_time() - used) * 1e3))


def forget_high_water() -> None:
    """Reset the peak memory of this process, where supported."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then includes the time since the process started


def memory(field: str) -> int:
    """Return a memory field of `/proc/self/status` in bytes; 0 on other systems."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


# -- the comparison -------------------------------------------------------------------------------


class Bench:
    """Uploads one file to one sink, repeatedly."""

    def __init__(self, url: str, path: Path) -> None:
        self._url = url
        self._path = path
        self.megabytes = path.stat().st_size / 1e6

    def run(self, name: str, *, ticking: bool = False) -> dict[str, Any]:
        """Upload once in a fresh process."""
        arguments = [name, self._url, str(self._path), "tick" if ticking else "time"]
        command = [sys.executable, __file__, "--child", *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        measured: dict[str, Any] = json.loads(done.stdout)
        return measured

    def curl(self) -> float:
        """Upload once with curl; return the seconds that it reports."""
        command = ["curl", "-sS", "-o", os.devnull, "-w", "%{time_total}"]
        form = ["-F", "purpose=fine-tune", "-F", f"file=@{self._path}"]
        address = f"{self._url}/v1/files"
        done = subprocess.run([*command, *form, address], check=True, stdout=subprocess.PIPE)
        return float(done.stdout)

    def idle(self) -> Ticks:
        """Run the ticker alone while curl keeps the machine busy."""
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                self.curl()

        busy = threading.Thread(target=load)
        busy.start()
        try:
            ticks: Ticks = self.run(IDLE, ticking=True)["ticks"]
        finally:
            over.set()
            busy.join()
        return ticks

    def hashing(self) -> float:
        """Return the SHA-256 speed of one core in MB/s, with nothing else running."""
        began = time.perf_counter()
        with self._path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        return self.megabytes / (time.perf_counter() - began)


def compare(bench: Bench, rounds: int) -> None:
    """Alternate the clients and print the table and the targets."""
    names = [OURS, SDK]
    speeds: dict[str, list[float]] = {name: [] for name in [*names, CURL]}
    above: dict[str, float] = dict.fromkeys(names, 0.0)
    ticks: dict[str, Ticks] = {name: [] for name in [*names, IDLE]}
    hashing = []
    for _ in range(rounds):
        for name in names:
            measured = bench.run(name)
            speeds[name].append(bench.megabytes / measured["seconds"])
            above[name] = max(above[name], measured["memory"] / 1e6)
            ticks[name] += bench.run(name, ticking=True)["ticks"]
        speeds[CURL].append(bench.megabytes / bench.curl())
        ticks[IDLE] += bench.idle()
        hashing.append(bench.hashing())
    median = {name: statistics.median(each) for name, each in speeds.items()}
    print(f"{bench.megabytes:.0f} MB, {rounds} rounds: median speed; maximum memory and delay\n")
    print(
        f"{'':<23}{'MB/s':>6}{'× SDK':>7}{'× curl':>8}{'memory MB':>11}"
        f"{'delay ms: p99':>14}{'max':>9}{'own CPU':>9}"
    )
    for name in [*names, CURL, IDLE]:
        row = f"{name:<23}"
        if name in median:
            speed = median[name]
            row += f"{speed:>6.0f}{speed / median[SDK]:>7.2f}{speed / median[CURL]:>8.2f}"
        row += f"{above[name]:>11.1f}" if name in above else " " * (53 - len(row))
        row += held(ticks[name]) if name in ticks else ""
        print(row.rstrip())
    print(f"\nSHA-256 alone, one core: {statistics.median(hashing):.0f} MB/s")
    print("Ours hashes the bytes as they are sent, and compares them with the expected digest.\n")
    most = above[OURS]
    goal(most <= MEMORY_MB, f"memory at most {MEMORY_MB} MB above idle", f"{most:.1f}")
    against = median[OURS] / median[SDK]
    goal(against >= AGAINST_SDK, f"at least {AGAINST_SDK} × the SDK", f"{against:.2f}")
    against = median[OURS] / median[CURL]
    goal(against >= AGAINST_CURL, f"at least {AGAINST_CURL} × curl", f"{against:.2f}")
    longest = max(late for late, _ in ticks[OURS])
    idle = max(late for late, _ in ticks[IDLE])
    met = None if longest > HELD_MS < idle else longest <= HELD_MS
    text = f"event loop blocked for at most {HELD_MS} ms"
    goal(met, text, f"{longest:.1f} (idle: {idle:.1f})")


def held(ticks: Sequence[tuple[float, float]]) -> str:
    """Format the delays of the ticker and the maximum CPU time of its thread."""
    late = sorted(each for each, _ in ticks)
    own = max(used for _, used in ticks)
    return f"{late[int(len(late) * 0.99)]:>14.1f}{late[-1]:>9.1f}{own:>9.1f}"


def goal(met: bool | None, text: str, found: str) -> None:  # noqa: FBT001
    """Print one target; None means that the machine was too busy to tell."""
    word = {True: "yes", False: "NO", None: "?"}[met]
    print(f"{word:<4} {text}: {found}")


def main() -> None:
    """Create the file, start the sink and compare."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    if shutil.which("curl") is None:
        sys.exit("curl is not installed; the comparison needs it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.with_suffix(".small").write_bytes(b"{}\n")
        block = os.urandom(10**6)
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
        command = [sys.executable, __file__, "--sink"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = f"http://127.0.0.1:{int(server.stdout.readline())}"
                compare(Bench(url, path), rounds)
            finally:
                server.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sink"]:
        sink()
    elif sys.argv[1:2] == ["--child"]:
        _, _, who, where, what, how = sys.argv
        upload = measure(who, where, Path(what), ticking=how == "tick")
        print(json.dumps(anyio.run(lambda: upload)))
    else:
        main()
