"""Count rows with a model's own tokenizer and chat template, by transformers."""

import ctypes
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from training_backends.datasets.rows import ChatRow, TextRow
from training_backends.tokens.errors import Uncountable
from training_backends.tokens.images import refuse_images
from training_backends.tokens.rows import AnyRow, parts_of

__all__ = [
    "RENDER_SECONDS",
    "EndlessTemplate",
    "TemplateCheck",
    "TemplateCounter",
    "has_template",
    "rendered",
]

T = TypeVar("T")

_TEMPLATE_FILES: Final = ("chat_template.jinja", "additional_chat_templates")

RENDER_SECONDS: Final = 5.0
"""Longest time that a chat template may take for one row; common ones take a millisecond."""


class EndlessTemplate(Uncountable):
    """A chat template takes longer than it may."""


class _Interrupt(BaseException):
    """Raised from outside in a thread that renders; no `except Exception` on the way takes it."""


def rendered(render: Callable[[], T]) -> T:
    """Return what a chat template gives; end it after `RENDER_SECONDS`.

    A template comes with a model. Jinja's sandbox bounds each loop, but loops within loops
    multiply, and run for years. They run as Python code, which another thread can interrupt.

    Args:
        render: Renders; called in this thread.

    Raises:
        EndlessTemplate: It took longer.
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
                _raise_in(thread, None)  # none may arrive later, in other code
                raise _Interrupt  # in place of whatever it returned
    except _Interrupt:
        raise EndlessTemplate(
            f"the chat template takes longer than {RENDER_SECONDS:g} s for a row, or never ends"
        ) from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next step; None takes back one not yet raised."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


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
        except Exception as error:  # templates raise what they like
            first = str(error).partition("\n")[0]
            raise Uncountable(f"the chat template refuses the row: {first}") from error
        return len(ids)


def has_template(directory: Path) -> bool:
    """Tell whether a tokenizer has a chat template, by its files alone."""
    if any((directory / name).exists() for name in _TEMPLATE_FILES):
        return True
    return bool(_settings(directory).get("chat_template"))


class TemplateCheck:
    """Tells without transformers, which loads for seconds, which rows are beyond doubt.

    A row that plain Jinja renders, and that holds no control token, is one that the tokenizer
    takes. Of the others only the tokenizer knows.
    """

    def __init__(self, directory: Path) -> None:
        """Read the template and the names of the control tokens."""
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
        except Exception:  # files of strangers: anything can be wrong with them
            self._template = None

    def accepts(self, row: AnyRow) -> bool:
        """Tell whether the tokenizer certainly takes a row."""
        try:
            return all(map(self._renders, parts_of(row)))
        except Uncountable:
            return False

    def rewrites(self, row: ChatRow) -> bool:
        """Tell whether the answers of an accepted row certainly cannot be told from the rest.

        That needs what is before an answer, and what ends with it, to begin the conversation.
        """
        count = len(row.messages)
        try:
            whole = self._text(row, count, waiting=False)
            return not all(
                whole.startswith(self._text(row, end, waiting=end == index))
                for index in range(count)
                if row.messages[index].is_trained
                for end in (index, index + 1)
            )
        except Exception:  # a part of it is rejected, at least by plain Jinja
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
        except Exception:  # templates raise what they like
            return False
        return True


class _Added(msgspec.Struct):
    """The part of tokenizer.json that names tokens."""

    added_tokens: list[dict[str, Any]] = []


def _settings(directory: Path) -> dict[str, Any]:
    try:
        found = msgspec.json.decode((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    """Return a token's text, which may be written as an object."""
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
