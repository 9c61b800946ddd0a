"""Reproducible chats for benchmarks: English, French and code, a tenth with tool calls."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

__all__ = ["chat_rows", "write_chats"]

_TEXTS: Final = (
    (
        "the a of and to in model training data costs answer because when each service would if "
        "which small large number first other time line question people machine result change "
        "keeps reads writes finds needs gives slowly again never always today before behind"
    ),
    (
        "le la les une des modèle données réponse été être parce que lorsque chaque très fenêtre "
        "français élève côté où déjà après même coût première leçon tâche naïf forêt œuvre "
        "apprend écrit trouve donne lentement jamais toujours aujourd'hui avant derrière"
    ),
)
_ENGLISH, _FRENCH = (text.split() for text in _TEXTS)
_CODE: Final = (
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    'for name, value in sorted(items.items()):\n    print(f"{name}\\t{value:>8.2f}")\n',
    "class Stack:\n    def __init__(self) -> None:\n        self._items: list[int] = []\n",
    'if (!response.ok) {\n  throw new Error("refused: " + response.status);\n}\n',
    "SELECT name, COUNT(*) AS n FROM runs WHERE status = 'done' GROUP BY name;\n",
    "try:\n    data = json.loads(path.read_text())\nexcept ValueError as error:\n    raise\n",
)
_CITIES: Final = ("Paris", "Lyon", "Genève", "London", "Zürich", "Dublin", "Orléans", "Leeds")
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city."},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


def _prose(chance: random.Random, words: list[str], length: int) -> str:
    sentences = []
    while length > 0:
        count = min(length, chance.randint(6, 18))
        length -= count
        sentences.append(" ".join(chance.choices(words, k=count)).capitalize() + ".")
    return " ".join(sentences)


def _text(chance: random.Random, length: int) -> str:
    kind = chance.random()
    if kind < 0.5:
        return _prose(chance, _ENGLISH, length)
    if kind < 0.8:
        return _prose(chance, _FRENCH, length)
    code = "".join(chance.choices(_CODE, k=max(1, length // 16)))
    return f"{_prose(chance, _ENGLISH, 8)}\n\n```\n{code}```\n"


def _weather(chance: random.Random) -> list[dict[str, Any]]:
    city = chance.choice(_CITIES)
    call_id = "".join(chance.choices(_LETTERS, k=9))
    arguments = msgspec.json.encode({"city": city, "unit": "celsius"}).decode()
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": "get_weather", "arguments": arguments},
    }
    result = f'{{"city": "{city}", "degrees": {chance.randint(-5, 35)}}}'
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": result},
        {"role": "assistant", "content": f"In {city}: {_text(chance, 30)}"},
    ]


def chat_rows(seed: int = 0) -> Iterator[bytes]:
    """Yield valid rows of about 1.5 kB indefinitely."""
    chance = random.Random(seed)
    encode = msgspec.json.encode
    while True:
        messages: list[dict[str, Any]] = []
        if chance.random() < 0.4:
            messages.append({"role": "system", "content": _text(chance, chance.randint(8, 40))})
        uses_tools = chance.random() < 0.1
        if uses_tools:
            messages += _weather(chance)
        for _ in range(chance.choice((1, 1, 1, 2, 2, 3))):
            messages.append({"role": "user", "content": _text(chance, chance.randint(8, 60))})
            answer = _text(chance, chance.randint(25, 150))
            messages.append({"role": "assistant", "content": answer})
        row: dict[str, Any] = {"messages": messages}
        if uses_tools:
            row["tools"] = [_TOOL]
        yield encode(row) + b"\n"


def write_chats(path: Path, size: int, *, seed: int = 0) -> int:
    """Write at least `size` bytes of rows; return their number."""
    rows = written = 0
    with path.open("wb") as file:
        for row in chat_rows(seed):
            rows += 1
            written += file.write(row)
            if written >= size:
                break
    return rows
