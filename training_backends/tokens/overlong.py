"""Warn about training rows that exceed the sequence length."""

from dataclasses import replace
from typing import Final, Literal

from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.core.escape import plural
from training_backends.tokens import count_tokens

__all__ = ["overlong_rows"]

COUNTED_BYTES: Final = 8_000_000
"""Up to this size all rows are counted, which takes a second or two."""
_SAMPLE_ROWS: Final = 500


def overlong_rows(
    dataset: Dataset,
    model: str,
    seq_len: int,
    *,
    fix: str,
    chat_template: str | None = None,
    unusable: Literal["error", "warning"] | None = None,
) -> Issue | None:
    """Return an issue if training rows are longer than `seq_len` tokens. Blocks.

    Takes a second or two at most, whatever the size of the data. A token has at least one byte, so
    nothing is counted if the longest row has at most `seq_len` bytes. Data above a few megabytes
    is sampled. If the tokens of the model cannot be counted, no issue is returned.

    Args:
        fix: Fix of the issue.
        chat_template: Jinja template that replaces the model's own.
        unusable: Severity of a row that cannot be counted, if training rejects such rows;
            None ignores it.
    """
    if all(file.summary.longest_row <= seq_len for file in dataset.train):
        return None
    is_small = sum(file.size for file in dataset.train) <= COUNTED_BYTES
    counting = replace(dataset.counting, sample=None if is_small else _SAMPLE_ROWS, exact=is_small)
    dataset = dataset.model_copy(update={"counting": counting})
    count = count_tokens(dataset, model, seq_len=seq_len, chat_template=chat_template)
    if count.bad_row and unusable:
        return Issue(
            code="unusable_row",
            message=f"a row cannot be used with this model: {count.reason}",
            fix="change or remove the row, or use another model",
            severity=unusable,
        )
    if not count.over:
        return None
    about = "about " if count.basis == "sampled" else ""
    verb = "is" if count.over == 1 else "are"
    return Issue(
        code="overlong_rows",
        message=f"{about}{count.over:,} of {plural(count.rows or 0, 'row')} {verb} longer than "
        f"{seq_len:,} tokens",
        field="hyperparameters.seq_len",
        fix=fix,
        severity="warning",
    )
