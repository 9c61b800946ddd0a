"""The directory that drives one training process and tells what it does.

The only thing that a parent and its training child share: both sides, a backend and the
engine, read and write it the same way and may not import each other. POSIX only (`flock`).

    spec.json       what to train; written by the parent before the child starts
    lock            held by the child for as long as it lives; holds its process id, boot id,
                    pid namespace and start time, see `core.files.signal_holder`
    events.jsonl    append-only: status changes, samples, checkpoints, messages
    metrics.jsonl   append-only: one row a logged step
    checkpoints/step-N/   complete when it has its name; `state.json` lists the files
    result/         the finished model
    exit.json       how it ended; no exit.json and a free lock: it crashed
    log.txt         the child's stdout and stderr
    stop            asks the child to save a checkpoint and end
"""

import os
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training_backends.core.config import ClassifierTarget, DataSource, Tuning
from training_backends.core.files import (
    append_line,
    is_locked,
    make_private_directory,
    read_lines,
    signal_holder,
    write_atomic,
)
from training_backends.core.run import Failure, UtcDatetime, utc_now

__all__ = [
    "ON_STDIN",
    "CheckpointState",
    "Event",
    "ExitCode",
    "ExitRecord",
    "MetricsRow",
    "ResultRecord",
    "RunDir",
    "RunSpec",
    "rows_per_epoch",
]

ON_STDIN: Final = "HF_TOKEN_ON_STDIN"
"""Environment variable that is set if the first line of standard input is the token."""


Row = TypeVar("Row", bound=BaseModel)

_TAIL_BYTES: Final = 16 * 1024
"""About a hundred rows of metrics."""


class ExitCode(IntEnum):
    """How a training process ends."""

    DONE = 0
    CRASHED = 1
    STOPPED = 3
    """Stopped on request; the same command continues."""
    BAD_INPUT = 4
    """The spec or the data cannot be used."""
    ALREADY_ACTIVE = 5
    """Another process holds the directory's lock."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSpec(_Record):
    """What to train, complete: every default is settled by whoever writes it.

    Attributes:
        classifier_targets: What a classifier decides; empty for the other methods.
        train: Weights are relative: a row of a file with weight 2 is seen twice as often
            as one of a file with weight 1; an epoch has as many rows as all files together.
        batch_size: Rows an optimizer step; sequences of up to `seq_len` tokens with `packing`.
        micro_batch_size: Rows in memory at a time, as long as they fit; divides `batch_size`.
        num_processes: How many share the rows of each step, each on a GPU of its own.
        seq_len: Tokens of a row that are used; the rest is cut off.
        fim_ratio: Share of texts whose middle is learnt from both its ends.
        packing: Put several rows into a sequence, none of which sees another.
        dpo_beta: What it costs to leave the reference, for preference pairs.
        dpo_label_smoothing: Share of pairs that are taken to be the wrong way round.
        dtype: What is computed in; weights that are trained are kept in float32 all the same.
        attention: Implementation of it in transformers; auto leaves the choice there.
        kernels: auto takes those of liger-kernel on a GPU, where it is installed.
        gradient_checkpointing: Compute twice to save memory; None: on a GPU.
        result: What an adapter is saved as.
        checkpoint_every: Steps between checkpoints; None for a tenth of the run, 10 at least.
        keep_checkpoints: How many of the newest stay on disk.
        max_invalid_fraction: Share of rows that may be unusable before the run is refused.
        sample_prompt: Asked before the first and after the last step.
        sample_max_tokens: Longest answer to it.
        slots_dir: Where processes agree on who may train; None for no limit.
        slots: How many may train at once; None: one a GPU, or one where there is none.
        priority: A higher one is trained first; among equals, who came first.
    """

    version: Literal[1] = 1
    run_id: str
    model: str
    method: Literal["sft", "dpo", "classifier"] = "sft"
    classifier_targets: tuple[ClassifierTarget, ...] = ()
    tuning: Tuning = Tuning(kind="lora")
    train: tuple[DataSource, ...] = Field(min_length=1)
    validation: tuple[DataSource, ...] = ()
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    epochs: float | None = Field(default=None, gt=0)
    training_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    num_processes: int = Field(default=1, ge=1)
    seq_len: int = Field(default=2048, ge=16)
    fim_ratio: float | None = Field(default=None, ge=0, le=1)
    packing: bool = False
    dpo_beta: float = Field(default=0.1, gt=0)
    dpo_label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    kernels: Literal["auto", "none"] = "auto"
    gradient_checkpointing: bool | None = None
    result: Literal["adapter", "merged", "both"] = "adapter"
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    max_invalid_fraction: float = Field(default=0.0, ge=0, le=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sample_prompt: str | None = None
    sample_max_tokens: int = Field(default=64, ge=1)
    slots_dir: Path | None = None
    slots: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-100, le=100)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.training_steps is None):
            raise ValueError("give either epochs or training_steps")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("micro_batch_size must divide batch_size")
        if self.num_processes > self.batch_size:
            raise ValueError("num_processes must not be more than batch_size")
        return self

    def total_steps(self, rows: tuple[int, ...]) -> int:
        """Return the optimizer steps of the run, given each training file's usable rows."""
        if self.training_steps is not None:
            return self.training_steps
        return max(1, -(-self.rows_seen(rows) // self.batch_size))

    def rows_seen(self, rows: tuple[int, ...]) -> int:
        """Return how many rows the run's epochs have, given each training file's usable rows."""
        seen = (self.epochs or 1.0) * sum(self.epoch_rows(rows))
        # A product such as 0.1 * 30 must not give one row more for its rounding error.
        return -int(-(seen - 1e-6) // 1)

    def epoch_rows(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many rows of each training file one epoch has, given its usable rows."""
        return rows_per_epoch(rows, tuple(source.weight for source in self.train))


def rows_per_epoch(rows: tuple[int, ...], weights: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many rows of each file one epoch has; equal weights give every row once."""
    weighted = sum(count * weight for count, weight in zip(rows, weights, strict=True))
    if not weighted:
        return tuple(0 for _ in rows)
    scale = sum(rows) / weighted
    return tuple(round(count * weight * scale) for count, weight in zip(rows, weights, strict=True))


class Event(_Record):
    """One thing that happened: `status`, `sample`, `checkpoint`, `message` and so on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: UtcDatetime = Field(default_factory=utc_now)
    name: str
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str = ""
    step: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class MetricsRow(_Record):
    """What was measured at one step; the last row of a step counts.

    Attributes:
        train_loss: Nats a trained token, mean since the row before.
        valid_loss: Nats a trained token over the whole validation set.
        valid_mean_token_accuracy: Share of its trained tokens predicted right, 0 to 1; of a
            classifier's decisions.
        tokens: Tokens read since the first step.
        tokens_per_second: Mean since the row before, validation and checkpoints left out.
        memory_bytes: Most memory held so far: of the GPU by tensors, else by the process itself.
        more: Further measures by name, such as `valid_loss/topic` of a classifier's target.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: UtcDatetime = Field(default_factory=utc_now)
    step: int
    total_steps: int
    epoch: float
    train_loss: float
    learning_rate: float
    grad_norm: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    more: dict[str, float] = Field(default_factory=dict)

    def measures(self) -> dict[str, float]:
        """Return what was measured, by name."""
        values = self.model_dump(exclude={"at", "step", "total_steps", "more"}, exclude_none=True)
        return {name: float(value) for name, value in values.items()} | self.more


class CheckpointState(_Record):
    """`state.json` of a checkpoint.

    Attributes:
        files: Size in bytes of every other file in it.
        checksums: CRC-32 of each, see `rundir.checkpoints`.
        scheduled: Whether its step was due; one saved for a stop is not.
    """

    step: int
    at: UtcDatetime = Field(default_factory=utc_now)
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, int]
    checksums: dict[str, int] = Field(default_factory=dict)
    scheduled: bool = True


class ResultRecord(_Record):
    """The finished model.

    Attributes:
        path: Relative to the run directory.
        format: A whole model, or an adapter for `base_model`.
        adapter: Where the adapter lies by itself, beside the model it was merged into.
    """

    path: str
    format: Literal["full", "adapter"]
    base_model: str
    adapter: str | None = None


class ExitRecord(_Record):
    """How the process ended (`exit.json`)."""

    status: Literal["completed", "stopped", "failed"]
    code: int
    at: UtcDatetime = Field(default_factory=utc_now)
    step: int = 0
    failure: Failure | None = None
    result: ResultRecord | None = None


class RunDir:
    """One run directory; cheap to make, reads nothing until asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "spec.json"
        self.lock = path / "lock"
        self.events = path / "events.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result"
        self.exit = path / "exit.json"
        self.log = path / "log.txt"
        self.stop = path / "stop"

    def write_spec(self, spec: RunSpec) -> None:
        """Create the directory and write its spec, whole or not at all."""
        make_private_directory(self.path)
        write_atomic(self.spec, spec.model_dump_json(indent=2))

    def read_spec(self) -> RunSpec:
        """Read what to train.

        Raises:
            ValueError: It is not there, not readable or not valid.
        """
        try:
            return RunSpec.model_validate_json(self.spec.read_bytes())
        except OSError as error:
            raise ValueError(f"{self.spec.name} cannot be read: {error.strerror}") from error

    def write_exit(self, record: ExitRecord) -> None:
        """Write how the process ended."""
        write_atomic(self.exit, record.model_dump_json(indent=2))

    def read_exit(self) -> ExitRecord | None:
        """Return how the process ended; None while it has not, or when it crashed."""
        try:
            return ExitRecord.model_validate_json(self.exit.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def is_active(self) -> bool:
        """Tell whether a training process lives here, whoever started it."""
        return is_locked(self.lock)

    def active_pid(self) -> int | None:
        """Return the id that the process here has in its own pid namespace, or None.

        It says nothing about which process has that id here: to signal it, use
        `signal_process`.
        """
        if not self.is_active():
            return None
        try:
            return int(self.lock.read_text(encoding="ascii").split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def signal_process(self, number: int) -> bool:
        """Send a signal to the process here; False unless it is certain which one that is."""
        return signal_holder(self.lock, number)

    def request_stop(self, *, save_checkpoint: bool = True) -> None:
        """Ask the process to end, with a checkpoint if wanted; safe to repeat."""
        write_atomic(self.stop, "save" if save_checkpoint else "discard")

    def add_event(self, event: Event) -> None:
        """Append to events.jsonl."""
        append_line(self.events, event.model_dump_json())

    def add_metrics(self, row: MetricsRow) -> None:
        """Append to metrics.jsonl."""
        append_line(self.metrics, row.model_dump_json(exclude_none=True))

    def read_events(self, offset: int = 0) -> list[tuple[Event, int]]:
        """Return the events behind byte `offset`, each with the offset behind it."""
        return _read_rows(self.events, Event, offset)

    def read_metrics(self, offset: int = 0) -> list[tuple[MetricsRow, int]]:
        """Return the metrics behind byte `offset`, each with the offset behind it."""
        return _read_rows(self.metrics, MetricsRow, offset)

    def read_newest_metrics(self) -> list[MetricsRow]:
        """Return the last rows, oldest first: about a hundred, however many there are."""
        offset = _tail_offset(self.metrics, _TAIL_BYTES)
        return [row for row, _ in _read_rows(self.metrics, MetricsRow, offset)]

    def read_checkpoints(self) -> list[tuple[Path, CheckpointState]]:
        """Return the complete checkpoints on disk, oldest step first."""
        found = [
            (path, state)
            for path in self.checkpoints.glob("step-*")
            if (state := _checkpoint_state(path)) is not None
        ]
        return sorted(found, key=lambda item: item[1].step)


def _checkpoint_state(path: Path) -> CheckpointState | None:
    try:
        state = CheckpointState.model_validate_json((path / "state.json").read_bytes())
        whole = all((path / name).stat().st_size == size for name, size in state.files.items())
    except (OSError, ValidationError):
        return None
    return state if whole else None


def _tail_offset(path: Path, length: int) -> int:
    """Return where the first line begins that lies wholly in the last `length` bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= length:
                return 0
            file.seek(size - length - 1)
            file.readline()
            return file.tell()
    except FileNotFoundError:
        return 0


def _read_rows(path: Path, model: type[Row], offset: int) -> list[tuple[Row, int]]:
    return [(row, end) for line, end in read_lines(path, offset) if (row := _parse(model, line))]


def _parse(model: type[Row], line: bytes) -> Row | None:
    try:
        return model.model_validate_json(line)
    except ValidationError:
        return None  # torn by a crash and closed by the next writer
