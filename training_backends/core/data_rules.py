"""Provider formats for training data, declared as data and applied elsewhere.

A `ProviderFormat` has no behavior. Checks depend on its fields and never on its name, so a new
provider is a new value, not a new branch. It is a plain dataclass, so that the processes that
check rows start without pydantic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["Level", "MessagePosition", "ProviderFormat", "Role", "RowFormat", "SampleType"]

Role = Literal["system", "developer", "user", "assistant", "tool"]

MessagePosition = Literal["start", "system", "developer", "user", "assistant", "tool", "end"]
"""A position in a conversation: a role, its start or its end."""

RowFormat = Literal["messages", "text", "labels", "preference", "chosen", "completion"]
"""The format of a row.

`messages`: a conversation. `text`: plain text. `labels`: either one with classifier labels.
`preference`: `input`, `preferred_output`, `non_preferred_output`. `chosen`: `prompt`, `chosen`,
`rejected`. `completion`: `prompt`, `completion`.
"""

Level = Literal["error", "warning", "ignored"]

SampleType = Literal["instruct", "pretrain", "classifier", "preference"]

_ORDER: Final[dict[MessagePosition, tuple[MessagePosition, ...]]] = {
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
class ProviderFormat:
    """A provider's rules for rows and files; the defaults are common to all providers.

    Attributes:
        name: Name used in messages.
        formats: Accepted row formats.
        roles: Accepted message roles.
        order: Allowed successors of the start and of each role. Tool messages are checked
            against the tool calls instead, so `tool` is never listed as a successor.
        lone_answer: Whether a conversation may consist of a single assistant message.
        weights: Accepted values of a message's `weight`; empty if not supported.
        weighted_roles: Roles whose messages may have a weight.
        parts: Accepted content parts by role, for content that is a list.
        image_schemes: Accepted schemes of image URLs; `data` for inline images.
        image_types: Accepted `image/` subtypes of inline images.
        bare_image: Whether an image URL may be a plain string instead of `{"url": …}`.
        max_images: Maximum images per row.
        call_id: Regular expression that tool call ids must match completely; None: any text.
        call_id_words: Description of `call_id` for messages.
        answers_name_calls: Whether tool messages must repeat the id of their call.
        function_name: Regular expression that function names must match completely.
        function_name_words: Description of `function_name` for messages.
        arguments: Accepted types of a call's arguments.
        legacy_functions: Whether the deprecated `functions` and `function_call` are accepted.
        row_keys: Accepted keys besides those of the row format.
        message_keys: Accepted keys of a message.
        max_answer_messages: Maximum messages in each completion of a preference pair.
        min_rows: Minimum rows of a training file.
        max_rows: Maximum rows of a file.
        max_image_rows: Maximum rows with images per file.
        max_file_bytes: Maximum size of a file.
        shards: Whether a launch splits larger training files between lines.
        validation_max_bytes: Maximum size of the validation set.
        validation_max_share: Maximum size of the validation set, relative to the training set.
        max_invalid_share: Maximum fraction of invalid rows that the provider can skip.
        levels: Severity by finding code, where it differs from the default.
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
    order: Mapping[MessagePosition, tuple[MessagePosition, ...]] = field(
        default_factory=_ORDER.copy
    )
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
    shards: bool = False
    validation_max_bytes: int | None = None
    validation_max_share: float | None = None
    max_invalid_share: float = 0.0
    levels: Mapping[str, Level] = field(default_factory=dict)
