"""A run directory in an object store, for machines that share no storage. All functions block.

An object has the name of the file in the run directory that it is a copy of:

    data/, spec.json          the inputs; the client writes the spec last
    stop                      written by a client
    events-N.jsonl, metrics-N.jsonl   the lines of a log from byte N on; the last one is replaced by
                              longer ones until it is full, so that a copy of the log has the same
                              bytes, and cursors, everywhere
    lock                      written once the driver has started
    tokens/                   the encoded rows, see `objects.publish`
    checkpoints/step-N/       `share-R.json` lists the files of process R; `state.json` lists all of
                              them and is written last: without it, a checkpoint is incomplete
    result/                   see `objects.publish`
    exit.json                 written last

The driver alone writes the log and `exit.json`. Processes write their shares of a checkpoint.
"""

import re
import shutil
import time
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from pydantic import ValidationError

from training_backends.core.config import DataSource
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.files import hold_lock, make_private_directory, write_atomic
from training_backends.core.settings import load_settings
from training_backends.objects.publish import fetch, path_below, publish
from training_backends.objects.settings import ObjectSettings
from training_backends.objects.store import ObjectInfo, ObjectStore, scheme_of
from training_backends.rundir.checkpoints import OPTIMIZER, STATE, damage_of
from training_backends.rundir.directory import CheckpointState, ExitRecord, RunDir, RunSpec

__all__ = ["LogUpload", "StoredRun"]

_SEGMENT: Final = 256 * 1024
"""Bytes of an object of a log that is full."""
_SPEC, _LOCK, _STOP, _EXIT = "spec.json", "lock", "stop", "exit.json"
_LOG: Final = re.compile(r"(events|metrics)-(\d+)\.jsonl")
_COPY_PATIENCE: Final = 60.0
"""Seconds to wait for another process that updates the same copy."""
_POLL: Final = 1.0
"""Seconds."""
_VERSION: Final = ".version"
"""In a copy: the version of the spec, which tells the run from an earlier one with its id."""


class StoredRun:
    """A run in an object store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    @classmethod
    def at(cls, url: str) -> Self:
        """Open the run at a URL without a request, with the options of this machine's settings."""
        options = load_settings(ObjectSettings).options.get(scheme_of(url))
        return cls(ObjectStore(url, options))

    # -- copies of the small files -----------------------------------------------------

    def create(self, spec: RunSpec, data: Mapping[str, Path]) -> None:
        """Upload the inputs of a run."""
        for name, path in data.items():
            self.store.put(name, path)
        self.store.write(_SPEC, spec.model_dump_json(indent=2).encode())

    def update(self, run: RunDir, *, is_new: bool = False) -> None:
        """Bring a copy of the spec, the log and the state up to date.

        Args:
            is_new: Also look for changes if the copy is that of a run that has ended.
        """
        if run.exit.is_file() and not is_new:
            return
        make_private_directory(run.path.parent)
        lock = run.path.with_name(f".{run.path.name}.lock")
        # Held while the store is asked, so that no older answer is applied after a newer one.
        with hold_lock(lock, _COPY_PATIENCE):
            found = {each.name: each for each in self.store.files()}
            if _SPEC in found:
                self._apply(run, found)
            else:  # deleted
                shutil.rmtree(run.path, ignore_errors=True)
                lock.unlink()

    def _apply(self, run: RunDir, found: Mapping[str, ObjectInfo]) -> None:
        make_private_directory(run.path)
        if _read(run.path / _VERSION) != found[_SPEC].version.encode():
            self._restart(run, found[_SPEC])
        self._update_log(run, found.values())
        for name in (_LOCK, _STOP, _EXIT):
            path = run.path / name
            if name not in found:
                if name == _STOP:
                    path.unlink(missing_ok=True)
            elif not path.exists():
                with suppress(RunNotFound):  # removed just now
                    write_atomic(path, self.store.read(name, 0, found[name].size))

    def _restart(self, run: RunDir, spec: ObjectInfo) -> None:
        """Replace the copy of an earlier run with the same id."""
        for path in run.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        write_atomic(run.spec, self.store.read(_SPEC, 0, spec.size))
        write_atomic(run.path / _VERSION, spec.version)

    def _update_log(self, run: RunDir, found: Iterable[ObjectInfo]) -> None:
        parts = [(match, each) for each in found if (match := _LOG.fullmatch(each.name))]
        for match, each in sorted(parts, key=lambda part: int(part[0][2])):
            path, start = run.path / f"{match[1]}.jsonl", int(match[2])
            have = path.stat().st_size if path.exists() else 0
            if start <= have < start + each.size:
                content = self.store.read(each.name, have - start, each.size)
                with path.open("ab") as file:
                    file.write(content)

    def request_stop(self, *, save_checkpoint: bool) -> None:
        """Ask the driver to end the run; see `RunDir.request_stop`."""
        self.store.write(_STOP, b"save" if save_checkpoint else b"discard")

    def read_stop(self) -> bytes | None:
        """Return the request of a client, if there is one."""
        try:
            return self.store.read(_STOP, 0, self.store.info(_STOP).size)
        except RunNotFound:
            return None

    def write_lock(self, run: RunDir) -> None:
        """Show that the driver has started."""
        self.store.put(_LOCK, run.lock)

    def finish(self, record: ExitRecord, *, replace: bool = True) -> None:
        """Write how the run ended, after everything else."""
        if not replace:
            with suppress(RunNotFound):
                self.store.info(_EXIT)
                return
        self.store.write(_EXIT, record.model_dump_json(indent=2).encode())
        self.store.remove(_STOP)  # the request has been served

    def remove(self) -> None:
        """Remove the run; safe to repeat, and to repeat after an interruption."""
        for directory in self.store.directories(""):
            self.store.remove_all(directory)
        for each in self.store.files():
            if each.name != _SPEC:
                self.store.remove(each.name)
        with suppress(TrainingBackendError):  # parts of cut uploads
            self.store.abort_uploads("", before=time.time())
        self.store.remove(_SPEC)

    # -- directories -------------------------------------------------------------------

    def fetch_data(self, run: RunDir) -> None:
        """Download the data, and give the spec its paths on this machine."""
        spec = run.read_spec()
        changes = {
            role: tuple(self._fetch_file(source, run) for source in getattr(spec, role))
            for role in ("train", "validation")
        }
        run.write_spec(spec.model_copy(update=changes))

    def _fetch_file(self, source: DataSource, run: RunDir) -> DataSource:
        name = source.local_path.as_posix()
        path = path_below(run.path, name)
        make_private_directory(path.parent)
        self.store.get(name, path)
        return source.model_copy(update={"path": path})

    def store_tokens(self, run: RunDir) -> None:
        """Upload the encoded rows."""
        publish(run.tokens, self.store.below("tokens"), {}, replace=True)

    def fetch_tokens(self, run: RunDir) -> None:
        """Download the encoded rows, if there are any and they are not here."""
        if not run.tokens.is_dir():
            fetch(self.store.below("tokens"), run.tokens)

    def store_result(self, run: RunDir) -> None:
        """Upload the trained model."""
        publish(run.result, self.store.below("result"), {"run": run.path.name}, replace=True)

    def fetch_result(self, run: RunDir) -> None:
        """Download the trained model, unless it is here.

        Raises:
            RunNotFound: It is not in the store.
        """
        with hold_lock(run.path / ".result.lock", _COPY_PATIENCE * 60):
            if not run.result.is_dir() and not fetch(self.store.below("result"), run.result):
                raise RunNotFound(f"{self.store.place('result')} has been removed.")

    # -- checkpoints -------------------------------------------------------------------

    def checkpoints(self) -> dict[int, CheckpointState]:
        """Return the complete checkpoints by step, in order."""
        found = {each.name: each for each in self.store.list("checkpoints")}
        states = {}
        for name, each in found.items():
            directory, _, file = name.rpartition("/")
            if file != STATE:
                continue
            with suppress(ValidationError, RunNotFound):
                state = CheckpointState.model_validate_json(self.store.read(name, 0, each.size))
                objects = {key: found.get(f"{directory}/{key}") for key in state.files}
                if all(have and have.size == state.files[key] for key, have in objects.items()):
                    states[state.step] = state
        return dict(sorted(states.items()))

    def store_share(self, path: Path, rank: int) -> None:
        """Upload the files that a process has written to a checkpoint.

        Raises:
            OSError: The checkpoint has been removed.
        """
        state = (path / STATE).read_bytes()
        for name in CheckpointState.model_validate_json(state).files:
            self.store.put(f"checkpoints/{path.name}/{name}", path / name)
        self.store.write(f"checkpoints/{path.name}/{_share(rank)}", state)

    def complete_checkpoint(self, path: Path, processes: int) -> bool:
        """Make a checkpoint valid once all processes have uploaded their shares.

        Args:
            path: The checkpoint in the directory of the first process.
        """
        place = f"checkpoints/{path.name}"
        found = {each.name: each.size for each in self.store.files(place)}
        names = [f"{place}/{_share(rank)}" for rank in range(processes)]
        if not found.keys() >= {*names}:
            return False
        contents = [self.store.read(name, 0, found[name]) for name in names]
        shares = [CheckpointState.model_validate_json(content) for content in contents]
        state = shares[0].model_copy(
            update={
                "files": dict(ChainMap(*(share.files for share in shares))),
                "checksums": dict(ChainMap(*(share.checksums for share in shares))),
            }
        )
        self.store.write(f"{place}/{STATE}", state.model_dump_json(indent=2).encode())
        return True

    def remove_checkpoints(self, steps: Iterable[int]) -> None:
        """Remove checkpoints, the state first."""
        for step in steps:
            self.store.remove(f"checkpoints/step-{step}/{STATE}")
            self.store.remove_all(f"checkpoints/step-{step}")

    def steps(self) -> Sequence[int]:
        """Return the steps of all checkpoints, also of incomplete ones."""
        names = self.store.directories("checkpoints")
        return [int(step) for name in names if (step := name.rpartition("-")[2]).isdecimal()]

    def fetch_checkpoint(self, step: int, state: CheckpointState, run: RunDir) -> str | None:
        """Download the files of a checkpoint that are not here; return what is wrong with it."""
        path = run.checkpoints / f"step-{step}"
        make_private_directory(path)
        for name, size in state.files.items():
            target = path_below(path, name)
            if not target.is_file() or target.stat().st_size != size:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.store.get(f"checkpoints/{path.name}/{name}", target)
        write_atomic(path / STATE, state.model_dump_json(indent=2))
        if reason := damage_of(path):
            shutil.rmtree(path)  # it may be this copy
        return reason

    def fetch_shares(self, step: int, run: RunDir) -> str | None:
        """Wait until a checkpoint is complete, and download what other processes have written.

        Returns:
            What is wrong with it.
        """
        while (state := self.checkpoints().get(step)) is None:
            time.sleep(_POLL)
        return self.fetch_checkpoint(step, state, run)

    def copy_checkpoint(self, source: "StoredRun", step: int, state: CheckpointState) -> None:
        """Copy a checkpoint of another run, without downloading it."""
        place = f"checkpoints/step-{step}"
        for name in (*state.files, STATE):
            source.store.copy(f"{place}/{name}", f"{place}/{name}", to=self.store)

    def copy_tokens(self, source: "StoredRun") -> None:
        """Copy the encoded rows of another run; they are used if its data is the same."""
        names = [each.name for each in source.store.list("tokens")]
        if "tokens/manifest.json" in names:
            for name in sorted(names, key="tokens/manifest.json".__eq__):  # it comes last
                source.store.copy(name, name, to=self.store)

    def reduce(self) -> None:
        """Remove what only resuming needs, as the run has completed."""
        self.store.remove_all("tokens")
        for step, state in self.checkpoints().items():
            place = f"checkpoints/step-{step}"
            if not any(name.startswith(f"{OPTIMIZER}/") for name in state.files):
                continue
            kept = {
                field: {
                    name: value
                    for name, value in getattr(state, field).items()
                    if not name.startswith(f"{OPTIMIZER}/")
                }
                for field in ("files", "checksums")
            }
            content = state.model_copy(update=kept).model_dump_json(indent=2)
            self.store.write(f"{place}/{STATE}", content.encode())
            self.store.remove_all(f"{place}/{OPTIMIZER}")


class LogUpload:
    """Uploads what is appended to a log; the only writer of its objects."""

    def __init__(self, store: ObjectStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._start = 0  # of the last object
        self._end = 0

    def push(self) -> None:
        """Upload the complete lines that are not there yet; repeat after an error."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                content = file.read()
        except FileNotFoundError:
            return
        content = content[: content.rfind(b"\n") + 1]
        while self._start + len(content) > self._end:
            # Objects end with a line, so that each can be read by itself.
            full = content.find(b"\n", _SEGMENT - 1) + 1
            part = content[:full] if full else content
            self._store.write(f"{self._path.stem}-{self._start:012}.jsonl", part)
            self._end = self._start + len(part)
            if not full:
                return
            self._start, content = self._end, content[full:]


def _share(rank: int) -> str:
    return f"share-{rank}.json"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
