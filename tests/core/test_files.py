"""Digests known by stamps, locks, and signals that reach only the holder of a lock."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from training_backends.core.files import (
    digest_of,
    hold_lock,
    keep_digest,
    settled_stamp,
    signal_holder,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and /proc")

HOLDER = """
import sys, time
from pathlib import Path
from training_backends.core.files import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Where the lock is."""
    return tmp_path / "lock"


@pytest.fixture
def holder(lock: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has nothing to do with the lock."""
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def test_the_holder_receives_the_signal(lock: Path, holder: "subprocess.Popen[str]") -> None:
    """It is the process that its record describes."""
    assert signal_holder(lock, signal.SIGTERM)
    assert holder.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("field", [1, 2, 3], ids=["boot", "namespace", "start"])
def test_another_process_with_the_same_id_receives_nothing(
    lock: Path, stranger: "subprocess.Popen[bytes]", field: int
) -> None:
    """Not after a restart, not in another container, not where the id was given out again."""
    with hold_lock(lock):
        record = lock.read_text().split()
        record[0] = str(stranger.pid)
        stat = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()
        record[3] = stat[19]
        true = " ".join(record)
        record[field] = str(int(record[field][:4], 16) + 1)
        lock.write_text(" ".join(record) + "\n")
        assert not signal_holder(lock, signal.SIGKILL)
        assert stranger.poll() is None
        lock.write_text(f"{true}\n")
        assert signal_holder(lock, signal.SIGKILL), "only this field differed"
    assert stranger.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("text", ["{pid}", "{pid}\n", "", "-1", "0 0 0 0", "x y z", "{pid} é"])
def test_a_record_that_identifies_no_process_is_not_acted_upon(
    lock: Path, stranger: "subprocess.Popen[bytes]", text: str
) -> None:
    """As an earlier version wrote it, with the process id only, or damaged."""
    with hold_lock(lock):
        lock.write_text(text.format(pid=stranger.pid))
        assert not signal_holder(lock, signal.SIGKILL)
    assert stranger.poll() is None


def test_without_a_holder_no_signal_is_sent(lock: Path) -> None:
    """Its record outlives the lock; the process may still be alive."""
    assert not signal_holder(lock, signal.SIGKILL)
    with hold_lock(lock):
        pass
    assert not signal_holder(lock, signal.SIGKILL)


def test_a_longer_record_leaves_nothing_behind(lock: Path) -> None:
    """The record is the holder's alone."""
    lock.write_text("x" * 500)
    with hold_lock(lock):
        record = lock.read_text()
    assert record.endswith("\n")
    assert "x" not in record


def test_a_digest_is_known_until_the_file_is_written(tmp_path: Path) -> None:
    """A write that keeps size and modification time changes the digest nevertheless."""
    path = tmp_path / "data"
    path.write_bytes(b"one")
    stamp = settled_stamp(path, wait=True)
    assert stamp is not None
    keep_digest(stamp, "kept")
    assert digest_of(path) == ("kept", 3)
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest_of(path) == (sha256(b"two").hexdigest(), 3)


def test_a_file_just_written_has_no_settled_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write within the clock's resolution could leave its times as they are."""
    path = tmp_path / "data"
    path.write_bytes(b"one")
    written = path.stat().st_ctime_ns
    for age, is_settled in [(-1, False), (10**7, False), (3 * 10**9, True)]:
        monkeypatch.setattr(time, "time_ns", lambda age=age: written + age)
        assert (settled_stamp(path) is not None) is is_settled
