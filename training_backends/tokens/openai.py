"""Count conversations as OpenAI documents it for the data of a fine-tuning.

Three tokens a message, one for a name, three at the end, and the tokens of every value: OpenAI
Cookbook, "Data preparation and analysis for chat model fine-tuning" (2023-08-22, as of 2025).
How tools and images count there is not documented.
"""

from typing import Final

from training_backends.datasets.rows import ChatRow, TextRow
from training_backends.tokens.errors import Uncountable
from training_backends.tokens.images import refuse_images
from training_backends.tokens.text_counters import TextCount

__all__ = ["NOTE", "OpenAICounter", "encoding_count"]

NOTE: Final = "Counted by the rule of OpenAI's cookbook; what is billed may differ."

_PER_MESSAGE: Final = 3
_PER_NAME: Final = 1
_AT_THE_END: Final = 3


def encoding_count(name: str) -> TextCount:
    """Load an encoding that tiktoken has fetched before.

    Raises:
        Uncountable: It cannot be loaded.
    """
    try:
        from tiktoken import get_encoding  # noqa: PLC0415

        encode = get_encoding(name).encode_ordinary
    except Exception as error:  # what its HTTP library raises, where the stored file is damaged
        first = str(error).partition("\n")[0]
        raise Uncountable(f"tiktoken cannot load the encoding {name}: {first}") from error
    return lambda text: len(encode(text))


class OpenAICounter:
    """Counts by the words of an encoding and the rule above."""

    def __init__(self, count: TextCount) -> None:
        self.text = count

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: It holds what is not documented.
        """
        refuse_images(row)
        if isinstance(row, TextRow):
            return self.text(row.text)
        if row.tools or any(message.tool_calls for message in row.messages):
            raise Uncountable("how tools count is not documented by OpenAI")
        total = _AT_THE_END
        for message in row.messages:
            if message.role == "tool":
                raise Uncountable("how tools count is not documented by OpenAI")
            total += _PER_MESSAGE + self.text(message.role) + self.text(message.text)
            if message.name is not None:
                total += _PER_NAME + self.text(message.name)
        return total
