"""The provider formats, as data. Sources and their dates are next to the facts.

A fact without its own source comes from the first source named in its block.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from training_backends.core.data_rules import ProviderFormat

__all__ = ["LOCAL", "MISTRAL", "OPENAI", "PROVIDER_FORMATS", "TOGETHER"]

MISTRAL: Final = ProviderFormat(
    name="mistral",
    # docs.mistral.ai, "Text & Vision Fine-tuning" and "Classifier Factory", 2025-08 (marked
    # deprecated 2026-03-02); SampleType in the published specification. Preference pairs are
    # in neither.
    formats=("messages", "text", "labels"),
    roles=("system", "user", "assistant", "tool"),
    # mistral-common 1.13, MistralRequestValidator in the mode for fine-tuning, 2026-08.
    order={
        "start": ("system", "user", "assistant"),
        "system": ("system", "user", "assistant"),
        "user": ("system", "user", "assistant"),
        "assistant": ("user", "assistant", "end"),
        "tool": ("user", "assistant"),
    },
    lone_answer=False,
    # The same, and the documentation: "an ID of exactly 9 characters".
    call_id=r"[a-zA-Z0-9]{9}",
    call_id_words="exactly 9 letters or digits",
    # The documentation's own limits: 512 MB a file, validation at most 1 MB and 5 %.
    max_file_bytes=512 * 10**6,
    shards=True,
    validation_max_bytes=10**6,
    validation_max_share=0.05,
    # The specification: invalid_sample_skip_percentage is at most 0.5.
    max_invalid_share=0.5,
)

OPENAI: Final = ProviderFormat(
    name="openai",
    # developers.openai.com, guides "Supervised fine-tuning", "Vision fine-tuning" and "Direct
    # preference optimization", 2026-06; `prompt` and `completion` for the base models, schema
    # FineTuneCompletionRequestInput of the OpenAPI document 2.3.0.
    formats=("messages", "preference", "completion"),
    roles=("system", "developer", "user", "assistant", "tool"),
    # No order is documented; a last message of another role is rejected (reports of 2024-09).
    order={
        "start": ("system", "developer", "user", "assistant"),
        "system": ("system", "developer", "user", "assistant"),
        "developer": ("system", "developer", "user", "assistant"),
        "user": ("system", "developer", "user", "assistant"),
        "assistant": ("system", "developer", "user", "assistant", "end"),
        "tool": ("system", "developer", "user", "assistant"),
    },
    # Schema ChatCompletionRequestAssistantMessage and FineTuneChatRequestInput, 2.3.0.
    legacy_functions=True,
    row_keys=("tools", "parallel_tool_calls"),
    message_keys=(
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "weight",
        "refusal",
    ),
    # Guide "Vision fine-tuning": 10 images a row (64 at Azure), 50,000 rows with images,
    # JPEG, PNG or WEBP, none in the assistant's messages.
    image_types=("png", "jpeg", "webp"),
    bare_image=False,
    max_images=10,
    max_image_rows=50_000,
    # Guide "Direct preference optimization": one answer each, the assistant's.
    max_answer_messages=1,
    # Guide "Supervised fine-tuning": at least 10 rows. Files API: 512 MB a file.
    min_rows=10,
    max_file_bytes=512 * 10**6,
    levels={"content_with_tool_calls": "ignored", "undeclared_tool": "error"},
)

TOGETHER: Final = ProviderFormat(
    name="together",
    # docs.together.ai, "Data preparation", 2026-07.
    formats=("messages", "text", "preference", "completion"),
    roles=("system", "user", "assistant", "tool"),
    # "must start with system or user and alternate user and assistant afterwards"; the example
    # with tools ends with a tool's answer.
    order={
        "start": ("system", "user"),
        "system": ("user", "assistant"),
        "user": ("assistant",),
        "assistant": ("user", "end"),
        "tool": ("user", "assistant", "end"),
    },
    # Messages of any role may have a weight, and so may a row.
    weighted_roles=("system", "user", "assistant", "tool"),
    row_keys=("tools", "weight"),
    message_keys=(
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "weight",
        "reasoning",
        "reasoning_content",
    ),
    # "Vision fine-tuning", 2026-07: images as data only, 10 a row, PNG, JPEG or WEBP, in the
    # user's messages.
    image_schemes=("data",),
    image_types=("png", "jpeg", "webp"),
    bare_image=False,
    max_images=10,
    # The example's tool answer has no id.
    answers_name_calls=False,
    # "Each output must contain exactly one assistant message."
    max_answer_messages=1,
    max_file_bytes=100 * 10**9,
    levels={"content_with_tool_calls": "ignored"},
)

LOCAL: Final = ProviderFormat(
    name="local",
    # What `datasets.rows` parses and the trainer encodes; `prompt`, `chosen`, `rejected` are the
    # names of TRL 1.16 ("Dataset formats and types", 2026-07).
    formats=("messages", "text", "labels", "preference", "chosen"),
    roles=("system", "developer", "user", "assistant", "tool"),
    order={
        "start": ("system", "developer", "user", "assistant"),
        "system": ("system", "developer", "user", "assistant"),
        "developer": ("system", "developer", "user", "assistant"),
        "user": ("system", "developer", "user", "assistant"),
        "assistant": ("user", "assistant", "end"),
        "tool": ("user", "assistant"),
    },
    # The trainer supports text only.
    parts={
        "system": ("text",),
        "developer": ("text",),
        "user": ("text",),
        "assistant": ("text",),
        "tool": ("text",),
    },
    arguments=("string", "object"),
    # Mistral's tokenizers reject other ids; those of other models accept any.
    call_id=r"[a-zA-Z0-9]{9}",
    call_id_words="exactly 9 letters or digits for Mistral's tokenizers",
    levels={
        "bad_call_id": "warning",
        "bad_function_name": "warning",
        "misplaced_weight": "warning",
    },
)

PROVIDER_FORMATS: Final[Mapping[str, ProviderFormat]] = MappingProxyType(
    {
        provider_format.name: provider_format
        for provider_format in (MISTRAL, OPENAI, TOGETHER, LOCAL)
    }
)
"""The provider formats by name."""
