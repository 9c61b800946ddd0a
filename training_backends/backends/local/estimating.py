"""Count exactly what a run of the built-in model will read, and how long such runs took."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.dataset import Dataset
from training_backends.core.estimate import Estimate, Money, PriceSource
from training_backends.core.run import utc_now
from training_backends.datasets.chat import byte_encode, parse_row
from training_backends.rundir.directory import RunDir, RunSpec, rows_per_epoch

__all__ = ["estimate_run"]

_FREE: Final = Money.model_validate("0 USD")
_RUNS_LOOKED_AT: Final = 20


@dataclass(frozen=True, slots=True)
class _FileCount:
    rows: int
    tokens: int


def estimate_run(spec: RunSpec, dataset: Dataset, runs: Path, notes: tuple[str, ...]) -> Estimate:
    """Say what a run will take; blocks while it reads the training files.

    Args:
        runs: Directory of earlier runs, whose speed is the only source of a duration.
        notes: What else to tell.
    """
    free = PriceSource(name="nothing is billed on this machine", as_of=utc_now().date())
    if spec.model != TINY_MODEL:
        rows = tuple(file.rows for file in dataset.train)
        notes += (
            f"Tokens are counted once {spec.model} is loaded, so they are not known yet.",
            "The duration depends on the tokens, so it is not known yet.",
        )
        return Estimate(steps=spec.total_steps(rows), cost=_FREE, price_source=free, notes=notes)
    counts = [_count(source.path, spec.seq_len) for source in spec.train]
    steps = spec.total_steps(tuple(count.rows for count in counts))
    trained = round(_mean_tokens(spec, counts) * steps * spec.batch_size)
    notes += ("train_tokens is the mean over the orders in which rows may come.",)
    duration, basis = _duration(spec, trained, runs)
    return Estimate(
        train_tokens=trained,
        data_tokens=sum(count.tokens for count in counts),
        steps=steps,
        cost=_FREE,
        price_source=free,
        duration=duration,
        basis="exact",
        notes=(*notes, basis),
    )


def _count(path: Path, seq_len: int) -> _FileCount:
    """Count the rows and tokens that the engine will train on, by the engine's rules."""
    rows = tokens = 0
    for line in _lines(path):
        try:
            ids, trained = byte_encode(parse_row(line))
        except msgspec.DecodeError:
            continue  # `datasets.inspect` tells of it
        if any(trained[1:seq_len]):
            rows += 1
            tokens += min(len(ids), seq_len)
    return _FileCount(rows, tokens)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if content.strip():
                yield content


def _mean_tokens(spec: RunSpec, counts: list[_FileCount]) -> float:
    """Return the tokens of a row, mean over an epoch."""
    weights = tuple(source.weight for source in spec.train)
    seen = rows_per_epoch(tuple(count.rows for count in counts), weights)
    tokens = sum(
        count.tokens / count.rows * times
        for count, times in zip(counts, seen, strict=True)
        if count.rows
    )
    return tokens / sum(seen) if sum(seen) else 0.0


def _duration(spec: RunSpec, tokens: int, runs: Path) -> tuple[timedelta | None, str]:
    for path in _newest(runs):
        speed = _tokens_a_second(RunDir(path), spec.model)
        if speed:
            basis = f"The duration rests on run {path.name}: {speed:.0f} tokens a second."
            return timedelta(seconds=tokens / speed), basis
    return None, "No run of this model has been measured here, so the duration is not known."


def _newest(runs: Path) -> list[Path]:
    found = [path for path in runs.glob("*/exit.json") if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in found[:_RUNS_LOOKED_AT]]


def _tokens_a_second(run: RunDir, model: str) -> float | None:
    record = run.read_exit()
    if record is None or record.status != "completed":
        return None
    try:
        if run.read_spec().model != model:
            return None
    except ValueError:
        return None  # written by another version
    started = next(
        (e for e, _ in run.read_events() if e.name == "status" and e.data["status"] == "running"),
        None,
    )
    rows = run.read_newest_metrics()
    if started is None or started.data.get("step") or not rows:
        return None  # a continued run holds a pause
    seconds = (rows[-1].at - started.at).total_seconds()
    return rows[-1].tokens / seconds if seconds > 0 else None
