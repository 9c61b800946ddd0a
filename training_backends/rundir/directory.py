"""The directory that controls one training process and records what it does.

It is the only interface between a parent and its training process: the local backend and the
trainer both use it and do not import each other. POSIX only (`flock`).

    spec.json       what to train; written by the parent before the process starts
    lock            locked while the process lives; contains its process id, boot id, pid
                    namespace and start time, see `core.files.signal_holder`
    events.jsonl    append-only: status changes, samples, checkpoints, messages
    metrics.jsonl   append-only: one row per logged step
    tokens/train-0/   the encoded rows of the first training file, see `trainer.encode`; removed
                    when the run completes
    checkpoints/step-N/   gets its name once complete; `state.json` lists the files; its
                    `optimizer/` is removed when the run completes
    result/         the trained model
    exit.json       how the process ended; missing while the lock is free: it crashed
    .processes/     what several processes of a run report to the one that started them
    trackers.txt    output of the process that reports the run; see `trainer.tracking`
    log.txt         stdout and stderr of the process
    reserve         space for exit.json on a full disk; exists while the process trains
    stop            asks the process to save a checkpoint and exit; or to suspend the run, which
                    then continues in a new process, as a queued run whose process has died
"""

import json
import os
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from training_backends.core.config import ChatTemplate, ClassifierTarget, DataSource, Tuning
from training_backends.core.files import (
    append_line,
    is_locked,
    make_private_directory,
    read_lines,
    signal_holder,
    write_atomic,
)
from training_backends.core.integrations import Integration
from training_backends.core.run import Failure, UtcDatetime, utc_now

__all__ = [
    "ADAPTER_CONFIG",
    "DEQUANTIZED",
    "CheckpointState",
    "Event",
    "ExitRecord",
    "MetricsRow",
    "ResultRecord",
    "RunDir",
    "RunSpec",
    "TrainerExitCode",
    "adapter_base",
    "rows_per_epoch",
]


Row = TypeVar("Row", bound=BaseModel)

_RESERVED: Final = 64 * 1024
"""Bytes; enough for exit.json, its temporary file and an event."""
_TAIL_BYTES: Final = 16 * 1024
"""About a hundred rows of metrics."""


class TrainerExitCode(IntEnum):
    """How a training process ends."""

    DONE = 0
    CRASHED = 1
    STOPPED = 3
    """Stopped on request; run the same command to continue."""
    BAD_INPUT = 4
    """The spec or the data cannot be used."""
    ALREADY_ACTIVE = 5
    """Another process holds the directory's lock."""


class _Record(BaseModel, frozen=True, extra="forbid"):
    """A record of the directory."""


class RunSpec(_Record):
    """What to train, with every default resolved by the writer.

    Attributes:
        classifier_targets: Targets of a classifier; empty for other methods.
        train: Weights are relative: rows of a file with weight 2 are seen twice as often as those
            of a file with weight 1. An epoch has as many rows as all files together.
        batch_size: Rows per optimizer step; with `packing`, sequences of up to `seq_len` tokens.
        micro_batch_size: Rows per forward pass, reduced if they do not fit; divides `batch_size`.
        num_processes: Processes that share each step's rows, each on its own GPU.
        sharding: What the processes divide among them: gradients and optimizer state (zero2), or
            also the weights (zero3); auto depends on the GPU's memory.
        seq_len: Maximum tokens per row; longer rows are truncated.
        fim_ratio: Fraction of texts that are trained with fill-in-the-middle.
        packing: Pack several rows into one sequence, isolated from each other.
        dpo_beta: KL penalty towards the reference model.
        dpo_label_smoothing: Assumed fraction of mislabelled pairs.
        dtype: Compute dtype; trained weights are kept in float32 in any case.
        attention: Attention implementation in transformers; auto leaves the choice to it.
        kernels: auto uses liger-kernel on a GPU, if installed.
        gradient_checkpointing: Recompute activations to save memory; None: on a GPU.
        chat_template: File and digest of the template that is used instead of the model's own.
        chat_template_text: Its text at launch.
        result: How to save an adapter.
        early_stopping_patience: Validations without a lower loss after which training stops.
        result_checkpoint: The trained model: the last state, or the checkpoint with the lowest
            validation loss.
        checkpoint_every: Steps between checkpoints; None: a tenth of the run, at least 10.
        keep_checkpoints: How many of the newest checkpoints to keep.
        max_invalid_fraction: Fraction of invalid rows up to which the run is not rejected.
        sample_prompt: Prompt that is answered before the first and after the last step.
        sample_max_tokens: Maximum length of the answer.
        integrations: Where the run is reported.
        slots_dir: Where processes coordinate their slots; None for no limit.
        slots: Maximum concurrent runs; None: one per GPU, or one without a GPU.
        priority: Higher priorities train first; equal ones in order of arrival.
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
    sharding: Literal["auto", "zero2", "zero3"] = "auto"
    seq_len: int = Field(default=2048, ge=16)
    fim_ratio: float | None = Field(default=None, ge=0, le=1)
    packing: bool = False
    dpo_beta: float = Field(default=0.1, gt=0)
    dpo_label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    kernels: Literal["auto", "none"] = "auto"
    gradient_checkpointing: bool | None = None
    chat_template: ChatTemplate | None = None
    chat_template_text: str | None = None
    result: Literal["adapter", "merged", "both"] = "adapter"
    early_stopping_patience: int | None = Field(default=None, ge=1)
    result_checkpoint: Literal["last", "best"] = "last"
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    max_invalid_fraction: float = Field(default=0.0, ge=0, le=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sample_prompt: str | None = None
    sample_max_tokens: int = Field(default=64, ge=1)
    integrations: tuple[Integration, ...] = ()
    slots_dir: Path | None = None
    slots: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-100, le=100)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.training_steps is None):
            raise ValueError("set either epochs or training_steps")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("micro_batch_size must divide batch_size")
        if self.num_processes > self.batch_size:
            raise ValueError("num_processes must not be more than batch_size")
        return self

    def total_steps(self, rows: tuple[int, ...]) -> int:
        """Return the run's optimizer steps, given each training file's usable rows."""
        if self.training_steps is not None:
            return self.training_steps
        return max(1, -(-self.rows_seen(rows) // self.batch_size))

    def rows_seen(self, rows: tuple[int, ...]) -> int:
        """Return the rows in all epochs, given each training file's usable rows."""
        seen = (self.epochs or 1.0) * sum(self.epoch_rows(rows))
        # The rounding error of a product such as 0.1 * 30 must not add a row.
        return -int(-(seen - 1e-6) // 1)

    def epoch_rows(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Return each training file's rows per epoch, given its usable rows."""
        return rows_per_epoch(rows, tuple(source.weight for source in self.train))


def rows_per_epoch(rows: tuple[int, ...], weights: tuple[float, ...]) -> tuple[int, ...]:
    """Return each file's rows per epoch; with equal weights, every row occurs once."""
    weighted = sum(count * weight for count, weight in zip(rows, weights, strict=True))
    if not weighted:
        return tuple(0 for _ in rows)
    scale = sum(rows) / weighted
    return tuple(round(count * weight * scale) for count, weight in zip(rows, weights, strict=True))


class Event(_Record, frozen=True, extra="ignore"):
    """An event of a run: `status`, `sample`, `checkpoint`, `message` and so on."""

    at: UtcDatetime = Field(default_factory=utc_now)
    name: str
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str = ""
    step: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class MetricsRow(_Record, frozen=True, extra="ignore"):
    """The metrics of one step; the last row of a step is the valid one.

    Attributes:
        train_loss: Nats per token in the loss, averaged since the previous row.
        valid_loss: Nats per token in the loss, over the whole validation set.
        valid_mean_token_accuracy: Fraction of the validation tokens in the loss predicted
            correctly, 0 to 1; of a classifier's labels.
        tokens: Tokens read since the first step.
        tokens_per_second: Average since the previous row, excluding validation and checkpoints.
        memory_bytes: Peak memory: of the GPU's tensors, or of the process on a CPU.
        more: Further metrics by name, such as `valid_loss/topic` of a classifier's target.
    """

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
        """Return the metrics by name."""
        values = self.model_dump(exclude={"at", "step", "total_steps", "more"}, exclude_none=True)
        return {name: float(value) for name, value in values.items()} | self.more


class CheckpointState(_Record):
    """`state.json` of a checkpoint.

    Attributes:
        files: Size in bytes of every other file in it.
        checksums: CRC-32 of each, see `rundir.checkpoints`.
        scheduled: Whether the checkpoint was due; one saved for a stop is not.
    """

    step: int
    at: UtcDatetime = Field(default_factory=utc_now)
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, int]
    checksums: dict[str, int] = Field(default_factory=dict)
    scheduled: bool = True


class ResultRecord(_Record):
    """The trained model.

    Attributes:
        path: Relative to the run directory.
        format: A full model, or an adapter for `base_model`.
        adapter: Path of the separate adapter, if it was also merged into the model.
        step: Step of the checkpoint that it is, if that is not the run's last state.
    """

    path: str
    format: Literal["full", "adapter"]
    base_model: str
    adapter: str | None = None
    step: int | None = None


class ExitRecord(_Record):
    """How the process ended (`exit.json`)."""

    status: Literal["completed", "stopped", "failed"]
    code: int
    at: UtcDatetime = Field(default_factory=utc_now)
    step: int = 0
    failure: Failure | None = None
    result: ResultRecord | None = None


class RunDir:
    """A run directory; cheap to create, reads nothing until asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: Path = path / "spec.json"
        self.lock: Path = path / "lock"
        self.events: Path = path / "events.jsonl"
        self.metrics: Path = path / "metrics.jsonl"
        self.tokens: Path = path / "tokens"
        self.checkpoints: Path = path / "checkpoints"
        self.result: Path = path / "result"
        self.exit: Path = path / "exit.json"
        self.log: Path = path / "log.txt"
        self.trackers: Path = path / "trackers.txt"
        self.reserve: Path = path / "reserve"
        self.stop: Path = path / "stop"

    def write_spec(self, spec: RunSpec) -> None:
        """Create the directory and write its spec, atomically."""
        make_private_directory(self.path)
        write_atomic(self.spec, spec.model_dump_json(indent=2))

    def read_spec(self) -> RunSpec:
        """Read the spec.

        Raises:
            ValueError: It is missing, unreadable or invalid.
        """
        try:
            return RunSpec.model_validate_json(self.spec.read_bytes())
        except OSError as error:
            raise ValueError(f"{self.spec.name} cannot be read: {error.strerror}") from error

    def take_reserve(self) -> None:
        """Take some space, so that the end can be recorded on a disk that is full by then.

        Freed by deleting the file. Does nothing on a disk that is full already.
        """
        with suppress(OSError):
            self.reserve.write_bytes(os.urandom(_RESERVED))  # not zeros, which may take no space

    def write_exit(self, record: ExitRecord) -> None:
        """Write how the process ended."""
        write_atomic(self.exit, record.model_dump_json(indent=2))

    def read_exit(self) -> ExitRecord | None:
        """Return how the process ended; None if it is running or crashed."""
        try:
            return ExitRecord.model_validate_json(self.exit.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def is_active(self) -> bool:
        """Return whether a training process holds the lock, no matter who started it."""
        return is_locked(self.lock)

    def active_pid(self) -> int | None:
        """Return the process id in the process's own pid namespace, or None.

        The id may belong to another process in this namespace: to signal the process, use
        `signal_process`.
        """
        if not self.is_active():
            return None
        try:
            return int(self.lock.read_text(encoding="ascii").split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def signal_process(self, number: int) -> bool:
        """Signal the process; return False if it cannot be identified with certainty."""
        return signal_holder(self.lock, number)

    def request_stop(self, *, save_checkpoint: bool = True) -> None:
        """Ask the process to exit, with a checkpoint if wanted; safe to repeat."""
        write_atomic(self.stop, "save" if save_checkpoint else "discard")

    def request_suspension(self) -> None:
        """Ask the process to save a checkpoint and exit, to be restarted later; safe to repeat."""
        write_atomic(self.stop, "suspend")

    def is_stopping(self) -> bool:
        """Return whether the run was asked to end, which a suspended one was not."""
        return self._requested() not in {None, "suspend"}

    def is_suspended(self) -> bool:
        """Return whether its process was asked to exit and has not done so, maybe killed since."""
        return self._requested() == "suspend"

    def end_suspension(self) -> bool:
        """Withdraw the request, before a new process starts; return False if it was to stop."""
        aside = self.stop.with_name(".stop.taken")
        with suppress(FileNotFoundError):
            self.stop.replace(aside)
            if aside.read_text(encoding="ascii") != "suspend":
                aside.replace(self.stop)
                return False
            aside.unlink()
        return True

    def _requested(self) -> str | None:
        try:
            return self.stop.read_text(encoding="ascii")
        except FileNotFoundError:
            return None

    def add_event(self, event: Event) -> None:
        """Append to events.jsonl."""
        append_line(self.events, event.model_dump_json())

    def add_metrics(self, row: MetricsRow) -> None:
        """Append to metrics.jsonl."""
        append_line(self.metrics, row.model_dump_json(exclude_none=True))

    def read_events(self, offset: int = 0) -> list[tuple[Event, int]]:
        """Return the events after byte `offset`, each with its end offset."""
        return _read_rows(self.events, Event, offset)

    def read_metrics(self, offset: int = 0) -> list[tuple[MetricsRow, int]]:
        """Return the metrics after byte `offset`, each with its end offset."""
        return _read_rows(self.metrics, MetricsRow, offset)

    def read_newest_metrics(self) -> list[MetricsRow]:
        """Return the last rows, about a hundred, oldest first."""
        offset = _tail_offset(self.metrics, _TAIL_BYTES)
        return [row for row, _ in _read_rows(self.metrics, MetricsRow, offset)]

    def read_checkpoints(self) -> list[tuple[Path, CheckpointState]]:
        """Return the complete checkpoints on disk, in order of steps."""
        found = [
            (path, state)
            for path in self.checkpoints.glob("step-*")
            if (state := _checkpoint_state(path)) is not None
        ]
        return sorted(found, key=lambda item: item[1].step)


ADAPTER_CONFIG: Final = "adapter_config.json"
"""The file that makes a directory an adapter of peft."""

DEQUANTIZED: Final = frozenset({"fp8", "mxfp4"})
"""Quantization methods whose models are dequantized when they are loaded, and saved so."""


def adapter_base(directory: Path) -> str:
    """Return the base model of the adapter in `directory`: a name, or the path that its run used.

    Raises:
        ValueError: Its configuration cannot be read.
    """
    # An adapter names no local path; the run that it belongs to does.
    for run in map(RunDir, directory.absolute().parents[:2]):
        record = run.read_exit()
        if record and record.result:
            paths = {record.result.path, record.result.adapter}
            if directory.absolute().relative_to(run.path).as_posix() in paths:
                return record.result.base_model
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_bytes())
        return str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{ADAPTER_CONFIG} names no base model") from None


def _checkpoint_state(path: Path) -> CheckpointState | None:
    try:
        state = CheckpointState.model_validate_json((path / "state.json").read_bytes())
        complete = all((path / name).stat().st_size == size for name, size in state.files.items())
    except (OSError, ValidationError):
        return None
    return state if complete else None


def _tail_offset(path: Path, length: int) -> int:
    """Return the offset of the first complete line in the last `length` bytes."""
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
        return None  # truncated by a crash
