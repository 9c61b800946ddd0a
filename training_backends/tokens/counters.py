"""Count the tokens of one row with the tokenizer of a model."""

import ctypes
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from training_backends.datasets.rows import ChatRow, Message, TextRow, byte_token_count
from training_backends.tokens.counts import AnyRow, Row, Uncountable, parts_of
from training_backends.tokens.images import (
    image_count,
    refuse_distant_images,
    refuse_images,
)
from training_backends.tokens.mistral_layout import VERSIONS, Layout
from training_backends.tokens.text_counters import (
    TextCount,
    missing,
    sentencepiece_count,
    tekken_count,
)
from training_backends.tokens.tokenizers import Tokenizer

__all__ = [
    "NOTE",
    "RENDER_SECONDS",
    "Counter",
    "EndlessTemplate",
    "OpenAICounter",
    "Reference",
    "TemplateCheck",
    "TemplateCounter",
    "chat_request",
    "count_row",
    "counter_of",
    "has_reference",
    "has_template",
    "is_fast",
    "rendered",
]


class Reference:
    """Counts rows with mistral-common in fine-tuning mode."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer file, which takes about a second.

        Raises:
            Uncountable: A package is not installed, or the file version is not supported.
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
            raise Uncountable(f"mistral-common could not read {path.name}: {first}") from error
        self._request = ChatCompletionRequest
        instruct = self._tokenizer.instruct_tokenizer
        if instruct.image_encoder is not None:
            instruct.image_encoder = _Sizes(instruct.image_encoder)
        # It also raises built-in exceptions for bad values and deep nesting.
        self._row_errors = (MistralCommonException, ValueError, AssertionError, RecursionError)

    def text(self, text: str) -> int:
        """Count a text on its own."""
        return len(self._encode(text, around=False))

    def row(self, row: ChatRow | TextRow) -> int:
        """Count a conversation or a text.

        Raises:
            Uncountable: mistral-common rejects the row.
        """
        refuse_distant_images(row)
        if isinstance(row, TextRow):
            return len(self._encode(row.text, around=True))
        try:
            request = self._request.model_validate(chat_request(row))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return len(self._tokenizer.encode_chat_completion(request).tokens)
        except self._row_errors as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise Uncountable(f"mistral-common rejects the row: {why}") from error

    def _encode(self, text: str, *, around: bool) -> Sequence[int]:
        tokens: Sequence[int]
        tokens = self._tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=around, eos=around)
        return tokens


class _Sizes:
    """Image encoder with mistral-common's token counts but no pixels, which would need opencv."""

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
def _load_reference(path: Path) -> Reference:
    """Return the reference counter of a file; cached, because loading is slow."""
    return Reference(path)


def chat_request(row: ChatRow) -> dict[str, Any]:
    """Return the content of mistral-common's request for a conversation."""
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
    """Return a message in mistral-common's format: without weight, which it rejects."""
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content
    if isinstance(content, list):
        # Missing keys must not be null.
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


T = TypeVar("T")

_TEMPLATE_FILES: Final = ("chat_template.jinja", "additional_chat_templates")

RENDER_SECONDS: Final = 5.0
"""Time limit of a chat template per row; common templates take a millisecond."""


class EndlessTemplate(Uncountable):
    """A chat template exceeded its time limit."""


class _Interrupt(BaseException):
    """Raised asynchronously in a rendering thread; not caught by `except Exception`."""


def rendered(render: Callable[[], T]) -> T:
    """Render a chat template; interrupt it after `RENDER_SECONDS`.

    Templates are untrusted. Jinja's sandbox limits each loop, but nested loops multiply and can
    run for years. They run as Python code, which another thread can interrupt.

    Args:
        render: Renders the template; called in this thread.

    Raises:
        EndlessTemplate: The time limit was exceeded.
    """
    thread, guard = threading.get_ident(), threading.Lock()
    is_done = is_late = False

    def interrupt() -> None:
        nonlocal is_late
        with guard:
            if not is_done:
                is_late = True
                _raise_in(thread, _Interrupt)

    timer = threading.Timer(RENDER_SECONDS, interrupt)
    timer.daemon = True
    try:
        timer.start()
        try:
            return render()
        finally:
            with guard:
                is_done = True
            timer.cancel()
            if is_late:
                _raise_in(thread, None)  # cancel, so that it is not raised in other code
                raise _Interrupt  # replaces the result
    except _Interrupt:
        raise EndlessTemplate(
            f"the chat template did not finish within {RENDER_SECONDS:g} s for a row"
        ) from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in another thread; None cancels one that is still pending."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


class TemplateCounter:
    """Counts rows as the trainer encodes them: text never becomes a control token."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer from a model directory.

        Raises:
            Uncountable: transformers is not installed, or the tokenizer cannot be loaded.
        """
        try:
            from transformers import AutoTokenizer  # noqa: PLC0415  # takes seconds to import
        except ImportError as error:
            reason = "counting requires transformers: pip install 'training-backends[local]'"
            raise Uncountable(reason) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # untrusted files
            first = str(error).partition("\n")[0]
            raise Uncountable(f"could not load the tokenizer: {first}") from error
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._special = sorted(special | {*self._tokenizer.all_special_tokens})

    def text(self, text: str) -> int:
        """Count a text on its own."""
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return len(encoded.input_ids)

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: The template rejects the row, or there is none.
        """
        refuse_images(row)
        if isinstance(row, TextRow):
            return self.text(row.text) + 1 + (self._tokenizer.bos_token_id is not None)
        if self._tokenizer.chat_template is None:
            raise Uncountable("the tokenizer has no chat template")
        content = msgspec.json.encode(row).decode()
        for special in self._special:
            if msgspec.json.encode(special).decode()[1:-1] in content:
                raise Uncountable(f"the text contains the control token {special}")
        try:
            ids = rendered(
                lambda: self._tokenizer.apply_chat_template(
                    _messages(row),
                    tools=msgspec.to_builtins(row.tools) if row.tools else None,
                    tokenize=True,
                    return_dict=False,
                )
            )
        except EndlessTemplate:
            raise
        except Exception as error:  # templates raise arbitrary exceptions
            first = str(error).partition("\n")[0]
            raise Uncountable(f"the chat template rejects the row: {first}") from error
        return len(ids)


def has_template(directory: Path) -> bool:
    """Return whether a model directory has a chat template, without loading it."""
    if any((directory / name).exists() for name in _TEMPLATE_FILES):
        return True
    return bool(_settings(directory).get("chat_template"))


class TemplateCheck:
    """Finds rows that certainly can be encoded, without importing transformers (seconds).

    A row that plain Jinja renders and that contains no control token is accepted by the
    tokenizer. Other rows have to be checked with the tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        """Load the template and the control tokens."""
        self._template: Any = None
        settings = _settings(directory)
        names = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
        self._names = {key: value for key, value in names.items() if value}
        self._special = {*self._names.values()}
        added = settings.get("added_tokens_decoder")
        try:
            tokens = msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_Added)
            listed = [*tokens.added_tokens, *(added.values() if isinstance(added, dict) else ())]
            self._special |= {token["content"] for token in listed if token.get("special")}
            self._template = _compiled(_template_text(directory, settings))
        except Exception:  # untrusted files
            self._template = None

    def accepts(self, row: AnyRow) -> bool:
        """Return whether the tokenizer certainly accepts a row."""
        try:
            return all(map(self._renders, parts_of(row)))
        except Uncountable:
            return False

    def rewrites(self, row: ChatRow) -> bool:
        """Return whether the answers of an accepted row certainly cannot be located.

        An answer can be located if the text before it and the text up to its end are prefixes.
        """
        count = len(row.messages)
        try:
            complete = self._text(row, count, waiting=False)
            return not all(
                complete.startswith(self._text(row, end, waiting=end == index))
                for index in range(count)
                if row.messages[index].is_trained
                for end in (index, index + 1)
            )
        except Exception:  # a part is rejected, at least by plain Jinja
            return False

    def _text(self, row: ChatRow, count: int, *, waiting: bool) -> str:
        tools = msgspec.to_builtins(row.tools) if row.tools else None
        values = {**self._names, "messages": _messages(row)[:count], "tools": tools}
        text = rendered(lambda: self._template.render(**values, add_generation_prompt=waiting))
        return str(text)

    def _renders(self, row: ChatRow | TextRow) -> bool:
        if isinstance(row, TextRow):
            return True
        if self._template is None or any(message.has_other_parts for message in row.messages):
            return False
        content = msgspec.json.encode(row).decode()
        if any(msgspec.json.encode(each).decode()[1:-1] in content for each in self._special):
            return False
        try:
            self._text(row, len(row.messages), waiting=False)
        except Exception:  # templates raise arbitrary exceptions
            return False
        return True


class _Added(msgspec.Struct):
    """The added tokens in tokenizer.json."""

    added_tokens: list[dict[str, Any]] = []


def _settings(directory: Path) -> dict[str, Any]:
    try:
        found = msgspec.json.decode((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    """Return the text of a token, which may be an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _template_text(directory: Path, settings: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.is_file() else settings["chat_template"]
    if not isinstance(found, str):
        raise TypeError("several templates")
    return found


def _compiled(text: str) -> Any:
    from jinja2.ext import loopcontrols  # noqa: PLC0415  # comes with transformers
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: msgspec.json.encode(value).decode()
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment.from_string(text)


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


NOTE: Final = "Counted as in OpenAI's cookbook; billed tokens may differ."

_PER_MESSAGE: Final = 3
_PER_NAME: Final = 1
_AT_THE_END: Final = 3


def _encoding_count(name: str) -> TextCount:
    """Load an encoding that tiktoken has cached.

    Raises:
        Uncountable: The encoding cannot be loaded.
    """
    try:
        from tiktoken import get_encoding  # noqa: PLC0415

        encode = get_encoding(name).encode_ordinary
    except Exception as error:  # arbitrary exceptions if the cached file is corrupt
        first = str(error).partition("\n")[0]
        raise Uncountable(f"tiktoken could not load the encoding {name}: {first}") from error
    return lambda text: len(encode(text))


class OpenAICounter:
    """Counts rows by a tiktoken encoding and the rule of OpenAI's cookbook."""

    def __init__(self, count: TextCount) -> None:
        self.text = count

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: The row has parts whose tokens are not documented.
        """
        refuse_images(row)
        if isinstance(row, TextRow):
            return self.text(row.text)
        if row.tools or any(message.tool_calls for message in row.messages):
            raise Uncountable("OpenAI does not document how tools are counted")
        total = _AT_THE_END
        for message in row.messages:
            if message.role == "tool":
                raise Uncountable("OpenAI does not document how tools are counted")
            total += _PER_MESSAGE + self.text(message.role) + self.text(message.text)
            if message.name is not None:
                total += _PER_NAME + self.text(message.name)
        return total


_MISTRAL: Final = frozenset({"tekken", "sentencepiece"})


class Counter(Protocol):
    """Token counter of one tokenizer."""

    def text(self, text: str, /) -> int:
        """Count a text on its own, without control tokens."""
        ...

    def row(self, row: Row, /) -> int:
        """Count a conversation or text as it is encoded for training.

        Raises:
            Uncountable: The row has no exact count.
        """
        ...


class _Bytes:
    """Counter of `tiny-mistral`'s byte-level vocabulary."""

    def text(self, text: str) -> int:
        return len(text.encode("utf-8", "replace"))

    def row(self, row: Row) -> int:
        refuse_images(row)
        return byte_token_count(row)


class _Mistral:
    """Counts with the fastest library; leaves unusual rows to mistral-common."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.path is None:
            raise Uncountable("the tokenizer has no file")
        self._path = tokenizer.path
        load = tekken_count if tokenizer.kind == "tekken" else sentencepiece_count
        self.text = load(tokenizer.path)
        images = image_count(tokenizer.images) if tokenizer.images else None
        self._layout = Layout(tokenizer.version, self.text, images)

    def row(self, row: Row) -> int:
        refuse_distant_images(row)
        counted: int | None
        if isinstance(row, ChatRow):
            counted = self._layout.chat(row)
        else:
            try:
                counted = self.text(row.text) + 2  # BOS and EOS
            except ValueError:
                counted = None
        return _load_reference(self._path).row(row) if counted is None else counted


def has_reference(tokenizer: Tokenizer) -> bool:
    """Return whether mistral-common is the reference for a tokenizer."""
    return tokenizer.kind in _MISTRAL


def is_fast(tokenizer: Tokenizer) -> bool:
    """Return whether rows are counted without mistral-common or a chat template."""
    if tokenizer.kind in _MISTRAL:
        return tokenizer.version in VERSIONS
    return tokenizer.kind != "template"


@lru_cache(maxsize=4)
def counter_of(tokenizer: Tokenizer, *, slow: bool = False) -> Counter:
    """Return the counter of a tokenizer; cached, because loading takes tenths of a second.

    Args:
        slow: Use mistral-common itself.

    Raises:
        Uncountable: A required package is not installed, or the tokenizer cannot be loaded.
    """
    if tokenizer.path is None:
        return _Bytes()
    if tokenizer.kind in _MISTRAL:
        if slow or tokenizer.version not in VERSIONS:
            return _load_reference(tokenizer.path)
        return _Mistral(tokenizer)
    if tokenizer.kind == "tiktoken":
        return OpenAICounter(_encoding_count(tokenizer.name))
    return TemplateCounter(tokenizer.path)


def count_row(counter: Counter, row: AnyRow) -> tuple[int, ...]:
    """Return the lengths of the token sequences that a row is encoded as.

    Raises:
        Uncountable: The row has no exact count.
    """
    return tuple([counter.row(part) for part in parts_of(row)])
