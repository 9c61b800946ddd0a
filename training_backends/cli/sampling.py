"""The command that asks a trained model."""

from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer

from training_backends.cli.session import JsonOption, RunArgument, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, TrainingRun

__all__ = ["sample"]


@runtime_checkable
class _Sampler(Protocol):
    """A backend that has the models which it trained at hand."""

    async def sample(self, run: "TrainingRun", prompt: str, *, max_tokens: int) -> dict[str, Any]:
        """Return `answer`, or the `labels` of a classifier."""
        ...


def sample(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=32768, help="Longest answer.")
    ] = 64,
    json: JsonOption = False,
) -> None:
    """Ask the finished model of a run, on the machine where it was trained."""
    from training_backends.cli.render import console, write_json

    async def ask(client: "AsyncTrainingClient") -> dict[str, Any]:
        found = await client.status(run)
        backend = client.backend(found.backend)
        if not isinstance(backend, _Sampler):
            raise backend.unsupported(
                "answer a prompt with the model of a run", "Ask the provider's own service."
            )
        return await backend.sample(found, prompt, max_tokens=max_tokens)

    said = with_client(ask)
    if json:
        write_json(said)
    elif "answer" in said:
        console().print(said["answer"], markup=False)
    else:
        for target, labels in said["labels"].items():
            likely = sorted(labels.items(), key=lambda label: -label[1])
            shares = ", ".join(f"{label} {share:.3f}" for label, share in likely)
            console().print(f"{target}: {shares}", markup=False)
