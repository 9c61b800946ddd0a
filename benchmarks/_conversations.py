"""Reproducible rows of every format, with text that is hard to tokenize."""

import json
import random
import string
from base64 import b64encode
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any, Final

__all__ = ["FORMATS", "make_row"]

Row = dict[str, Any]

_ENGLISH: Final = (
    "the model answers a question about training data and explains each step of the result "
    "However, I don't think that it's what they've asked for; we'll see. HTTPServer parseJSON"
)
_FRENCH: Final = (
    "l'élève répond à la question où naît déjà une forêt œuvre français « peut-être » ; "
    "aujourd'hui ça n'était qu'un hôtel près d'Orléans\N{NO-BREAK SPACE}! GARÇON Noël"
)
_CJK: Final = (
    "日本語の文章は空白なしで書かれます。中文也没有空格，한국어는 조금"
    " 다릅니다！ไทย हिन्दी العربية עברית"
)
_EMOJI: Final = (
    "😀",
    "👩‍💻",
    "🇫🇷",
    "👍🏽",
    "❤️",
    "🧑🏿‍🚀",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "☺",
    "½",
    "①",
    "Ⅷ",
    "ﬁ",
    "Å",
    "e\u0301",
)
_SPACES: Final = (
    "  ", "\t", "\n\n\n", " \n", "\r\n", "\r", "\N{NO-BREAK SPACE}", "\u3000", "\u2009\u200a",
    "\u200b", "\u2028", "\x0b\x0c", "\x1c\x1f", "\x85", "\ufeff", "        ", "\n    \n  ", "\x00",
)  # fmt: skip
_CONTROLS: Final = (
    "[INST]", "[/INST]", "<s>", "</s>", "<unk>", "<pad>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "<0x0A>", "▁", "▁▁", "[control_8]", "<SPECIAL_20>",
)  # fmt: skip
_CODE: Final = (
    "def area(width: float) -> float:\n    if width < 0:\n        return 0.0  # m²\n",
    'for (int i = 0; i < n; ++i) {\n\t\tprintf("%d\\n", a[i]);\n}\n',
    "SELECT * FROM runs WHERE name LIKE 'ft:%' AND n >= 1e-3;\n",
    "<div class=\"a\">\n  <!-- x -->\n  &nbsp;</div>\r\n",
    "$ curl -s https://example.org/v1/files?page=0&size=10 | jq '.data[]'\n",
)  # fmt: skip


def _words(chance: random.Random) -> str:
    words = _ENGLISH if chance.random() < 0.6 else _FRENCH
    return " ".join(chance.choices(words.split(" "), k=chance.randint(1, 25)))


def _cjk(chance: random.Random) -> str:
    start = chance.randrange(len(_CJK))
    return _CJK[start : start + chance.randint(1, 30)]


def _anything(chance: random.Random) -> str:
    codes = [chance.randrange(0x20, 0xD800) for _ in range(5)]
    codes += [chance.randrange(0xE000, 0x20000) for _ in range(3)]
    return "".join(map(chr, codes))


def _digits(chance: random.Random) -> str:
    return str(chance.choice((chance.randrange(10**12), chance.random(), -1e-7, "3.14.15")))


def _spaced(chance: random.Random) -> str:
    return chance.choice(_SPACES) * chance.randint(1, 3)


_PIECES: Final[tuple[tuple[Callable[[random.Random], str], int], ...]] = (
    (_words, 10),
    (_cjk, 2),
    (_anything, 1),
    (_digits, 2),
    (_spaced, 3),
    (lambda chance: chance.choice(_EMOJI), 2),
    (lambda chance: chance.choice(_CONTROLS), 2),
    (lambda chance: chance.choice(_CODE), 2),
    (lambda chance: chance.choice("abcé \n") * chance.randint(1, 200), 1),
)
_MAKERS: Final = [maker for maker, _ in _PIECES]
_WEIGHTS: Final = [weight for _, weight in _PIECES]


def text(chance: random.Random) -> str:
    """Return a non-empty text."""
    made = chance.choices(_MAKERS, _WEIGHTS, k=chance.randint(1, 8))
    return chance.choice(("", " ", "\n")).join(maker(chance) for maker in made) or "x"


def _content(chance: random.Random) -> Any:
    if chance.random() < 0.1:
        return [{"type": "text", "text": text(chance)} for _ in range(chance.randint(1, 3))]
    return text(chance)


def _answer(chance: random.Random) -> Row:
    message = {"role": "assistant", "content": _content(chance)}
    if chance.random() < 0.2:
        message["weight"] = chance.choice((0, 1))
    if chance.random() < 0.1 and isinstance(message["content"], str):
        message["content"] += chance.choice((" ", "   ", "\n ", " \t"))
    return message


def _exchange(chance: random.Random) -> list[Row]:
    return [{"role": "user", "content": _content(chance)}, _answer(chance)]


def _with_system(chance: random.Random, messages: list[Row]) -> list[Row]:
    """Insert system prompts: mostly at the start, sometimes at unusual positions."""
    prompt = {"role": chance.choice(("system", "system", "developer")), "content": _content(chance)}
    kind = chance.random()
    if kind < 0.4:
        return [prompt, *messages]
    if kind < 0.5:
        return [prompt, {"role": "system", "content": text(chance)}, *messages]
    if kind < 0.65:
        users = [place for place, each in enumerate(messages) if each["role"] == "user"]
        place = chance.choice(users)
        return [*messages[: place + 1], prompt, *messages[place + 1 :]]
    return messages


def instruct(chance: random.Random) -> Row:
    """Return a conversation, sometimes with consecutive messages of one role."""
    messages = [each for _ in range(chance.randint(1, 4)) for each in _exchange(chance)]
    if chance.random() < 0.15:
        place = chance.randrange(len(messages))
        copy = {**messages[place], "content": _content(chance)}
        messages.insert(place, copy)
    if chance.random() < 0.05:
        messages = [{"role": "assistant", "content": text(chance)}, *messages]
    if chance.random() < 0.05:
        messages[0] = (
            {**messages[0], "content": ""} if messages[0]["role"] == "user" else messages[0]
        )
    return {"messages": _with_system(chance, messages)}


def _value(chance: random.Random, depth: int = 2) -> Any:
    kind = chance.randrange(8 if depth else 6)
    if kind == 6:
        return [_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if kind == 7:
        return {text(chance)[:9]: _value(chance, depth - 1) for _ in range(chance.randint(0, 3))}
    simple = (None, True, chance.randint(-(10**6), 10**18), chance.random() * 1e9, 1e-9)
    return text(chance) if kind == 5 else simple[kind]


def _arguments(chance: random.Random) -> Any:
    value = {"q": text(chance), "n": _value(chance)}
    kind = chance.random()
    if kind < 0.15:
        return value
    if kind < 0.25:
        return chance.choice(("", "{}", " {} ", "{not json", "null", '"x"', "[1, 2.50, 1E5]"))
    indent = chance.choice((None, None, 2))
    return json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=indent)


def _call(chance: random.Random, name: str) -> Row:
    call: Row = {
        "id": "".join(chance.choices(string.ascii_letters + string.digits, k=9)),
        "function": {"name": name, "arguments": _arguments(chance)},
    }
    return call if chance.random() < 0.3 else {**call, "type": "function"}


def _result(chance: random.Random, call: Row) -> Row:
    content: Any = chance.choice(("", "42", "not json", "NaN", '{"a": 1.0}', text(chance)))
    if chance.random() < 0.5:
        content = json.dumps(_value(chance), ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.1:
        content = [{"type": "text", "text": text(chance)}]
    message = {"role": "tool", "tool_call_id": call["id"], "content": content}
    return {**message, "name": call["function"]["name"]} if chance.random() < 0.6 else message


def _tool(chance: random.Random, name: str) -> Row:
    parameters = {
        "type": "object",
        "properties": {"q": {"type": "string", "description": text(chance)}, "n": {}},
        "required": ["q"],
    }
    function = {"name": name, "parameters": parameters if chance.random() < 0.8 else {}}
    if chance.random() < 0.8:
        function["description"] = text(chance)
    return {"type": "function", "function": function}


def _tool_exchange(chance: random.Random, names: list[str]) -> list[Row]:
    calls = [_call(chance, name) for name in chance.sample(names, chance.choice((1, 1, 2)))]
    asking: Row = {"role": "assistant", "tool_calls": calls}
    kind = chance.random()
    if kind < 0.5:
        asking["content"] = ""
    elif kind < 0.6:
        asking["content"] = text(chance)
    results = [_result(chance, call) for call in calls]
    chance.shuffle(results)
    return [{"role": "user", "content": _content(chance)}, asking, *results, _answer(chance)]


def tools(chance: random.Random) -> Row:
    """Return a conversation with tool calls and their results."""
    names = ["get_weather", "search-docs", "f"]
    messages: list[Row] = []
    for _ in range(chance.randint(1, 3)):
        messages += _tool_exchange(chance, names) if chance.random() < 0.7 else _exchange(chance)
    if chance.random() < 0.15:
        last = {"role": "assistant", "tool_calls": [_call(chance, "f")]}
        messages += [{"role": "user", "content": text(chance)}, last]
    row: Row = {"messages": _with_system(chance, messages)}
    if chance.random() < 0.9:
        row["tools"] = [_tool(chance, name) for name in names]
    return row


def _break_role(chance: random.Random, row: Row) -> None:
    chance.choice(row["messages"])["role"] = chance.choice(("user", "assistant", "system", "tool"))


def _break_order(chance: random.Random, row: Row) -> None:
    chance.shuffle(row["messages"])


def _break_end(chance: random.Random, row: Row) -> None:
    row["messages"] = row["messages"][: chance.randrange(len(row["messages"]))]


def _break_content(chance: random.Random, row: Row) -> None:
    chance.choice(row["messages"])["content"] = chance.choice(("", None, [], " "))


def _break_call(chance: random.Random, row: Row) -> None:
    for message in row["messages"]:
        for call in message.get("tool_calls") or ():
            if chance.random() < 0.5:
                call["id"] = chance.choice(("short", "null", "", "abcdefgh-", "abcdefgh1"))
            else:
                call["function"]["name"] = chance.choice(("a b", "", "x" * 65, "é"))
        if "tool_call_id" in message and chance.random() < 0.5:
            message["tool_call_id"] = "abcdefgh1"


def _break_tool(chance: random.Random, row: Row) -> None:
    for tool in row.get("tools") or ():
        tool["function"]["parameters"] = chance.choice(({"type": "nonsense"}, {"required": 1}))


def odd(chance: random.Random) -> Row:
    """Return a conversation that may be rejected."""
    row = tools(chance) if chance.random() < 0.6 else instruct(chance)
    breaks = (_break_role, _break_order, _break_end, _break_content, _break_call, _break_tool)
    chance.choice(breaks)(chance, row)
    return row


def pretrain(chance: random.Random) -> Row:
    """Return a plain text."""
    return {"text": "\n".join(text(chance) for _ in range(chance.randint(1, 4)))}


@lru_cache
def _picture(width: int, height: int, kind: str) -> str:
    from PIL import Image  # noqa: PLC0415  # comes with mistral-common

    file = BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, kind)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def _image(chance: random.Random) -> Row:
    sizes = (1, 15, 16, 17, 200, 640, 1023, 1024, 1025, 3000)
    url: Any = _picture(chance.choice(sizes), chance.choice(sizes), chance.choice(("png", "jpeg")))
    if chance.random() < 0.5:
        url = {"url": url, "detail": "auto"} if chance.random() < 0.3 else {"url": url}
    return {"type": "image_url", "image_url": url}


def vision(chance: random.Random) -> Row:
    """Return a conversation with inline images."""
    row = instruct(chance)
    for message in row["messages"]:
        if message["role"] == "user" and chance.random() < 0.7:
            parts = [_image(chance)]
            for _ in range(chance.randint(0, 3)):
                words = {"type": "text", "text": chance.choice(("", text(chance), text(chance)))}
                parts.insert(chance.randint(0, len(parts)), words)
            if chance.random() < 0.2:
                parts.insert(chance.randint(0, len(parts)), _image(chance))
            message["content"] = parts
    return row


def preference(chance: random.Random) -> Row:
    """Return a preference pair in one of the two known forms."""
    asked = _exchange(chance) if chance.random() < 0.3 else []
    prompt = _with_system(chance, [*asked, {"role": "user", "content": _content(chance)}])
    if prompt[-1]["role"] != "user":
        prompt.append({"role": "user", "content": text(chance)})
    good, bad = ([_answer(chance)] for _ in range(2))
    kind = chance.random()
    if kind < 0.4:
        given: Row = {"messages": prompt}
        if chance.random() < 0.3:
            given["tools"] = [_tool(chance, "f")]
        return {"input": given, "preferred_output": good, "non_preferred_output": bad}
    if kind < 0.7:
        return {"prompt": prompt, "chosen": good, "rejected": bad}
    if kind < 0.85:
        return {"chosen": [*prompt, *good], "rejected": [*prompt, *bad]}
    return {"prompt": text(chance), "chosen": text(chance), "rejected": text(chance)}


FORMATS: Final[dict[str, Callable[[random.Random], Row]]] = {
    "instruct": instruct,
    "function calling": tools,
    "vision": vision,
    "pretrain": pretrain,
    "preference": preference,
    "odd rows": odd,
}


def make_row(form: str, number: int) -> bytes:
    """Return row `number` of a format as a line of a file."""
    chance = random.Random(f"{form} {number}")
    return json.dumps(FORMATS[form](chance), ensure_ascii=chance.random() < 0.3).encode()
