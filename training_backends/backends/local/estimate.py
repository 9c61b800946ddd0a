"""Estimate the tokens, steps and duration of a local run."""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.dataset import Dataset
from training_backends.core.escape import plural
from training_backends.core.estimate import CostItem, Estimate, Money, PriceSource
from training_backends.core.run import utc_now
from training_backends.datasets.open_file import open_data
from training_backends.datasets.rows import byte_encode, parse_row
from training_backends.rundir.directory import RunDir, RunSpec
from training_backends.tokens import count_files
from training_backends.tokens.counts import SAMPLE_NOTE

__all__ = ["estimate_run"]

_FREE: Final = Money.model_validate("0 USD")
_RUNS_CONSIDERED: Final = 20


@dataclass(frozen=True, slots=True)
class _FileCount:
    """Counts of one training file.

    Attributes:
        interval: Confidence interval of the tokens, if they were sampled.
        over: Rows that will be truncated, but are counted in full in `tokens`.
    """

    rows: int
    tokens: int
    interval: tuple[int, int] | None = None
    over: int = 0


def estimate_run(spec: RunSpec, dataset: Dataset, runs: Path, notes: tuple[str, ...]) -> Estimate:
    """Estimate a run; blocks while it reads the training files.

    Args:
        runs: Directory of earlier runs, the only source for a duration.
        notes: Further notes to include.
    """
    source = PriceSource(name="local training is free", as_of=utc_now().date())
    costs = (CostItem(name="training", amount=_FREE, source=source),)
    counts = _counts(spec, dataset)
    if isinstance(counts, str):
        rows = tuple(file.rows for file in dataset.train)
        notes += (
            f"Token count unknown: {counts}.",
            "Duration unknown, because it depends on the tokens.",
        )
        steps, epochs = _steps(spec, rows)
        return Estimate(steps=steps, epochs=epochs, costs=costs, notes=notes)
    rows = tuple(count.rows for count in counts)
    steps, epochs = _steps(spec, rows)
    trained = _trained_tokens(spec, counts, steps)
    duration, basis = _duration(spec, trained, runs)
    return Estimate(
        train_tokens=trained,
        data_tokens=sum(count.tokens for count in counts),
        steps=steps,
        epochs=epochs,
        costs=costs,
        duration=duration,
        basis="sampled" if any(count.interval for count in counts) else "exact",
        interval=_interval(counts),
        notes=(*notes, *_count_notes(spec, counts), basis),
    )


def _counts(spec: RunSpec, dataset: Dataset) -> list[_FileCount] | str:
    """Count each training file; return the reason if that is not possible."""
    if spec.model == TINY_MODEL and spec.method == "sft":
        return [_count(source.local_path, spec.seq_len) for source in spec.train]
    found: list[_FileCount] = []
    counts = count_files(
        dataset, spec.model, seq_len=spec.seq_len, chat_template=spec.chat_template_text
    )
    for file, counted in zip(dataset.train, counts, strict=True):
        if counted.data_tokens is None:
            return counted.reason or "no tokenizer is available"
        rows = file.rows - file.bad_rows
        if spec.method == "sft" and counted.sequences and counted.rows:
            rows = round(rows * counted.sequences / counted.rows)
        found.append(
            _FileCount(
                rows,
                counted.data_tokens,
                counted.interval,
                counted.over or 0,
            )
        )
    return found


def _count(path: Path, seq_len: int) -> _FileCount:
    """Count the rows and tokens to train on, by the rules of the trainer."""
    rows = tokens = 0
    for line in _lines(path):
        try:
            ids, trained = byte_encode(parse_row(line))
        except msgspec.DecodeError:
            continue  # reported by `datasets.inspect`
        if any(trained[1:seq_len]):
            rows += 1
            tokens += min(len(ids), seq_len)
    return _FileCount(rows, tokens)


def _lines(path: Path) -> Iterator[bytes]:
    with open_data(path) as file:
        for number, line in enumerate(file):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if content.strip():
                yield content


def _steps(spec: RunSpec, rows: tuple[int, ...]) -> tuple[int | None, float | None]:
    """Return optimizer steps and epochs; None for the one that packing makes unknown."""
    if spec.packing:
        return spec.training_steps, spec.epochs
    steps = spec.total_steps(rows)
    epoch = sum(spec.epoch_rows(rows))
    seen = round(steps * spec.batch_size / epoch, 4) if epoch else None
    return steps, spec.epochs or seen


def _trained_tokens(spec: RunSpec, counts: Sequence[_FileCount], steps: int | None) -> int | None:
    seen = spec.epoch_rows(tuple(count.rows for count in counts))
    tokens = sum(
        count.tokens / count.rows * times
        for count, times in zip(counts, seen, strict=True)
        if count.rows
    )
    if spec.packing:
        return None if spec.epochs is None else math.ceil(tokens * spec.epochs)
    if steps is None or not any(seen):
        return None
    return round(tokens / sum(seen) * steps * spec.batch_size)


def _interval(counts: Sequence[_FileCount]) -> tuple[int, int] | None:
    """Return the confidence interval of the sum; the files' errors are independent."""
    if not any(count.interval for count in counts):
        return None
    tokens = sum(count.tokens for count in counts)
    margin = math.hypot(*(count.interval[1] - count.tokens for count in counts if count.interval))
    return max(0, math.floor(tokens - margin)), math.ceil(tokens + margin)


def _count_notes(spec: RunSpec, counts: Sequence[_FileCount]) -> Iterator[str]:
    if any(count.interval for count in counts):
        yield SAMPLE_NOTE
    if spec.packing:
        unknown = "Steps" if spec.training_steps is None else "Trained tokens and epochs"
        yield f"{unknown} unknown: they depend on how many rows are packed into each sequence."
    else:
        yield "The trained tokens are an average; the exact number depends on shuffling."
    if over := sum(count.over for count in counts):
        yield (
            f"{plural(over, 'row')} longer than seq_len ({spec.seq_len:,} tokens): truncated in "
            "training, but counted in full here."
        )


def _duration(spec: RunSpec, tokens: int | None, runs: Path) -> tuple[timedelta | None, str]:
    if tokens is None:
        return None, "Duration unknown, because it depends on the trained tokens."
    for path in _newest(runs):
        speed = _tokens_per_second(RunDir(path), spec)
        if speed:
            basis = f"Duration estimated from run {path.name} ({speed:,.0f} tokens/s)."
            return timedelta(seconds=tokens / speed), basis
    return None, "Duration unknown, because no similar run has completed on this machine."


def _newest(runs: Path) -> list[Path]:
    found = [path for path in runs.glob("*/exit.json") if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in found[:_RUNS_CONSIDERED]]


def _tokens_per_second(run: RunDir, spec: RunSpec) -> float | None:
    record = run.read_exit()
    if record is None or record.status != "completed":
        return None
    try:
        measured = run.read_spec()
    except ValueError:
        return None  # written by another version
    if not _is_alike(measured, spec):
        return None
    started = next(
        (e for e, _ in run.read_events() if e.name == "status" and e.data["status"] == "running"),
        None,
    )
    rows = run.read_newest_metrics()
    if started is None or started.data.get("step") or not rows:
        return None  # a resumed run includes a pause
    seconds = (rows[-1].at - started.at).total_seconds()
    return rows[-1].tokens / seconds if seconds > 0 else None


def _is_alike(one: RunSpec, other: RunSpec) -> bool:
    """Return whether two runs take about equally long per token."""

    def kind(spec: RunSpec) -> tuple[object, ...]:
        hardware = spec.device, spec.num_processes
        return spec.model, spec.method, spec.tuning.kind, hardware, spec.packing

    return kind(one) == kind(other)
