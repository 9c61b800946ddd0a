"""A backend for the command line's tests, whose jobs outlive a command."""

from typing import ClassVar, Self

import anyio.lowlevel

from training_backends import BackendContext, Reply, TrainingRun
from training_backends.core.run import Prompt
from training_backends.testing.backend import ScriptedBackend

__all__ = ["AnsweringBackend"]


class AnsweringBackend(ScriptedBackend):
    """Answers with what a test has set, by prompt; all commands of a test share one."""

    name: ClassVar[str] = "answering"
    shared: ClassVar["AnsweringBackend"]

    def __init__(self) -> None:
        super().__init__()
        self.replies: dict[str, Reply] = {}

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Return the one of this test."""
        del context
        assert isinstance(cls.shared, cls)
        return cls.shared

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Return the answer to a prompt; of a conversation, to its messages in one line each."""
        del run, max_tokens
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{each['role']}: {each['content']}" for each in prompt)
        for _ in range(20 - len(prompt)):  # longer prompts are answered first
            await anyio.lowlevel.checkpoint()
        return self.replies[prompt]

    async def aclose(self) -> None:
        """Stay open for the next command."""
