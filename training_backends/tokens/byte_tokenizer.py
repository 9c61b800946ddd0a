"""The byte-level tokenizer of `tiny-mistral` for transformers.

It produces the same ids as `datasets.rows.byte_encode`.
"""

from pathlib import Path
from typing import Any, Final

from training_backends.core.config import TINY_POSITIONS
from training_backends.datasets.rows import CONTROL_TEXT, Control

__all__ = ["CHAT_TEMPLATE", "save_tiny_tokenizer"]

# Text must never become a control token, but tokenizers search for control tokens in the output
# of the template. The template therefore escapes every "[" and "<" of a message with this mark (a
# code point that Unicode reserves for internal use), and the normalizer, which runs after the
# search for control tokens, removes it.
_MARK: Final = "\ufdd0"
_ESCAPES: Final = ((_MARK, f"{_MARK}0"), ("[", f"{_MARK}1"), ("<", f"{_MARK}2"))

_FILTERS: Final = "".join(f"|replace({plain!r}, {marked!r})" for plain, marked in _ESCAPES)

CHAT_TEMPLATE: Final = (
    "{%- macro put(text) -%}{{ text" + _FILTERS + " }}{%- endmacro -%}"
    "{%- macro content(message) -%}"
    "{%- if message.content is string -%}{{ put(message.content) }}"
    "{%- elif message.content -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{{ put(part.text or '') }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{{ '<s>' }}"
    "{%- if tools -%}"
    "{{ '[AVAILABLE_TOOLS]' }}{{ put('[') }}"
    "{%- for tool in tools -%}"
    "{%- if not loop.first -%}{{ ', ' }}{%- endif -%}"
    "{{ put({'name': tool.function.name, 'description': tool.function.description or '',"
    " 'parameters': tool.function.parameters or {}}|tojson) }}"
    "{%- endfor -%}"
    "{{ put(']') }}{{ '[/AVAILABLE_TOOLS]' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ '[INST]' + content(message) + '[/INST]' }}"
    "{%- elif message.role == 'tool' -%}"
    "{{ '[TOOL_RESULTS]' + put(message.tool_call_id or '') + '[TOOL_CONTENT]'"
    " + content(message) + '[/TOOL_RESULTS]' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ content(message) }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set given = call.function.arguments if call.function.arguments is defined else '{}' -%}"
    "{%- set arguments = given if given is string else given|tojson -%}"
    "{{ '[TOOL_CALLS]' + put(call.function.name) + '[CALL_ID]' + put(call.id or '')"
    " + '[ARGS]' + put(arguments) }}"
    "{%- endfor -%}"
    "{{ '</s>' }}"
    "{%- else -%}{{ '[SYSTEM_PROMPT]' + content(message) + '[/SYSTEM_PROMPT]' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def _make_tiny_tokenizer() -> Any:
    """Build the tokenizer, whose ids are bytes and control tokens, with its chat template."""
    from tokenizers import (  # noqa: PLC0415  # optional
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  # loads torch

    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(marked, plain) for plain, marked in reversed(_ESCAPES)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in CONTROL_TEXT.values()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=CONTROL_TEXT[Control.BOS],
        eos_token=CONTROL_TEXT[Control.EOS],
        pad_token=CONTROL_TEXT[Control.PAD],
        model_max_length=TINY_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _vocabulary() -> dict[str, int]:
    """Return the vocabulary: bytes by their byte-level BPE names, and control tokens."""
    names = _byte_names()
    controls = {text: int(control) for control, text in CONTROL_TEXT.items()}
    return {names[value]: value for value in range(256)} | controls


def _byte_names() -> dict[int, str]:
    # Byte-level BPE writes printable bytes as themselves and the others as U+0100 onwards.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(0x100 + position) for position, value in enumerate(others)
    }


def save_tiny_tokenizer(directory: Path) -> None:
    """Write the tokenizer and its chat template for `AutoTokenizer.from_pretrained`."""
    _make_tiny_tokenizer().save_pretrained(directory)
