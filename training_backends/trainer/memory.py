"""How many rows are in memory at a time: as many as fit."""

import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from training_backends.rundir.directory import RunSpec
from training_backends.trainer.errors import TrainerError, is_out_of_memory

__all__ = ["MicroBatch", "peak_memory", "what_would_fit"]

T = TypeVar("T")

_GIB: Final = 2**30
_BYTES_FULL: Final = 16
"""A weight trained in full: itself, its gradient and AdamW's two moments, 4 bytes each."""
_STATUS: Final = Path("/proc/self/status")
_PEAK: Final = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class MicroBatch:
    """A number of rows that is halved whenever memory runs out, for good.

    Args:
        size: Rows to begin with.
        on_halved: Told the new number.
        explain: Says what would fit where a single row does not.
    """

    def __init__(
        self, size: int, on_halved: Callable[[int], None], explain: Callable[[], str]
    ) -> None:
        self.size = size
        self._on_halved = on_halved
        self._explain = explain

    def attempt(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """Return what `work` makes with this many rows at a time, repeated until they fit.

        Args:
            undo: Takes back what a failed attempt left.

        Raises:
            TrainerError: A single row does not fit.
        """
        while True:
            failure = ""
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error).strip().partition("\n")[0]
            # Out here the error is gone, and with it the tensors that its traceback held.
            undo()
            _free()
            if self.size == 1:
                message = f"Out of memory with a single row at a time: {failure} {self._explain()}"
                raise TrainerError(message, kind="out_of_memory")
            self.size //= 2
            self._on_halved(self.size)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: of the GPU by tensors, else by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss where it can be helped: a process takes over that of whoever started it.
    if _STATUS.is_file() and (found := _PEAK.search(_STATUS.read_text(encoding="ascii"))):
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def what_would_fit(spec: RunSpec, model: Any, device: torch.device, *, checkpointing: bool) -> str:
    """Say what to change so that a run which did not fit may fit."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    advice = []
    if spec.tuning.kind == "full":
        advice.append(
            f"tuning: lora (training all {weights:,} weights holds "
            f"{weights * _BYTES_FULL / _GIB:.1f} GiB beside the rows, an adapter about "
            f"{held / _GIB:.1f} GiB)"
        )
    elif spec.tuning.kind == "lora" and device.type == "cuda":
        advice.append(f"tuning: qlora (the base then takes {weights * 0.6 / _GIB:.1f} GiB)")
    if not checkpointing:
        advice.append("options.gradient_checkpointing: true")
    advice.append(f"seq_len: {max(100, spec.seq_len // 2)} or less (now {spec.seq_len})")
    return f"What would help: {'; '.join(advice)}; or a smaller model."
