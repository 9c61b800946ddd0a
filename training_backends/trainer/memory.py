"""Choose how many rows fit into memory at a time."""

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
"""Bytes per weight in full fine-tuning: weight, gradient and AdamW's two moments in float32."""
_STATUS: Final = Path("/proc/self/status")
_PEAK: Final = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class MicroBatch:
    """The number of rows per forward pass, halved permanently whenever memory runs out.

    Args:
        size: Initial number of rows.
        on_halved: Called with the new number.
        explain: Returns advice for when a single row does not fit.
    """

    def __init__(
        self, size: int, on_halved: Callable[[int], None], explain: Callable[[], str]
    ) -> None:
        self.size: int = size
        self._on_halved = on_halved
        self._explain = explain

    def attempt(self, work: Callable[[int], T], undo: Callable[[], None] = lambda: None) -> T:
        """Call `work` with the number of rows, again with half of them until they fit.

        Args:
            undo: Reverts the effects of a failed attempt.

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
            # Outside the handler, the traceback no longer keeps the tensors alive.
            undo()
            _free()
            if self.size == 1:
                message = f"Out of memory even with one row at a time: {failure} {self._explain()}"
                raise TrainerError(message, kind="out_of_memory")
            self.size //= 2
            self._on_halved(self.size)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Preferred over ru_maxrss, which a process inherits from its parent.
    if _STATUS.is_file() and (found := _PEAK.search(_STATUS.read_text(encoding="ascii"))):
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def what_would_fit(spec: RunSpec, model: Any, device: torch.device, *, checkpointing: bool) -> str:
    """Suggest changes that would let a run fit into memory."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    advice = []
    if spec.tuning.kind == "full":
        advice.append(
            f"tuning: lora (full fine-tuning of {weights:,} weights needs "
            f"{weights * _BYTES_FULL / _GIB:.1f} GiB plus activations, an adapter about "
            f"{held / _GIB:.1f} GiB)"
        )
    elif spec.tuning.kind == "lora" and device.type == "cuda":
        advice.append(f"tuning: qlora (the base model then takes {weights * 0.6 / _GIB:.1f} GiB)")
    if not checkpointing:
        advice.append("options.gradient_checkpointing: true")
    advice.append(f"seq_len: {max(100, spec.seq_len // 2)} or less (now {spec.seq_len})")
    return f"Try {'; '.join(advice)}; or a smaller model."
