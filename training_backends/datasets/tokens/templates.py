"""Count rows with a model's own tokenizer and chat template, by transformers."""

from pathlib import Path
from typing import Any

import msgspec

from training_backends.datasets.chat import ChatRow, TextRow
from training_backends.datasets.tokens.errors import Uncountable
from training_backends.datasets.tokens.images import refuse_images

__all__ = ["TemplateCounter"]


class TemplateCounter:
    """Counts as the engine reads rows: text never becomes a control token."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer in the directory of a model.

        Raises:
            Uncountable: That does not work here.
        """
        try:
            from transformers import AutoTokenizer  # noqa: PLC0415  # loads for seconds
        except ImportError as error:
            reason = "counting needs transformers: pip install 'training-backends[local]'"
            raise Uncountable(reason) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # files of strangers: anything can be wrong with them
            first = str(error).partition("\n")[0]
            raise Uncountable(f"the tokenizer cannot be loaded: {first}") from error
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._special = sorted(special | {*self._tokenizer.all_special_tokens})

    def text(self, text: str) -> int:
        """Count one text on its own."""
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return len(encoded.input_ids)

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: The template refuses it, or there is none.
        """
        refuse_images(row)
        if isinstance(row, TextRow):
            return self.text(row.text) + 1 + (self._tokenizer.bos_token_id is not None)
        if self._tokenizer.chat_template is None:
            raise Uncountable("the tokenizer has no chat template")
        content = msgspec.json.encode(row).decode()
        for special in self._special:
            if msgspec.json.encode(special).decode()[1:-1] in content:
                raise Uncountable(f"the text holds {special}, which is a control token here")
        try:
            ids = self._tokenizer.apply_chat_template(
                _messages(row),
                tools=msgspec.to_builtins(row.tools) if row.tools else None,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # templates raise what they like
            first = str(error).partition("\n")[0]
            raise Uncountable(f"the chat template refuses the row: {first}") from error
        return len(ids)


def _messages(row: ChatRow) -> list[dict[str, Any]]:
    messages = []
    for message in row.messages:
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        messages.append(plain)
    return messages
