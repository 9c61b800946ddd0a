"""From one line of a file to the conversations or texts that training reads it as."""

import msgspec

from training_backends.datasets.rows import (
    ChatRow,
    ClassifierRow,
    PreferenceRow,
    TextRow,
    parse_any_row,
)
from training_backends.tokens.errors import Uncountable

__all__ = ["UNKNOWN_LAYOUT", "AnyRow", "Row", "has_images", "parts_of", "read_row", "texts_of"]

Row = ChatRow | TextRow
AnyRow = ChatRow | TextRow | ClassifierRow | PreferenceRow

UNKNOWN_LAYOUT = "how the service lays out the rows of a classifier is not known"


def read_row(line: bytes) -> AnyRow:
    """Decode a line.

    Raises:
        Uncountable: It holds no row.
    """
    try:
        return parse_any_row(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Uncountable("the row cannot be read") from None


def parts_of(row: AnyRow) -> tuple[Row, ...]:
    """Return what a row is read as: itself, or for a preference the pair of conversations.

    Raises:
        Uncountable: It is a classifier's.
    """
    if isinstance(row, ClassifierRow):
        raise Uncountable(UNKNOWN_LAYOUT)
    if isinstance(row, PreferenceRow):
        answers = (row.chosen, row.rejected)
        return tuple(ChatRow([*row.prompt, *answer], row.tools) for answer in answers)
    return (row,)


def texts_of(row: AnyRow) -> list[str]:
    """Return the texts in a row, of whatever format it is.

    Raises:
        Uncountable: It holds images.
    """
    texts: list[str] = []
    for part in (row.content,) if isinstance(row, ClassifierRow) else parts_of(row):
        if isinstance(part, TextRow):
            texts.append(part.text)
        elif has_images(part):
            raise Uncountable("images cannot be counted here")
        else:
            texts += [message.text for message in part.messages]
    return texts


def has_images(row: Row) -> bool:
    """Tell whether a row holds anything but text."""
    if isinstance(row, TextRow):
        return False
    return any(type(m.content) is list and m.has_other_parts for m in row.messages)
