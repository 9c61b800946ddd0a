"""What the reference model makes of preference pairs: computed once, kept with checkpoints."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from training_backends.trainer.distributed import Team
from training_backends.trainer.errors import EngineError, Stopped
from training_backends.trainer.evaluating import evaluating
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.objectives.preference import Pair, PreferenceObjective

__all__ = ["References"]

_FILE: Final = "references.safetensors"


class References:
    """Completes pairs, in the lists that it is given, with what the reference makes of them."""

    def __init__(self, **pairs: list[Pair]) -> None:
        self._pairs = pairs

    def compute(
        self,
        objective: PreferenceObjective,
        model: Any,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        *,
        team: Team,
        should_stop: Callable[[], bool],
    ) -> None:
        """Ask the model, which is the reference as long as it is not trained.

        Raises:
            Stopped: `should_stop`, asked between batches, said so.
        """
        for pairs in self._pairs.values():
            ours = team.share(pairs)
            found: list[float] = []
            while len(found) < len(ours):
                if should_stop():
                    raise Stopped

                def work(size: int, left: Sequence[Pair] = ours[len(found) :]) -> list[float]:
                    batch = objective.collate(left[:size])
                    there = {name: value.to(model.device) for name, value in batch.items()}
                    with evaluating(model), precision:
                        margins: list[float] = objective.margins(model, there).tolist()
                    return margins

                found += micro.attempt(work)
            margins = team.join(team.gather(found))
            pairs[:] = [replace(p, reference=m) for p, m in zip(pairs, margins, strict=True)]

    def save(self, directory: Path) -> None:
        """Write them into a checkpoint."""
        margins = {
            name: torch.tensor([pair.reference for pair in pairs])
            for name, pairs in self._pairs.items()
        }
        save_file(margins, directory / _FILE)

    def load(self, directory: Path) -> None:
        """Take them from a checkpoint.

        Raises:
            EngineError: It was made of other data.
        """
        margins = load_file(directory / _FILE)
        for name, pairs in self._pairs.items():
            if len(margins[name]) != len(pairs):
                raise EngineError(
                    f"The checkpoint {directory.name} was made of {len(margins[name])} pairs, and "
                    f"now there are {len(pairs)}: the data has changed since. Put it back, or "
                    "begin a new run."
                )
            pairs[:] = [
                replace(pair, reference=margin)
                for pair, margin in zip(pairs, margins[name].tolist(), strict=True)
            ]
