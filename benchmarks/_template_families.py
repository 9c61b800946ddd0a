"""Chat templates of open models, as TRL 1.16 ships them, with tokenizers and rows for them."""

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["CASES", "FAMILIES", "REJECTED", "family_directory", "parse_answer", "parse_call"]

_CONTROL: Final = re.compile(
    r"<\|[^|<>{}'\" ]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|</s>|\[/?INST\]"
    r"|<end_of_utterance>|<\|\"\|>|\[gMASK\]|<sop>"
)
"""What a template writes that is a control token of its model."""

_ENDINGS: Final = re.compile(rf"(?:\s*(?:{_CONTROL.pattern}|<eos>|<\|endoftext\|>))+\s*$")

_ENDS: Final[Mapping[str, str]] = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion": "<eos>",
    "gemma": "<eos>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics": "<|end_of_text|>",
    "lfm": "<|im_end|>",
    "llama": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|end_of_text|>",
    "nemotron": "<|im_end|>",
    "phi": "<|endoftext|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
"""The end-of-text token of the tokenizers, by the start of a family's name."""

_BEGINS: Final[Mapping[str, str]] = {
    "cohere": "<BOS_TOKEN>",
    "deepseek": "<｜begin▁of▁sentence｜>",
    "diffusion": "<bos>",
    "gemma": "<bos>",
    "llama": "<|begin_of_text|>",
    "lfm": "<|startoftext|>",
    "muse": "<|begin_of_text|>",
    "phi": "<s>",
}


def _folder() -> Path:
    return Path(str(distribution("trl").locate_file("trl/chat_templates")))


FAMILIES: Final = tuple(
    sorted(path.stem for path in _folder().glob("*.jinja") if not path.stem.endswith("_training"))
)


def family_directory(family: str, directory: Path) -> Path:
    """Write a byte-level tokenizer with the control tokens and the template of a family."""
    template = (_folder() / f"{family}.jinja").read_text(encoding="utf-8")
    begin, end = (
        next((token for name, token in table.items() if family.startswith(name)), None)
        for table in (_BEGINS, _ENDS)
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [*filter(None, (begin, end)), *sorted({*_CONTROL.findall(template)})]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(tokens)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": begin, "eos_token": end, "tokenizer_class": "TokenizersBackend"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_ARGUMENTS: Final = '{"city": "Rome", "days": 3}'
_CALL: Final = {
    "id": "D681PevKs",
    "type": "function",
    "function": {"name": "weather", "arguments": _ARGUMENTS},
}
_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "A city"},
        "days": {"type": "integer", "description": "Days"},
    },
    "required": ["city"],
}
_TOOL: Final = {
    "type": "function",
    "function": {"name": "weather", "description": "The forecast", "parameters": _SCHEMA},
}

CASES: Final[Mapping[str, dict[str, Any]]] = {
    "single turn": {"messages": [_user("Is it far?"), _answer("Two stops.")]},
    "multi-turn": {
        "messages": [
            _user("Is it far?"),
            _answer("Two stops."),
            _user("And back?"),
            _answer("Three."),
            _user("Thanks."),
            _answer("Any time."),
        ]
    },
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            _user("Is it far?"),
            _answer("Two stops."),
        ]
    },
    "tools": {
        "messages": [
            _user("Is it raining in Rome?"),
            {"role": "assistant", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "D681PevKs", "name": "weather", "content": "sunny"},
            _answer("No, it is sunny."),
        ],
        "tools": [_TOOL],
    },
    "thinking": {
        "messages": [
            _user("Is it far?"),
            _answer("Two stops.", reasoning_content="Count the stops."),
            _user("And back?"),
            _answer("Three.", reasoning_content="Another line."),
        ]
    },
}
"""Rows with what chats consist of."""


_PLAIN: Final = ("single turn", "multi-turn", "system", "tools")

REJECTED: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            *("cohere", "cohere2", "gemma3", "idefics3", "lfm2", "llama3", "llava_next"),
            *("phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
        ),
        ("tools", "thinking"),
    ),
    **dict.fromkeys(
        (
            *("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "lfm2_v2", "llama3_1", "llama3_2"),
            *("qwen2_5", "qwen3_5_nothink", "qwen3_instruct_2507", "qwen3_vl"),
        ),
        ("thinking",),
    ),
    "gemma": ("system", "tools", "thinking"),
    # Their generation prompts start a thought, which must be part of an answer.
    **{family: _PLAIN for family in FAMILIES if family.startswith("nemotron")},
    # Their answers do not continue their generation prompt.
    "deepseek_r1_distill": (*_PLAIN, "thinking"),
    "deepseekv3": (*_PLAIN, "thinking"),
}
"""The cases that a template has no text for, or would leave something out of."""

_THOUGHTS: Final = (
    r"analysis<\|message\|>(.*?)<\|end\|>",
    r"to=self<\|message\|>(.*?)<\|eom\|>",
    r"<\|channel>thought\n(.*?)<channel\|>",
    r"<think>(.*?)</think>",
    r"^(.*?)</think>",
)


def parse_answer(text: str) -> tuple[str, str]:
    """Return the reasoning and the content of an answer, in any family's notation."""
    found = (re.search(pattern, text, re.DOTALL) for pattern in _THOUGHTS)
    thought = next(filter(None, found), None)
    rest = _ENDINGS.sub("", text[thought.end() :] if thought else text)
    content = rest.rpartition("<|message|>")[2].removeprefix("<|turn>model\n")
    return (thought[1].strip() if thought else "", content.strip())


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Return the function and the arguments of the call in a text, in any family's notation."""
    if found := re.search(
        r"<function=(\w+)>(.*?)</function>", text, re.DOTALL
    ):  # Qwen 3.5, Nemotron
        pairs = re.findall(r"<parameter=(\w+)>\n(.*?)\n</parameter>", found[2], re.DOTALL)
    elif found := re.search(r"<tool_call>(\w+)\n(.*?)</tool_call>", text, re.DOTALL):  # GLM
        pairs = re.findall(
            r"<arg_key>(\w+)</arg_key>\n<arg_value>(.*?)</arg_value>", found[2], re.DOTALL
        )
    elif found := re.search(
        r'<atem:invoke name="(\w+)">(.*?)</atem:invoke>', text, re.DOTALL
    ):  # Muse
        pairs = re.findall(r'name="(\w+)">(.*?)</atem:parameter>', found[2], re.DOTALL)
    elif found := re.search(r"call:(\w+)\{(.*)\}", text):  # Gemma 4
        pairs = re.findall(r'(\w+):(?:<\|"\|>)?(.*?)(?:<\|"\|>)?(?:,|$)', found[2])
    elif found := re.search(r"\[(\w+)\((.*)\)\]", text):  # LFM 2
        pairs = re.findall(r"(\w+)=(.*?)(?:, |$)", found[2])
    else:
        return _parse_json_call(text)
    return found[1], {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


def _parse_json_call(text: str) -> tuple[str, dict[str, Any]]:
    named = re.search(r"functions\.(\w+)|<｜tool▁sep｜>(\w+)", text)  # gpt-oss, DeepSeek
    start = text.index("{")
    found, _ = json.JSONDecoder().raw_decode(text, start)
    if named:
        return named[1] or named[2], found
    return found["name"], found.get("arguments", found.get("parameters"))
