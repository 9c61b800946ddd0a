"""What one provider takes as training data, as data: rules are declared here, applied elsewhere.

A `Dialect` holds no behaviour. Whoever judges rows asks its fields and never its name, so a
provider that nobody has met yet is one more value, not one more branch. It is a plain dataclass,
because the processes that judge rows should be up without pydantic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["Dialect", "Level", "Place", "Role", "RowFormat", "SampleType"]

Role = Literal["system", "developer", "user", "assistant", "tool"]

Place = Literal["start", "system", "developer", "user", "assistant", "tool", "end"]
"""A role in the order of a conversation, or one of its two ends."""

RowFormat = Literal["messages", "text", "labels", "preference", "chosen", "completion"]
"""How a row is written.

`messages`: a conversation. `text`: plain text. `labels`: either of them with classifier labels.
`preference`: `input`, `preferred_output`, `non_preferred_output`. `chosen`: `prompt`, `chosen`,
`rejected`. `completion`: `prompt`, `completion`.
"""

Level = Literal["error", "warning", "ignored"]

SampleType = Literal["instruct", "pretrain", "classifier", "preference"]

_ORDER: Final[dict[Place, tuple[Place, ...]]] = {
    "start": ("system", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "end"),
    "tool": ("user", "assistant"),
}

_PARTS: Final[dict[Role, tuple[str, ...]]] = {
    "system": ("text",),
    "developer": ("text",),
    "user": ("text", "image_url"),
    "assistant": ("text",),
    "tool": ("text",),
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The rules that a provider has for rows and files; the defaults are what all share.

    Attributes:
        name: What messages call it.
        formats: How rows may be written.
        roles: Who may speak.
        order: For the start and each role, what may come next. What a tool answers is held
            against the calls instead, so `tool` comes nowhere next.
        lone_answer: A conversation may be one assistant message and nothing before it.
        weights: What a message's `weight` may be; empty where there is none.
        weighted_roles: Whose messages may carry one.
        parts: By role, which parts a content that is a list may have.
        image_schemes: How an image's address may begin; `data` stands for the image itself.
        image_types: Subtypes of `image/` that an image given as data may have.
        bare_image: An image's address may stand alone, not only in `{"url": …}`.
        max_images: Images in one row.
        call_id: Regular expression that the id of a tool call matches whole; None for any text.
        call_id_words: The same in words.
        answers_name_calls: The answer of a tool repeats the id of its call.
        function_name: Regular expression that the name of a function matches whole.
        function_name_words: The same in words.
        arguments: How the arguments of a call may be written.
        legacy_functions: `functions` and `function_call`, which `tools` replaced, are taken.
        row_keys: Keys beside those that make the format.
        message_keys: Keys of a message.
        max_answer_messages: Messages in each answer of a preference pair.
        min_rows: Rows that a training file needs.
        max_rows: Rows that a file may have.
        max_image_rows: Rows with images that a file may have.
        max_file_bytes: Largest file.
        validation_max_bytes: Largest validation set.
        validation_max_share: The same as a share of the training set.
        max_invalid_share: Share of unusable rows that may be asked to be skipped.
        levels: By code of a finding, how grave it is, where that differs from the rule's own.
    """

    name: str = "common"
    formats: tuple[RowFormat, ...] = (
        "messages",
        "text",
        "labels",
        "preference",
        "chosen",
        "completion",
    )
    roles: tuple[Role, ...] = ("system", "user", "assistant", "tool")
    order: Mapping[Place, tuple[Place, ...]] = field(default_factory=_ORDER.copy)
    lone_answer: bool = True
    weights: tuple[int, ...] = (0, 1)
    weighted_roles: tuple[Role, ...] = ("assistant",)
    parts: Mapping[Role, tuple[str, ...]] = field(default_factory=_PARTS.copy)
    image_schemes: tuple[str, ...] = ("https", "http", "data")
    image_types: tuple[str, ...] = ("png", "jpeg", "webp", "gif")
    bare_image: bool = True
    max_images: int | None = None
    call_id: str | None = None
    call_id_words: str = "any text"
    answers_name_calls: bool = True
    function_name: str = r"[a-zA-Z0-9_-]{1,64}"
    function_name_words: str = "1 to 64 letters, digits, underscores or dashes"
    arguments: tuple[Literal["string", "object"], ...] = ("string",)
    legacy_functions: bool = False
    row_keys: tuple[str, ...] = ("tools",)
    message_keys: tuple[str, ...] = (
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "weight",
    )
    max_answer_messages: int | None = None
    min_rows: int = 1
    max_rows: int | None = None
    max_image_rows: int | None = None
    max_file_bytes: int | None = None
    validation_max_bytes: int | None = None
    validation_max_share: float | None = None
    max_invalid_share: float = 0.0
    levels: Mapping[str, Level] = field(default_factory=dict)
