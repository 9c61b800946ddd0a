"""Render conversations with the chat template of a model, and locate the answers in the text.

A chat model is served with its chat template, so it is trained on what the same template renders:
from the row's own JSON, each answer after the generation prompt that asks for it, through the
tokens with which the template ends it. What a template leaves out of a row is noticed: a
conversation of the same shape, with marks in place of its texts, is rendered as well.

Needs only jinja2, whose environment is that of transformers 5.23.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any, Final, NamedTuple

import msgspec

from training_backends.core.errors import first_line
from training_backends.datasets.rows import ChatRow, Message, SourceMessage, SourceTool
from training_backends.tokens.jinja import EndlessTemplate, TimeLimit, compile_template
from training_backends.tokens.tokenizers import TokenizerSettings

__all__ = ["ChatRenderer", "Conversation", "RejectedByTemplate", "RenderedExample"]

Json = dict[str, Any]
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, in the order of transformers 5.23."""
_KNOWN_SHAPES: Final = 4096
_CALLED: Final = "zqcalled"
_LIMIT: Final = TimeLimit()
_FIX: Final = "remove it, or set chat_template"


class RejectedByTemplate(ValueError):
    """A template cannot render a conversation exactly; the message has the reason."""


class Conversation(NamedTuple):
    """A conversation as its row's own JSON.

    Attributes:
        trained: For each message, whether it is in the loss.
    """

    messages: list[Json]
    tools: list[Json] | None
    trained: list[bool]

    @classmethod
    def of(cls, row: ChatRow) -> "Conversation":
        """Return the JSON of a row: as in its file, if it was decoded with `keep_source`."""
        tools = [
            tool.source if isinstance(tool, SourceTool) else _plain(tool)
            for tool in row.tools or ()
        ]
        return cls(
            [_source(message) for message in row.messages],
            tools or None,
            [message.is_trained for message in row.messages],
        )


def _source(message: Message) -> Json:
    if isinstance(message, SourceMessage):
        return message.source
    return {**_plain(message), "role": message.role}


def _plain(value: msgspec.Struct) -> Json:
    built: Json = msgspec.to_builtins(value)
    return {key: each for key, each in built.items() if each is not None}


class RenderedExample(NamedTuple):
    """The text of a training example.

    Attributes:
        spans: Start and end, in characters, of the answers in the loss.
    """

    text: str
    spans: list[tuple[int, int]]


class _TemplateForm(NamedTuple):
    """The form in which a template takes what rows may have in several forms.

    Attributes:
        is_object: Whether the arguments of calls are given as an object, not as its JSON.
        empty: What a message with calls and without content is given.
    """

    is_object: bool
    empty: Json


class ChatRenderer:
    """A chat template with the control tokens of its tokenizer."""

    def __init__(self, settings: TokenizerSettings, text: str | None = None) -> None:
        """Compile the templates.

        Args:
            text: Use this template instead of the model's own.

        Raises:
            RejectedByTemplate: There is none, or it is not valid Jinja.
        """
        templates = {"default": text} if text is not None else dict(settings.templates)
        if not templates:
            raise RejectedByTemplate("the tokenizer has no chat template")
        self._named = dict(settings.named)
        self._eos = settings.named.get("eos_token", "")
        self._special = sorted(settings.special)
        self._controls = _any_of(settings.special)
        self._escaped_controls = _any_of(map(_escaped, settings.special))
        self._dropped_by_shape: dict[bytes, str | None] = {}
        try:
            self._compiled = {name: compile_template(text) for name, text in templates.items()}
        except Exception as error:  # untrusted text
            raise RejectedByTemplate(f"invalid chat template: {first_line(error)}") from error

    # -- what is rendered

    def examples(self, row: Conversation) -> list[RenderedExample]:
        """Render a conversation as one training example, or as one for each answer in the loss.

        There are several if the template renders an earlier answer differently once the
        conversation continues: each then follows the prompt that asks for it.

        Raises:
            RejectedByTemplate: The template rejects the row, leaves something out, or does not
                continue its own generation prompt.
            EndlessTemplate: The time limit was exceeded.
        """
        self._refuse_control_tokens(row)
        given = self._adapted(row)
        examples = _LIMIT.run(lambda: self._examples(given))
        self._require_answers(given, examples)
        if problem := self._dropped(given):
            raise RejectedByTemplate(problem)
        return examples

    def prompt(self, messages: list[Json], tools: list[Json] | None = None) -> str:
        """Render the generation prompt of a conversation.

        Raises:
            RejectedByTemplate: The template rejects it.
            EndlessTemplate: The time limit was exceeded.
        """
        given = self._adapted(Conversation(messages, tools, [False] * len(messages)))
        return _LIMIT.run(lambda: self._render(given, len(messages), waiting=True))

    def text(self, row: Conversation) -> str:
        """Render a complete conversation, which may end with any role.

        Raises:
            RejectedByTemplate: The template rejects it.
            EndlessTemplate: The time limit was exceeded.
        """
        self._refuse_control_tokens(row)
        given = self._adapted(row)
        return _LIMIT.run(lambda: self._render(given, len(given.messages), waiting=False))

    @cached_property
    def ends(self) -> frozenset[str]:
        """The control tokens with which the template ends an answer."""
        found: set[str] = set()
        within: set[str] = set()
        for probe in _probes():
            try:
                examples = _LIMIT.run(partial(self._examples, self._adapted(probe)))
            except (RejectedByTemplate, EndlessTemplate):
                continue
            for text, spans in examples:
                for start, end in spans:
                    places = self._end_places(text[start:end])
                    tokens = self._controls.findall(text, start, end)
                    found.update(tokens[-1:])
                    within.update(tokens[: len(tokens) - len(places)])
        return frozenset(found - within)

    def _render(self, row: Conversation, count: int, *, waiting: bool) -> str:
        values = {
            **self._named,
            "messages": row.messages[:count],
            "tools": row.tools,
            "documents": None,
            "add_generation_prompt": waiting,
        }
        name = "tool_use" if row.tools and "tool_use" in self._compiled else "default"
        template = self._compiled.get(name) or next(iter(self._compiled.values()))
        try:
            return str(template.render(**values))
        except Exception as error:  # templates raise arbitrary exceptions
            raise RejectedByTemplate(
                f"the chat template rejects the row: {first_line(error)} (change the row, or set "
                "chat_template)"
            ) from error

    def _examples(self, row: Conversation) -> list[RenderedExample]:
        answers = [index for index, is_trained in enumerate(row.trained) if is_trained]
        if not answers:
            return [RenderedExample(self._render(row, len(row.messages), waiting=False), [])]
        last = answers[-1]
        complete = self._render(row, last + 1, waiting=False)
        separate, joined = [], []
        for index in answers:
            asked = self._render(row, index, waiting=True)
            own = complete if index == last else self._render(row, index + 1, waiting=False)
            if not own.startswith(asked):
                raise RejectedByTemplate(
                    f"messages[{index}]: the chat template does not render it after its own "
                    f"generation prompt, which ends with {asked[-20:]!r} "
                    f"({_prompt_fix(row.messages[index])})"
                )
            start = len(asked)
            ends = [end for end in self._end_places(own) if end > start]
            if not ends:  # nothing ends the answer, so the end-of-text token has to
                separate.append(
                    RenderedExample(own + self._eos, [(start, len(own) + len(self._eos))])
                )
                continue
            separate.append(RenderedExample(own[: ends[-1]], [(start, ends[-1])]))
            shared = [end for end in ends if complete.startswith(own[:end])]
            joined += [(start, end) for end in shared[-1:]]
        if len(joined) < len(answers):
            return separate
        return [RenderedExample(complete[: joined[-1][1]], joined)]

    def _end_places(self, text: str) -> list[int]:
        """Return the ends of the control tokens that conclude a text, with spaces between them."""
        found: list[int] = []
        end = len(text.rstrip())
        while (place := self._token_before(text, end)) is not None:
            found.insert(0, end)
            end = len(text[:place].rstrip())
        return found

    def _token_before(self, text: str, end: int) -> int | None:
        """Return where the control token starts that ends at a place."""
        starts = [end - len(token) for token in self._special if text.endswith(token, 0, end)]
        return min(starts, default=None)

    # -- the form of a row that the template takes

    def _adapted(self, row: Conversation) -> Conversation:
        return row._replace(messages=[self._adapted_message(message) for message in row.messages])

    def _adapted_message(self, message: Json) -> Json:
        # transformers, too, drops what is null and gives reasoning all its names.
        made = {k: v for k, v in message.items() if v is not None and k != "weight"}
        reasoning = next((made[key] for key in _REASONING if key in made), None)
        if reasoning is not None:
            made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
        if made["role"] == "developer" and not self._knows_developer:
            made["role"] = "system"
        if calls := made.get("tool_calls"):
            made["tool_calls"] = [self._adapted_call(call) for call in calls]
            if "content" not in made:
                made |= self._form.empty
        content = made.get("content")
        if isinstance(content, list) and not self._takes_parts:
            made["content"] = "".join(_texts(content))
        elif isinstance(content, str) and not self._takes_text:
            made["content"] = [{"type": "text", "text": content}]
        return made

    def _adapted_call(self, call: Json) -> Json:
        function = call["function"]
        arguments = function.get("arguments", {})
        if self._form.is_object and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                return call
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif not self._form.is_object and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    @cached_property
    def _form(self) -> _TemplateForm:
        """How calls are given: tried with marks, in the order of preference."""
        empties: list[Json] = [{}, {"content": ""}, {"content": None}]
        for is_object, empty in product((True, False), empties):
            key, value = _marker(1), _marker(2)
            messages = _called({key: value} if is_object else json.dumps({key: value}))
            messages[1] |= empty
            text = self._try(Conversation(messages, [_tool(_marker(0))], [False] * 4))
            quoted = f"{{'{key}'" in text or f'\\"{key}' in text  # Python, or JSON in JSON
            if key in text and value in text and not quoted:
                return _TemplateForm(is_object, empty)
        # None is right. The reason of the rejection should be about calls, not about content.
        return _TemplateForm(is_object=True, empty={"content": ""})

    @cached_property
    def _takes_text(self) -> bool:
        text = self._try(_turns(("user", _marker(0)), ("assistant", _marker(1))))
        # If neither form is rendered, the reason should be that of a text.
        return not self._takes_parts or (_marker(0) in text and _marker(1) in text)

    @cached_property
    def _takes_parts(self) -> bool:
        parts = [[{"type": "text", "text": _marker(place)}] for place in range(2)]
        text = self._try(_turns(("user", parts[0]), ("assistant", parts[1])))
        marked = _marker(0) in text and _marker(1) in text
        return marked and "'text'" not in text and '"text"' not in text

    @cached_property
    def _knows_developer(self) -> bool:
        return _marker(0) in self._try(_turns(("developer", _marker(0)), ("user", _marker(1))))

    def _try(self, row: Conversation) -> str:
        """Render a conversation as it is; return an empty text if the template rejects it."""
        try:
            return _LIMIT.run(lambda: self._render(row, len(row.messages), waiting=False))
        except RejectedByTemplate:
            return ""

    # -- what must not be lost

    def _refuse_control_tokens(self, row: Conversation) -> None:
        content = msgspec.json.encode((row.messages, row.tools)).decode()
        if found := self._escaped_controls.search(content):
            raise RejectedByTemplate(f"the text contains the control token {found[0]} (remove it)")

    def _require_answers(self, row: Conversation, examples: Sequence[RenderedExample]) -> None:
        """Check that each answer in the loss has its text, except for white space."""
        spans = [text[start:end] for text, spans in examples for start, end in spans]
        answers = [i for i, is_trained in enumerate(row.trained) if is_trained]
        for index, span in zip(answers, spans, strict=True):
            content = row.messages[index].get("content")
            for text in _texts(content):
                if text.strip() not in span and "".join(text.split()) not in "".join(span.split()):
                    raise RejectedByTemplate(
                        f"messages[{index}].content: the chat template leaves out a part of it "
                        f"({_FIX})"
                    )

    def _dropped(self, row: Conversation) -> str | None:
        """Return what the template leaves out of conversations of this shape."""
        marked, marks = _marked(row, is_object=self._form.is_object)
        shape = msgspec.json.encode(marked)
        if shape not in self._dropped_by_shape:
            if len(self._dropped_by_shape) >= _KNOWN_SHAPES:
                self._dropped_by_shape.clear()
            self._dropped_by_shape[shape] = self._find_dropped(marked, marks)
        return self._dropped_by_shape[shape]

    def _find_dropped(self, row: Conversation, marks: "Sequence[_Mark]") -> str | None:
        try:
            examples = _LIMIT.run(lambda: self._examples(row))
        except RejectedByTemplate:
            return None  # it depends on the texts, which were rendered
        answers = [index for index, is_trained in enumerate(row.trained) if is_trained]
        answers = answers or [len(row.messages)]
        spans = [
            (text, text[slice(*span)]) for text, spans in examples for span in spans or [(0, 0)]
        ]
        for answer, (text, span) in zip(answers, spans, strict=True):
            # Templates shorten what precedes the last user message, also when they are served.
            roles = [message["role"] for message in row.messages[:answer]]
            asked = len(roles) - roles[::-1].index("user") - 1 if "user" in roles else 0
            for mark in marks:
                if mark.message > answer or mark.text in (span if mark.message == answer else text):
                    continue
                is_shortened = mark.message < asked and roles[mark.message] in ("assistant", "tool")
                is_thought = mark.is_reasoning and mark.message != answer
                if mark.message < 0 or not (is_shortened or is_thought):
                    return f"{mark.field}: the chat template leaves it out ({_FIX})"
        return None


class _Mark(NamedTuple):
    """A text that stands for another one.

    Attributes:
        message: Index of the message; -1 for the tools.
    """

    message: int
    field: str
    text: str
    is_reasoning: bool = False


def _prompt_fix(answer: Json) -> str:
    fix = "remove its" if answer.get("reasoning_content") else "give it"
    return f"{fix} reasoning_content, or set chat_template"


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the texts, of two the longer one."""
    longest_first = sorted({*texts}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _escaped(text: str) -> str:
    return msgspec.json.encode(text).decode()[1:-1]


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part.get("text") or "" for part in content)


def _marker(place: int) -> str:
    """Return a text that no template changes, and that is in no other text."""
    return f"zq{place:05d}w"


def _turns(*turns: tuple[str, Any]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(messages, None, [role == "assistant" for role, _ in turns])


def _tool(name: str) -> Json:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    function = {"name": name, "description": "x", "parameters": schema}
    return {"type": "function", "function": function}


def _called(arguments: Any) -> list[Json]:
    function = {"name": _marker(0), "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "name": _marker(0), "content": "x"},
        {"role": "assistant", "content": "x"},
    ]


def _probes() -> Iterator[Conversation]:
    """Yield conversations that show how a template ends answers."""
    for turns in (1, 2):
        yield _turns(*[("user", "x"), ("assistant", "x")] * turns)
    called = _called({})
    yield Conversation(called[:2], [_tool(_marker(0))], [False, True])
    thought = {"role": "assistant", "reasoning_content": "x", "content": "x"}
    yield Conversation([called[0], thought], None, [False, True])


def _marked(row: Conversation, *, is_object: bool) -> tuple[Conversation, list[_Mark]]:
    """Put marks in place of the texts of a conversation, which leaves its shape.

    Args:
        is_object: Whether the arguments of calls are given as an object.
    """
    marks: list[_Mark] = []
    ids: dict[Any, str] = {}

    def mark(index: int, field: str, *, is_reasoning: bool = False) -> str:
        place = field if index < 0 else f"messages[{index}].{field}"
        marks.append(_Mark(index, place, _marker(len(marks)), is_reasoning))
        return marks[-1].text

    def identify(given: Any) -> str:
        return ids.setdefault(given, f"call{len(ids):05d}")

    def call(index: int, place: int, given: Json) -> Json:
        field = f"tool_calls[{place}]"
        arguments: Any = {mark(index, field): mark(index, field)}
        written = arguments if is_object else json.dumps(arguments)
        function = {"name": _CALLED, "arguments": written}
        return {"id": identify(given.get("id")), "type": "function", "function": function}

    messages = []
    for index, message in enumerate(row.messages):
        made: Json = {"role": message["role"]}
        if "content" in message:
            content = message["content"]
            text = mark(index, "content") if any(_texts(content)) else ""
            parts = [{"type": "text", "text": text}]
            made["content"] = parts if isinstance(content, list) else text if content else content
        if message.get("reasoning_content"):
            text = mark(index, "reasoning_content", is_reasoning=True)
            made |= dict.fromkeys(("reasoning_content", "thinking"), text)
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [call(index, place, each) for place, each in enumerate(calls)]
        if "tool_call_id" in message:
            made["tool_call_id"] = identify(message["tool_call_id"])
        if "name" in message:
            made["name"] = _CALLED
        messages.append(made)
    tools = [_tool(_CALLED), _tool(mark(-1, "tools"))] if row.tools else None
    return Conversation(messages, tools, row.trained), marks
