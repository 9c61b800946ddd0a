"""The command that asks a trained model."""

from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.session import JsonOption, RunArgument, complete_id, with_client

if TYPE_CHECKING:
    from training_backends import AsyncTrainingClient, Reply

__all__ = ["sample"]


def sample(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=32768, help="Longest answer.")
    ] = 64,
    json: JsonOption = False,
) -> None:
    """Ask the finished model of a run, on the machine where it was trained."""
    from training_backends.cli.views.render import console, show_text, write_json

    async def ask(client: "AsyncTrainingClient") -> "Reply":
        return await client.sample(await complete_id(client, run), prompt, max_tokens=max_tokens)

    said = with_client(ask)
    if json:
        write_json(said.model_dump(mode="json", exclude_none=True))
    elif said.answer is not None:
        show_text(said.answer, console())
    else:
        for target, labels in (said.labels or {}).items():
            likely = sorted(labels.items(), key=lambda label: -label[1])
            shares = ", ".join(f"{label} {share:.3f}" for label, share in likely)
            console().print(f"{target}: {shares}", markup=False)
