"""Count the tokens of training files, exactly or with a stated interval, never by a guess.

`mistral-common` is imported only when a Mistral model is asked for: it costs half a second
and is an extra.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.dataset import DataFile, Dataset
from training_backends.datasets.chat import ChatRow, Message, TextRow, byte_token_count, parse_row
from training_backends.datasets.lines import LineReader

__all__ = ["EXACT_BYTES", "SAMPLE_ROWS", "TokenCount", "count_tokens", "tokenizer_of"]

EXACT_BYTES: Final = 8_000_000
"""Training data up to this size is counted in full by mistral-common (about 5 seconds)."""

SAMPLE_ROWS: Final = 2_000
"""Rows counted of larger data; typical chats then give an interval of about 2 %."""

_Z95: Final = 1.96

_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "v1": "tokenizer.model.v1",
        "v2": "mistral_instruct_tokenizer_240216.model.v2",
        "v3": "mistral_instruct_tokenizer_240323.model.v3",
        "v7": "mistral_instruct_tokenizer_241114.model.v7",
        "v3-tekken": "tekken_240718.json",
    }
)
"""Tokenizers that the mistral-common wheel ships."""

_TOKENIZERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        # Names of the hosted service: mistral-common's own table, and its documentation.
        "codestral-2405": "v3",
        "ministral-3b-2410": "v3-tekken",
        "ministral-3b-latest": "v3-tekken",
        "ministral-8b-2410": "v3-tekken",
        "ministral-8b-latest": "v3-tekken",
        "mistral-large-2402": "v2",
        "mistral-large-2407": "v3",
        "mistral-large-2411": "v7",
        "mistral-medium-2312": "v1",
        "mistral-small-2312": "v2",
        "mistral-small-2402": "v2",
        "mistral-small-2409": "v3-tekken",
        "mistral-tiny-2312": "v2",
        "mistral-tiny-2407": "v3",
        "open-mistral-7b": "v3",
        "open-mistral-nemo": "v3-tekken",
        "open-mistral-nemo-2407": "v3-tekken",
        # Open weights, by the tokenizer file that their repository holds.
        "mistralai/Ministral-8B-Instruct-2410": "v3-tekken",
        "mistralai/Mistral-7B-Instruct-v0.3": "v3",
        "mistralai/Mistral-7B-v0.3": "v3",
        "mistralai/Mistral-Nemo-Base-2407": "v3-tekken",
        "mistralai/Mistral-Nemo-Instruct-2407": "v3-tekken",
    }
)

_AMBIGUOUS: Final = frozenset(
    {"codestral-latest", "mistral-large-latest", "mistral-medium-latest", "mistral-small-latest"}
)
"""Names that stood for models with different tokenizers over time."""

_Row = ChatRow | TextRow
_Counter = Callable[[_Row], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the training files, each row counted once whatever its file's weight.

    Attributes:
        data_tokens: None when they cannot be counted; `reason` then says why.
        basis: How they were counted.
        interval: Bounds of the 95 % interval when `sampled`.
        tokenizer: Name of the tokenizer, when one is known.
    """

    data_tokens: int | None = None
    basis: Literal["exact", "sampled"] = "exact"
    interval: tuple[int, int] | None = None
    tokenizer: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """The count of one file, with its variance when sampled."""

    tokens: float
    variance: float = 0.0
    at_least: int = 0


class _Uncountable(Exception):
    """A row has no exact count; the text says which and why."""


def tokenizer_of(model: str) -> str | None:
    """Return the name of the tokenizer that `model` reads with, or None."""
    return "bytes" if model == TINY_MODEL else _TOKENIZERS.get(model)


def count_tokens(
    dataset: Dataset,
    model: str,
    *,
    exact_bytes: int = EXACT_BYTES,
    sample_rows: int = SAMPLE_ROWS,
) -> TokenCount:
    """Count the tokens of the training files as `model` reads them.

    Blocks while it reads: call it in a thread from async code. Data above `exact_bytes` is
    sampled: rows drawn at random, the same ones for the same content, tokens taken in
    proportion to bytes. `tiny-mistral` is always counted in full.
    """
    name = tokenizer_of(model)
    if name is None:
        return TokenCount(reason=_no_tokenizer(model))
    if any(file.sample_type == "classifier" for file in dataset.train):
        reason = "how the service lays out the rows of a classifier is not known"
        return TokenCount(tokenizer=name, reason=reason)
    try:
        counter = byte_token_count if name == "bytes" else _mistral_counter(name)
    except ImportError:
        extra = "training-backends[tokens]"
        reason = f"counting needs mistral-common with sentencepiece: pip install '{extra}'"
        return TokenCount(tokenizer=name, reason=reason)
    size = sum(file.size for file in dataset.train)
    exact = name == "bytes" or size <= exact_bytes
    try:
        parts = [
            _count_all(file, counter)
            if exact
            else _count_sample(file, counter, max(200, sample_rows * file.size // size))
            for file in dataset.train
        ]
    except _Uncountable as error:
        return TokenCount(tokenizer=name, reason=str(error))
    except OSError as error:
        return TokenCount(tokenizer=name, reason=f"a file cannot be read: {error.strerror}")
    return _total(parts, name)


def _no_tokenizer(model: str) -> str:
    if model in _AMBIGUOUS:
        return (
            f"{model!r} has stood for models with different tokenizers; name a dated model "
            "to have tokens counted"
        )
    return f"the tokenizer of {model!r} is not known here"


def _total(parts: Sequence[_Part], tokenizer: str) -> TokenCount:
    tokens = round(sum(part.tokens for part in parts))
    variance = sum(part.variance for part in parts)
    if not any(part.variance for part in parts):
        return TokenCount(data_tokens=tokens, tokenizer=tokenizer)
    margin = _Z95 * math.sqrt(variance)
    low = max(sum(part.at_least for part in parts), math.floor(tokens - margin))
    return TokenCount(
        data_tokens=tokens,
        basis="sampled",
        interval=(low, math.ceil(tokens + margin)),
        tokenizer=tokenizer,
    )


def _count_all(file: DataFile, counter: _Counter) -> _Part:
    count = 0
    with file.path.open("rb", buffering=0) as opened:
        for number, line in enumerate(LineReader(opened), start=1):
            if line is None or (line and not line.isspace()):
                count += _count_line(file.path, number, line, counter)
    return _Part(count)


def _count_sample(file: DataFile, counter: _Counter, wanted: int) -> _Part:
    """Estimate one file by a ratio: tokens per byte of the rows drawn, times all bytes."""
    drawn, rows, total = _draw(file, wanted)
    if rows <= wanted:
        return _count_all(file, counter)
    pairs: list[tuple[int, int]] = []
    with file.path.open("rb") as opened:
        for number, start, length in drawn:
            opened.seek(start)
            pairs.append(
                (length, _count_line(file.path, number, opened.read(length), counter)),
            )
    ratio = sum(tokens for _, tokens in pairs) / sum(length for length, _ in pairs)
    spread = sum((tokens - ratio * length) ** 2 for length, tokens in pairs) / (len(pairs) - 1)
    variance = rows * rows * (1 - len(pairs) / rows) * spread / len(pairs)
    # Never quite zero, so that a sample of equal rows is not taken for a full count.
    return _Part(ratio * total, max(variance, 1e-9), sum(tokens for _, tokens in pairs))


def _draw(file: DataFile, wanted: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """Draw rows evenly in one pass; keep where they lie, not what they hold.

    Returns:
        Line, offset and length of each row drawn, in the order of the file; the number of
        rows; their bytes.
    """
    chance = random.Random(file.sha256)  # noqa: S311  # repeatable on purpose
    drawn: list[tuple[int, int, int]] = []
    rows = total = 0
    for number, start, length in _spans(file.path):
        rows += 1
        total += length
        if len(drawn) < wanted:
            drawn.append((number, start, length))
        elif (place := chance.randrange(rows)) < wanted:
            drawn[place] = (number, start, length)
    return sorted(drawn), rows, total


def _spans(path: Path) -> Iterator[tuple[int, int, int]]:
    with path.open("rb", buffering=0) as opened:
        reader = LineReader(opened)
        start = 0
        for number, line in enumerate(reader, start=1):
            if line is None:
                raise _Uncountable(f"{path}:{number}: the line is too long to be read")
            if line and not line.isspace():
                yield number, start, len(line)
            start += len(line) + 1


def _count_line(path: Path, number: int, line: bytes | None, counter: _Counter) -> int:
    place = f"{path}:{number}"
    if line is None:
        raise _Uncountable(f"{place}: the line is too long to be read")
    try:
        row = parse_row(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _Uncountable(f"{place}: the row cannot be read") from None
    if isinstance(row, ChatRow) and any(message.has_other_parts for message in row.messages):
        raise _Uncountable(f"{place}: images cannot be counted")
    try:
        return counter(row)
    except ValueError as error:  # what mistral-common raises for a row that it refuses
        raise _Uncountable(f"{place}: mistral-common refuses the row: {error}") from None


def _mistral_counter(name: str) -> _Counter:
    """Make a counter that asks mistral-common itself, so that it is right by definition."""
    from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415
    from mistral_common.protocol.instruct.request import (  # noqa: PLC0415
        ChatCompletionRequest,
    )
    from mistral_common.protocol.instruct.validator import ValidationMode  # noqa: PLC0415
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

    tokenizer = MistralTokenizer.from_file(
        str(files("mistral_common") / "data" / _FILES[name]), mode=ValidationMode.finetuning
    )

    def count(row: _Row) -> int:
        if isinstance(row, TextRow):
            text_tokenizer = tokenizer.instruct_tokenizer.tokenizer
            return len(text_tokenizer.encode(row.text, bos=True, eos=True))
        request = ChatCompletionRequest.model_validate(_request(row))
        try:
            return len(tokenizer.encode_chat_completion(request).tokens)
        except MistralCommonException as error:
            raise ValueError(str(error)) from error

    return count


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
    written: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        written["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": msgspec.to_builtins(call.function)}
            for call in message.tool_calls
        ]
        written["content"] = message.text or None
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    if message.name is not None and message.role == "tool":
        written["name"] = message.name
    return written
