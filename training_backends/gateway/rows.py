"""Look at an uploaded file line by line before it is accepted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training_backends.datasets.dialects import MISTRAL
from training_backends.datasets.inspect import LineError, check_upload
from training_backends.gateway.errors import Refusal

__all__ = ["FileFacts", "read_facts"]

SHOWN_ERRORS = 20
"""Reading stops when so many lines are wrong."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What an accepted file holds."""

    num_lines: int | None
    sample_type: str


def read_facts(path: Path, purpose: str) -> FileFacts:
    """Check a training file, count the lines of a batch file, leave others alone.

    Blocking; reads a line at a time.

    Raises:
        Refusal: A training file has lines that cannot be trained on.
    """
    if purpose == "batch":
        return FileFacts(_count_lines(path), "batch_request")
    if purpose != "fine-tune":
        return FileFacts(None, "instruct")
    found = check_upload(path, dialect=MISTRAL, max_errors=SHOWN_ERRORS)
    if found.errors:
        raise _refusal(found.errors)
    # The protocol has no word of its own for classifier samples.
    sample_type = "pretrain" if found.sample_type == "pretrain" else "instruct"
    return FileFacts(found.num_lines, sample_type)


def _refusal(errors: Sequence[LineError]) -> Refusal:
    count = f"{'at least ' if len(errors) >= SHOWN_ERRORS else ''}{len(errors)}"
    noun = "error" if len(errors) == 1 else "errors"
    return Refusal(
        422,
        {
            "detail": "Invalid file format.",
            "description": f"Found {count} {noun} in this file. Each line is one JSON object "
            "with `messages` or `text`, and `labels` for a classifier.",
            "errors": [
                {
                    # The service's body has no place of its own for what to do.
                    "message": f"{error.message} ({error.fix})" if error.fix else error.message,
                    "line_number": error.line_number,
                }
                for error in errors
            ],
        },
    )


def _count_lines(path: Path) -> int:
    count = 0
    last = b"\n"
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            count += block.count(b"\n")
            last = block
    return count + (not last.endswith(b"\n"))
