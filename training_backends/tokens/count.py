"""Count the tokens of training files: all rows, or a sample with a confidence interval."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from training_backends.core.dataset import DataFile, Dataset
from training_backends.core.errors import DatasetError
from training_backends.core.files import Stamp, digest_of, settled_stamp, stamp_of
from training_backends.datasets.cache import ResultCache
from training_backends.datasets.open_file import KEPT_BYTES, STDIN, kind_of, open_data
from training_backends.datasets.worker_pool import cpu_count, run_parallel
from training_backends.datasets.write import Meter
from training_backends.tokens.count_part import CountCheck, CountJob, PartCount, compare, draw
from training_backends.tokens.counters import NOTE as OPENAI_NOTE
from training_backends.tokens.counters import count_row, counter_of, is_fast
from training_backends.tokens.counts import (
    UNKNOWN_LAYOUT,
    AnyRow,
    BadRow,
    Lengths,
    TokenCount,
    Uncountable,
)
from training_backends.tokens.tokenizers import Tokenizer, find_tokenizer, tokenizer_of

__all__ = [
    "EXACT_BYTES",
    "SAMPLE_ROWS",
    "SLOW_EXACT_BYTES",
    "count_files",
    "count_tokens",
    "row_counter",
]

EXACT_BYTES: Final = 16_000_000
"""Data up to this size is counted completely, in about two seconds on two CPUs."""

SLOW_EXACT_BYTES: Final = 4_000_000
"""The same for slow counters: chat templates and Mistral's latest tokenizers."""

SAMPLE_ROWS: Final = 2_000
"""Rows sampled from larger data; the interval is then about ±1%."""

_LEAST_ROWS: Final = 200
_CHECKED_ROWS: Final = 64
_PART_BYTES: Final = 4 << 20
_PARALLEL_BYTES: Final = 16 << 20
"""Bytes below which starting more processes is slower."""

_VERSION: Final = "tokens 3"
"""Increment the number when counting or `Lengths` changes."""

_TASK: Final = "training_backends.tokens.count_part:run"
_Z95: Final = 1.96


class _Mismatch(Exception):
    """The fast counter and the reference disagree; the message has the position."""


@dataclass(slots=True)
class _Estimate:
    """Tokens of one file, with their variance when sampled."""

    lengths: Lengths
    tokens: float
    rows: int
    variance: float = 0.0
    at_least: int = 0


def count_tokens(
    dataset: Dataset,
    model: str,
    *,
    seq_len: int | None = None,
    chat_template: str | None = None,
    processes: int | None = None,
) -> TokenCount:
    """Count the tokens of the training files with the tokenizer of `model`.

    Counts as `dataset.counting` says: by default all rows of data up to `EXACT_BYTES`, and a
    sample of larger data, which is the same for the same content. Blocks while reading: call it
    in a thread from async code. If mistral-common is the reference, a few rows of each file are
    verified with it, and all rows are counted with it if they differ.

    Args:
        seq_len: Also count the rows longer than this.
        chat_template: Jinja template that replaces the model's own.
        processes: Maximum number of processes; None chooses by size.
    """
    try:
        tokenizer = find_tokenizer(model, chat_template=chat_template)
        counting = _Counting(tokenizer, dataset, seq_len=seq_len, processes=processes)
        return counting.total(counting.count())
    except (Uncountable, DatasetError, OSError) as error:
        return _uncounted(model, error)


def count_files(
    dataset: Dataset,
    model: str,
    *,
    seq_len: int | None = None,
    chat_template: str | None = None,
) -> list[TokenCount]:
    """Count the tokens of each training file like `count_tokens`, which counts their total.

    If one of the files cannot be counted, none has a count.
    """
    try:
        tokenizer = find_tokenizer(model, chat_template=chat_template)
        counting = _Counting(tokenizer, dataset, seq_len=seq_len, processes=None)
        return [counting.total([estimate]) for estimate in counting.count()]
    except (Uncountable, DatasetError, OSError) as error:
        return [_uncounted(model, error) for _ in dataset.train]


def _uncounted(model: str, error: Exception) -> TokenCount:
    name = tokenizer_of(model)
    if isinstance(error, Uncountable):
        return TokenCount(tokenizer=name, reason=str(error), bad_row=isinstance(error, BadRow))
    reason = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, DatasetError) and error.issues:
        reason = error.issues[0].message
    return TokenCount(tokenizer=name, reason=f"could not read a file: {reason}")


def row_counter(model: str) -> Callable[[AnyRow], int] | None:
    """Return a function that counts single rows for `model`, or None if there is none.

    It raises `ValueError` for a row without an exact count.
    """
    try:
        counter = counter_of(find_tokenizer(model))
    except (Uncountable, OSError):
        return None
    return lambda row: sum(count_row(counter, row))


class _Counting:
    """One count over several files."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dataset: Dataset,
        *,
        seq_len: int | None,
        processes: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._files = dataset.train
        self._wishes = dataset.counting
        self._seq_len = seq_len
        self._processes = processes
        self._texts_only = any(file.sample_type == "classifier" for file in self._files)
        self._cache = ResultCache(None if self._texts_only else dataset.counting.cache)
        self._size = sum(file.size for file in self._files)
        self._notes = [OPENAI_NOTE] if tokenizer.kind == "tiktoken" else []
        self._slow = False

    def count(self) -> list[_Estimate]:
        """Count all files; repeat with the reference if the fast counter differs."""
        packed = [_is_packed(file) for file in self._files]
        bound = EXACT_BYTES if is_fast(self._tokenizer) else SLOW_EXACT_BYTES
        sample = self._wishes.sample
        if sample is None and not self._wishes.exact and self._size > bound:
            sample = SAMPLE_ROWS
        try:
            return self._estimate(packed, sample)
        except _Mismatch as difference:
            self._slow = True
            self._notes.append(
                f"All rows were counted with mistral-common: counts differed at {difference}."
            )
            return self._estimate(packed, sample)

    def _estimate(self, packed: Sequence[bool], sample: int | None) -> list[_Estimate]:
        found: dict[int, _Estimate] = {}
        complete: list[tuple[int, CountJob]] = []
        for number, file in enumerate(self._files):
            if kept := self._kept(file):
                found[number] = _exactly(kept)
                continue
            job = self._job(file, is_packed=packed[number])
            wanted = _share(sample, file.size, self._size)
            if wanted and wanted < file.rows and not packed[number]:
                found[number] = self._draw(file, job, wanted)
            else:
                complete.append((number, job))
        stamps = self._stamps(number for number, _ in complete)
        for number, lengths in self._count_complete(complete):
            found[number] = _exactly(lengths)
            self._keep(self._files[number].path, stamps.get(number), lengths)
        return [found[number] for number in sorted(found)]

    def _stamps(self, numbers: Iterable[int]) -> dict[int, Stamp | None]:
        if self._wishes.cache is None:
            return {}
        return {number: settled_stamp(self._files[number].path, wait=True) for number in numbers}

    def _kept(self, file: DataFile) -> Lengths | None:
        """Return the kept count of a file, without reading the file."""
        if self._wishes.cache is None or file.sha256 is None:
            return None
        with suppress(msgspec.MsgspecError):
            if content := self._cache.find(self._key(file.sha256)):
                return msgspec.json.decode(content, type=Lengths)
        return None

    def _keep(self, path: Path, stamp: Stamp | None, lengths: Lengths) -> None:
        """Keep the count of a file, unless the file has changed while it was counted."""
        if stamp is not None and stamp == stamp_of(path):
            key = self._key(digest_of(path).sha256)
            self._cache.keep(key, msgspec.json.encode(lengths))

    def _key(self, digest: str) -> str:
        return f"{_VERSION}\n{digest}\n{self._fingerprint}\n{self._seq_len}"

    @cached_property
    def _fingerprint(self) -> str:
        return self._tokenizer.fingerprint()  # reads tens of megabytes the first time

    def _job(self, file: DataFile, *, is_packed: bool) -> CountJob:
        return CountJob(
            path=file.path,
            tokenizer=self._tokenizer,
            seq_len=self._seq_len,
            packed=is_packed,
            slow=self._slow,
            texts_only=self._texts_only,
        )

    def _draw(self, file: DataFile, job: CountJob, wanted: int) -> _Estimate:
        """Estimate a file: mean tokens per byte of sampled rows, times the file size."""
        if not self._slow:
            self._note(compare(replace(job, draws=_CHECKED_ROWS)))
        sample = draw(replace(job, draws=wanted))
        variance = file.size**2 * statistics.variance(sample.shares) / len(sample.shares)
        return _Estimate(
            sample.lengths,
            file.size * statistics.fmean(sample.shares),
            file.rows,
            # Never zero, so that a sample of equal rows is not reported as exact.
            max(variance, 1e-9),
            sample.at_least,
        )

    def _note(self, check: CountCheck) -> None:
        if check.difference:
            raise _Mismatch(check.difference)
        if check.omitted:
            note = f"Counts were not verified with mistral-common: {check.omitted}."
            if note not in self._notes:
                self._notes.append(note)

    def _count_complete(
        self, complete: Sequence[tuple[int, CountJob]]
    ) -> Iterator[tuple[int, Lengths]]:
        """Count files completely, in parts distributed over processes."""
        jobs = [(number, job) for number, each in complete for job in self._parts(number, each)]
        size = sum(self._files[number].size for number, _ in complete)
        results = run_parallel(_TASK, [job for _, job in jobs], processes=self._workers(size))
        lengths, lines = Lengths(), 0
        meter: Meter | None = None
        for position, ((number, job), result) in enumerate(zip(jobs, results, strict=True)):
            file = self._files[number]
            if meter is None:
                meter = Meter(file.path, file.size, self._wishes.on_progress)
            if isinstance(result, CountCheck):
                self._note(result)
                continue
            part: PartCount = result
            lines += part.lines
            if part.failure:
                error = BadRow if part.lines else Uncountable
                raise error(f"{file.path}:{lines}: {part.failure}")
            lengths.merge(part.lengths)
            meter.reach(min(job.end, file.size))
            if position + 1 == len(jobs) or jobs[position + 1][0] != number:
                yield number, lengths
                lengths, lines, meter = Lengths(), 0, None

    def _parts(self, number: int, job: CountJob) -> Iterator[CountJob]:
        size = self._files[number].size
        if size and is_fast(self._tokenizer) and not self._slow:
            rows = max(8, _CHECKED_ROWS * size // self._size)
            yield replace(job, draws=rows)
        if job.packed:
            yield job
            return
        if self._size <= KEPT_BYTES:
            yield from _with_lines(job, size)
            return
        for start in range(0, size, _PART_BYTES):
            yield replace(job, start=start, end=start + _PART_BYTES)

    def _workers(self, size: int) -> int:
        if self._processes is not None:
            return self._processes
        slow = self._slow or not is_fast(self._tokenizer)
        return cpu_count() if size >= _PARALLEL_BYTES // (16 if slow else 1) else 1

    def total(self, estimates: Sequence[_Estimate]) -> TokenCount:
        """Return the sum of the estimates of some of the files."""
        lengths = Lengths()
        for estimate in estimates:
            lengths.merge(estimate.lengths)
        tokens = round(sum(each.tokens for each in estimates))
        margin = _Z95 * math.sqrt(sum(each.variance for each in estimates))
        interval = None
        if margin:
            least = sum(each.at_least or each.lengths.tokens for each in estimates)
            interval = max(least, math.floor(tokens - margin)), math.ceil(tokens + margin)
        if self._texts_only:
            what = f"between {interval[0]} and {interval[1]}" if interval else str(tokens)
            raise Uncountable(f"{UNKNOWN_LAYOUT}; the texts alone have {what} tokens")
        return TokenCount(
            data_tokens=tokens,
            basis="sampled" if interval else "exact",
            interval=interval,
            tokenizer=self._tokenizer.name,
            rows=sum(each.rows for each in estimates),
            sequences=round(sum(_sequences(each) for each in estimates)),
            shortest=lengths.shortest,
            longest=lengths.longest,
            histogram=lengths.histogram(),
            seq_len=self._seq_len,
            over=None if self._seq_len is None else round(lengths.over),
            notes=tuple(self._notes),
        )


def _with_lines(job: CountJob, size: int) -> Iterator[CountJob]:
    """Yield the parts of a small file with their lines, so that no process reads it again."""
    with open_data(job.path) as file:
        start = 0
        while True:
            lines = b"".join(file.readlines(_PART_BYTES))
            end = start + len(lines)
            yield replace(job, start=start, end=end, lines=lines)
            if end >= size or not lines:
                return
            start = end


def _sequences(estimate: _Estimate) -> float:
    lengths = estimate.lengths
    return lengths.sequences / lengths.rows * estimate.rows if lengths.rows else 0


def _exactly(lengths: Lengths) -> _Estimate:
    return _Estimate(lengths, lengths.tokens, round(lengths.rows))


def _share(sample: int | None, size: int, total: int) -> int:
    """Return how many rows to sample from a file; 0 for all."""
    return 0 if sample is None else max(_LEAST_ROWS, sample * size // max(1, total))


def _is_packed(file: DataFile) -> bool:
    """Return whether a file is compressed; check that it has not changed.

    Raises:
        Uncountable: The file is standard input, or has changed since it was inspected.
    """
    if file.path == STDIN:
        raise Uncountable("standard input cannot be read twice")
    with open_data(file.path) as opened:
        if opened.seek(0, 2) != file.size:
            raise Uncountable(f"{file.path} has changed since it was inspected")
        opened.seek(0)
        return kind_of(opened.read(4)) != "plain"
