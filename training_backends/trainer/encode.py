"""Encode a run's data files once, for all processes that train it and for every resume.

Each file becomes a directory of arrays in the run directory's `tokens/`, which are memory-mapped:

    ids             token ids of all sequences, one after the other (int32)
    trained         for each, whether it is in the loss (uint8)
    starts          where each sequence starts, and the end of the last (int64)
    labels          labels of a classifier's examples (uint8)
    manifest.json   see `Manifest`

Rows are encoded by several processes and written in their order, so memory is bounded. The
directory gets its name once all is on disk; it is used as long as the digest of everything that
the arrays depend on is the same. Needs no torch.
"""

import errno
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import TrainingBackendError
from training_backends.core.files import digest_of, sync_directory, write_atomic
from training_backends.datasets.scan_part import BOM
from training_backends.datasets.worker_pool import cpu_count, run_parallel
from training_backends.rundir.directory import Event, RunDir, RunSpec
from training_backends.tokens.encode_part import (
    EncodedPart,
    EncodingJob,
    EncodingSettings,
    RowCounts,
    forget_tokenizer,
)
from training_backends.tokens.encoders import tokenizer_digest
from training_backends.trainer.errors import Stopped, TrainerError, failure_of
from training_backends.trainer.model_files import (
    fetch_model,
    find_model,
    find_tokenizer_of,
    resolve_targets,
)

__all__ = ["Manifest", "array_path", "data_directories", "encode_data", "read_manifest"]

_TASK: Final = "training_backends.tokens.encode_part:encode_part"
_CHUNK: Final = 1 << 18
"""Bytes of lines that are encoded at a time: a twentieth of a second."""
_PER_PROCESS: Final = 1 << 22
"""Bytes of data that are worth the start of a process."""
_REPORT_EVERY: Final = 10.0
"""Seconds between two reports of the progress."""
_MANIFEST: Final = "manifest.json"
_ARRAYS: Final = ("ids", "trained", "starts", "labels")


class Manifest(msgspec.Struct, frozen=True):
    """What the arrays of a file contain (`manifest.json`).

    Attributes:
        digest: Of the data and everything else that the arrays depend on.
        name: Name of the data file.
        size: Its size in bytes.
        sha256: Its digest.
        sizes: Size in bytes of each array.
    """

    digest: str
    name: str
    size: int
    sha256: str
    counts: RowCounts
    sizes: dict[str, int]


def data_directories(run: RunDir, spec: RunSpec) -> tuple[list[Path], list[Path]]:
    """Return the directories of the training and of the validation files."""
    train = [run.tokens / f"train-{index}" for index in range(len(spec.train))]
    return train, [run.tokens / f"valid-{index}" for index in range(len(spec.validation))]


def array_path(directory: Path, name: str) -> Path:
    """Return the file of an array."""
    return directory / f"{name}.bin"


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a file's arrays; None if they are missing or incomplete."""
    try:
        found = msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=Manifest)
        sizes = {name: array_path(directory, name).stat().st_size for name in found.sizes}
    except (OSError, msgspec.DecodeError):
        return None
    return found if sizes == found.sizes else None


def encode_data(
    run: RunDir,
    spec: RunSpec,
    should_stop: Callable[[], bool],
    *,
    processes: int | None = None,
    report_every: float = _REPORT_EVERY,
) -> None:
    """Encode the data files of a run that are not encoded yet, and report what they contain.

    Args:
        should_stop: Called several times a second.
        processes: Number of processes; default: one per CPU, fewer for small files.
        report_every: Seconds between two reports of the progress.

    Raises:
        Stopped: `should_stop` returned True.
        TrainerError: A file cannot be read, or has too many invalid rows, or there is no space.
        TokenizerError: The model's tokenizer cannot encode the rows.
    """
    if spec.method == "classifier" and not spec.classifier_targets:
        raise TrainerError("A classifier needs classifier_targets.")
    fetch_model(spec.model)
    if spec.method == "classifier" and spec.model != TINY_MODEL:
        resolve_targets(spec.model, find_model(spec.model), spec.classifier_targets, trains=True)
    template = spec.chat_template_text
    model, directory = find_tokenizer_of(spec.model, has_template=template is not None)
    settings = EncodingSettings(
        model=model,
        directory=directory,
        chat_template=template,
        method=spec.method,
        seq_len=spec.seq_len,
        fim_ratio=spec.fim_ratio or 0.0,
        seed=spec.seed,
        targets=spec.classifier_targets,
    )
    rules = _digest_of_rules(settings)
    named = {"train": spec.train, "valid": spec.validation}
    examples = dict.fromkeys(named, 0)
    for role, sources in named.items():
        for index, source in enumerate(sources):
            file = _DataFile(run, source.local_path, f"{role}/{index}", rules)
            found = file.find() or file.encode(
                settings, should_stop, processes=processes, report_every=report_every
            )
            _report_rows(run, spec, str(source.local_path), found.counts)
            examples[role] += found.counts.examples
    forget_tokenizer()
    if not examples["train"]:
        raise TrainerError("The training files have no rows that can be trained on.")


def _digest_of_rules(settings: EncodingSettings) -> str:
    """Return the digest of what the encoding of a line depends on."""
    parts = [
        *(tokenizer_digest(settings.directory), settings.chat_template, settings.method),
        *(settings.seq_len, settings.fim_ratio, settings.seed, sys.byteorder),
        [
            target.model_dump(include={"name", "labels", "loss_function"})
            for target in settings.targets
        ],
    ]
    return sha256(msgspec.json.encode(parts)).hexdigest()


class _DataFile:
    """A data file of a run, and its arrays."""

    def __init__(self, run: RunDir, path: Path, name: str, rules: str) -> None:
        self._run = run
        self._path = path
        self._name = name
        self._rules = rules
        self._target = run.tokens / name.replace("/", "-")

    def find(self) -> Manifest | None:
        """Return the manifest of the arrays, if they are those of the file as it is now."""
        found = read_manifest(self._target)
        if found is None:
            return None
        try:
            digest = digest_of(self._path).sha256
        except OSError as error:
            raise self._unreadable(error) from error
        return found if found.digest == self._digest(digest) else None

    def _digest(self, data: str) -> str:
        return sha256(f"{self._rules} {self._name} {data}".encode()).hexdigest()

    def _unreadable(self, error: OSError) -> TrainerError:
        return TrainerError(f"{self._path} cannot be read: {error.strerror}")

    def encode(
        self,
        settings: EncodingSettings,
        should_stop: Callable[[], bool],
        *,
        processes: int | None,
        report_every: float,
    ) -> Manifest:
        """Encode the file and write its arrays."""
        try:
            lines = _Lines(self._path)
        except OSError as error:
            raise self._unreadable(error) from error
        enough = 1 + lines.total // _PER_PROCESS
        processes = min(cpu_count(), enough) if processes is None else processes
        temporary = self._target.with_name(f".{self._target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        jobs = (EncodingJob(settings, self._name, first, chunk) for first, chunk in lines.chunks())
        progress = _EncodingProgress(self._run, self._path.name, lines, report_every)
        with lines.file, self._reporting(temporary):
            with closing(run_parallel(_TASK, jobs, processes=processes)) as parts:
                arrays = _Arrays(temporary)
                with arrays.files:
                    for part in parts:
                        if should_stop():
                            raise Stopped
                        arrays.add(part)
                        progress.report(arrays.counts)
                    arrays.sync()
            manifest = Manifest(
                digest=self._digest(data := lines.sha256),
                name=self._path.name,
                size=lines.read,
                sha256=data,
                counts=arrays.counts,
                sizes=arrays.sizes,
            )
            write_atomic(temporary / _MANIFEST, msgspec.json.encode(manifest))
            shutil.rmtree(self._target, ignore_errors=True)
            temporary.rename(self._target)
            sync_directory(self._run.tokens)
        progress.report_end(arrays.counts, arrays.tokens)
        return manifest

    @contextmanager
    def _reporting(self, temporary: Path) -> Iterator[None]:
        """Explain errors, and remove what has been written."""
        try:
            yield
        except BaseException as error:
            free = shutil.disk_usage(self._run.path).free
            shutil.rmtree(temporary, ignore_errors=True)  # it takes up the space that is missing
            if isinstance(error, OSError):
                is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
                reason = "the disk is full" if is_full else failure_of(error).message
                raise TrainerError(
                    f"Cannot store the encoded rows of {self._path.name}: {reason}. They take up "
                    f"to 5 bytes per token; {free / 1e6:,.0f} MB were available. Free some space, "
                    "then resume.",
                    kind="internal",
                    retryable=True,
                ) from error
            if isinstance(error, TrainingBackendError):  # a worker was killed
                message = f"{error.message} {error.hint or ''}".strip()
                raise TrainerError(message, kind="internal", retryable=True) from error
            raise


class _Lines:
    """The lines of a file in chunks, and the digest of those read so far.

    Attributes:
        total: Size of the file in bytes.
        read: Bytes read so far.
    """

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("rb")
        self.total: int = os.fstat(self.file.fileno()).st_size
        self.read: int = 0
        self._path = path
        self._digest = sha256()

    @property
    def sha256(self) -> str:
        """The digest."""
        return self._digest.hexdigest()

    def chunks(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yield the number of the first line, and lines."""
        first = 1
        while lines := self._next():
            for line in lines:
                self._digest.update(line)
                self.read += len(line)
            following = first + len(lines)
            if first == 1:
                lines[0] = lines[0].removeprefix(BOM)
            yield first, lines
            first = following

    def _next(self) -> list[bytes]:
        try:
            return self.file.readlines(_CHUNK)
        except OSError as error:
            raise TrainerError(f"{self._path} cannot be read: {error.strerror}") from error


class _Arrays:
    """The arrays of a file while they are written.

    Attributes:
        files: Closes the files.
        sizes: Bytes of each array.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.files = ExitStack()
        self.counts = RowCounts()
        self.sizes: dict[str, int] = dict.fromkeys(_ARRAYS, 0)
        self._files = {
            name: self.files.enter_context(array_path(directory, name).open("wb"))
            for name in _ARRAYS
        }
        self._write("starts", array("q", [0]).tobytes())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.sizes["trained"]

    def add(self, part: EncodedPart) -> None:
        """Append the examples of the next part."""
        self.counts.add(part.counts)
        ends = array("q")
        end = self.tokens
        for length in part.lengths:
            end += length
            ends.append(end)
        found = {"ids": part.ids, "trained": part.trained, "labels": part.labels}
        for name, content in (found | {"starts": ends.tobytes()}).items():
            self._write(name, content)

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self.sizes[name] += len(content)

    def sync(self) -> None:
        """Flush everything to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


class _EncodingProgress:
    """Reports the progress of a file that takes long."""

    def __init__(self, run: RunDir, name: str, lines: _Lines, every: float) -> None:
        self._run = run
        self._name = name
        self._lines = lines
        self._every = every
        self._began = self._reported = time.monotonic()

    def report(self, counts: RowCounts) -> None:
        """Report the rows so far, if the last report was some time ago."""
        now = time.monotonic()
        if now - self._reported < self._every:
            return
        self._reported = now
        share = self._lines.read / max(1, self._lines.total)
        self._add(
            f"Encoding {self._name}: {counts.rows:,} rows ({share:.0%})", {"rows": counts.rows}
        )

    def report_end(self, counts: RowCounts, tokens: int) -> None:
        """Report the end, if it took long."""
        took = time.monotonic() - self._began
        if took >= self._every:
            self._add(
                f"Encoded {self._name}: {counts.rows:,} rows, {tokens:,} tokens in {took:.0f} s",
                {"rows": counts.rows, "tokens": tokens},
            )

    def _add(self, message: str, data: Mapping[str, Any]) -> None:
        self._run.add_event(Event(name="message", message=message, data=dict(data)))


def _report_rows(run: RunDir, spec: RunSpec, name: str, counts: RowCounts) -> None:
    """Report the rows of a file that are not trained on as they are.

    Raises:
        TrainerError: Too many rows are invalid.
    """

    def warn(message: str, **data: int) -> None:
        run.add_event(Event(name="message", level="warning", message=message, data=data))

    shown = "; ".join(f"line {line}: {why}" for line, why in counts.reasons)
    if counts.invalid > spec.max_invalid_fraction * (counts.invalid + counts.rows):
        raise TrainerError(f"{name}: {counts.invalid} invalid rows: {shown}")
    if counts.invalid:
        warn(f"{name}: skipped {counts.invalid} invalid rows: {shown}", invalid=counts.invalid)
    divided, parts = counts.divided
    if divided:
        run.add_event(
            Event(
                name="message",
                message=f"{name}: {divided:,} conversations became {parts:,} "
                "examples, because the chat template changes earlier answers: each answer is "
                "trained after the prompt that asks for it",
                data={"rows": divided, "examples": parts},
            )
        )
    if counts.untrained:
        warn(
            f"{name}: skipped {counts.untrained} rows without tokens in the loss",
            untrained=counts.untrained,
        )
    if counts.truncated:
        warn(
            f"{name}: truncated {counts.truncated} rows to {spec.seq_len} tokens",
            truncated=counts.truncated,
        )
