"""A backend for the examples of the documentation, whose runs complete when they are observed."""

from pathlib import Path
from typing import ClassVar, Self

from training_backends import (
    BackendContext,
    Checkpoint,
    Journal,
    Reply,
    RunState,
    TrainingRun,
    TrainingStatus,
)
from training_backends.core.run import Prompt, utc_now
from training_backends.testing.backend import ScriptedBackend

__all__ = ["ExampleBackend"]


class ExampleBackend(ScriptedBackend):
    """All clients of a page share one; it accepts every configuration."""

    name: ClassVar[str] = "example"
    shared: ClassVar["ExampleBackend"]
    ends: TrainingStatus | None = TrainingStatus.COMPLETED
    """How the runs that are launched from now on end; None: they keep running."""

    def __init__(self) -> None:
        everything = {
            "methods": frozenset({"sft", "dpo", "classifier"}),
            "data": frozenset({"file", "uri", "remote"}),
            "chat_template": True,
            "resources": frozenset({"workers", "cpus", "gpus", "accelerator", "nodes"}),
            "downloads_checkpoints": True,
        }
        declared = ScriptedBackend().capabilities
        super().__init__(capabilities=declared.model_copy(update=everything))

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Return the one of this page."""
        del context
        assert isinstance(cls.shared, cls)
        return cls.shared

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Create a job that has trained already, and may have ended."""
        state = await super().launch(run, journal)
        job = str(state.remote_id)
        for step in (60, 120):
            values = dict.fromkeys(("valid_loss", "grad_norm", "tokens_per_second"), 1.0)
            self.measure(job, step, train_loss=2 - step / 100, **values)
        points = tuple(Checkpoint(step=step, at=utc_now()) for step in (60, 120))
        self.say(job, TrainingStatus.RUNNING, checkpoints=points, step=120, total_steps=120)
        if self.ends is TrainingStatus.COMPLETED:
            self.finish(job)
        elif self.ends is TrainingStatus.FAILED:
            self.fail(job)
        return state

    async def download_checkpoint(self, run: TrainingRun, checkpoint: str, target: Path) -> Path:
        """Write what `download` does."""
        assert checkpoint
        return await self.download(run, target)

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Answer as the sample data does."""
        del run, max_tokens
        return Reply(answer="Pong." if prompt == "Ping?" else "It is 6.")

    async def aclose(self) -> None:
        """Stay open for the next client."""
