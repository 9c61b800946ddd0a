"""Ask mistral-common itself, which is right by definition and slow."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from training_backends.datasets.rows import ChatRow, Message, TextRow
from training_backends.tokens.errors import Uncountable
from training_backends.tokens.images import refuse_distant_images
from training_backends.tokens.text_counters import missing

__all__ = ["Reference", "load_reference"]


class Reference:
    """Counts rows with mistral-common, in its mode for fine-tuning."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer file, which costs about a second.

        Raises:
            Uncountable: A package is not installed, or the file is of no version it knows.
        """
        try:
            from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415
            from mistral_common.protocol.instruct.request import (  # noqa: PLC0415
                ChatCompletionRequest,
            )
            from mistral_common.protocol.instruct.validator import (  # noqa: PLC0415
                ValidationMode,
            )
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

            self._tokenizer = MistralTokenizer.from_file(str(path), ValidationMode.finetuning)
        except ImportError as error:
            raise missing("mistral-common with sentencepiece") from error
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise Uncountable(f"mistral-common cannot read {path.name}: {first}") from error
        self._request = ChatCompletionRequest
        instruct = self._tokenizer.instruct_tokenizer
        if instruct.image_encoder is not None:
            instruct.image_encoder = _Sizes(instruct.image_encoder)
        # It also asserts, and raises what Python raises for bad values and deep nesting.
        self._refusals = (MistralCommonException, ValueError, AssertionError, RecursionError)

    def text(self, text: str) -> int:
        """Count one text on its own."""
        return len(self._encode(text, around=False))

    def row(self, row: ChatRow | TextRow) -> int:
        """Count a conversation or a text.

        Raises:
            Uncountable: It refuses the row.
        """
        refuse_distant_images(row)
        if isinstance(row, TextRow):
            return len(self._encode(row.text, around=True))
        try:
            request = self._request.model_validate(_request(row))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return len(self._tokenizer.encode_chat_completion(request).tokens)
        except self._refusals as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise Uncountable(f"mistral-common refuses the row: {why}") from error

    def _encode(self, text: str, *, around: bool) -> Sequence[int]:
        tokens: Sequence[int]
        tokens = self._tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=around, eos=around)
        return tokens


class _Sizes:
    """Mistral-common's tokens of an image, without the pixels, which take opencv to make."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, part: Any) -> Any:
        import numpy  # noqa: PLC0415, ICN001  # comes with it
        from mistral_common.tokens.tokenizers.image import (  # noqa: PLC0415
            ImageEncoding,
            image_from_chunk,
        )

        size = self._encoder._image_to_num_tokens  # noqa: SLF001  # there is no public way
        columns, rows = size(image_from_chunk(part))
        tokens = [self._encoder.special_ids.img] * (columns + 1) * rows
        return ImageEncoding(tokens, numpy.zeros((3, 1, 1)))


@lru_cache(maxsize=2)
def load_reference(path: Path) -> Reference:
    """Return mistral-common's tokenizer of a file; it is kept, because loading is slow."""
    return Reference(path)


def _request(row: ChatRow) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": [_message(message) for message in row.messages]}
    if row.tools:
        request["tools"] = [
            {
                "type": tool.type,
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": tool.function.parameters or {},
                },
            }
            for tool in row.tools
        ]
    return request


def _message(message: Message) -> dict[str, Any]:
    """Write a message as mistral-common takes it: without weight, which it refuses."""
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content
    if isinstance(content, list):
        # Keys that a part does not have must not be there as nulls.
        content = [
            {key: value for key, value in msgspec.to_builtins(part).items() if value is not None}
            for part in content
        ]
    written: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "type": call.type,
                "function": msgspec.to_builtins(call.function),
                **({"id": call.id} if call.id is not None else {}),
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        written["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            written["name"] = message.name
    return written
