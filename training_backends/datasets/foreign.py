"""Convert data of other tools (Alpaca, ShareGPT, tables, JSON arrays, saved datasets) to chats."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from training_backends.core.errors import ConfigError, DatasetError, Issue, suggest
from training_backends.datasets.open_file import STDIN, expand, opened, unreadable
from training_backends.datasets.scan_part import BOM
from training_backends.datasets.write import NewFiles, refuse_existing

__all__ = ["Columns", "ConvertedData", "convert_data"]

_ROLES: Final = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Names of the roles in other tools, and ours."""
_PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
    ("instruction", "response"),
)
_OURS: Final = ({"messages"}, {"text"}, {"input", "preferred_output"}, {"prompt", "chosen"})
"""Keys of rows that are already in a format of `docs/data.md`."""
_MOST_ISSUES: Final = 100
_LONGEST_CELL: Final = 16 << 20
_MOST_ARRAY: Final = 1 << 30
"""Bytes; a JSON array is read as a whole."""

Row = dict[str, Any]


class Columns(NamedTuple):
    """Names of the columns of a table; None: found by their names."""

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedData:
    """The result of a conversion.

    Attributes:
        path: The file written.
        rows: Number of rows in it.
        formats: Rows by the format that they were in.
        issues: Rows that were left out.
    """

    path: Path
    rows: int
    formats: Mapping[str, int]
    issues: tuple[Issue, ...] = ()


def convert_data(
    paths: Sequence[Path],
    target: Path,
    *,
    columns: Columns | None = None,
    skip_invalid: bool = False,
    force: bool = False,
) -> ConvertedData:
    """Write the rows of data files of other tools as JSON Lines of chats.

    Reads JSON Lines, JSON arrays, CSV, TSV and Parquet, compressed or not, directories of them, and
    directories written by `Dataset.save_to_disk`. Rows that are in a format of ours are copied.

    Args:
        columns: Columns of a table that holds prompts and answers.
        skip_invalid: Leave out rows that cannot be converted.
        force: Overwrite `target`.

    Raises:
        ConfigError: `target` already exists.
        DatasetError: A file cannot be read, or a row cannot be converted; nothing is written.
        TrainingBackendError: `target` cannot be written.
    """
    if not force:
        refuse_existing(target)
    work = _Work(columns or Columns())
    with NewFiles() as made, made.create(target) as out:
        for path in paths:
            for place, row in _rows_of(path):
                if (found := work.converted(path, place, row)) is not None:
                    out.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")
        if work.invalid and not (skip_invalid and work.formats):
            count = f"{work.invalid} of {work.invalid + sum(work.formats.values())} rows"
            raise DatasetError(
                f"{count} cannot be converted; nothing was written.",
                issues=work.issues,
                hint="Name the columns with --prompt and --answer, or leave such rows out with "
                "--skip-invalid.",
            )
        if not work.formats:
            raise DatasetError("There are no rows to convert; nothing was written.")
    return ConvertedData(
        path=target,
        rows=sum(work.formats.values()),
        formats=dict(work.formats.most_common()),
        issues=tuple(replace(issue, severity="warning") for issue in work.issues),
    )


class _Work:
    """One pass over all rows."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.formats: Counter[str] = Counter()
        self.issues: list[Issue] = []
        self.invalid = 0

    def converted(self, path: Path, place: int, row: Any) -> Row | None:
        """Return a row as a chat; None, with an issue, if that is not possible."""
        try:
            name, found = _chat_of(row, self._columns)
        except _Unfit as error:
            self.invalid += 1
            if len(self.issues) < _MOST_ISSUES:
                self.issues.append(
                    Issue(code="unknown_row_format", message=str(error), path=str(path), line=place)
                )
            return None
        self.formats[name] += 1
        return found


class _Unfit(Exception):
    """A row cannot be converted."""


def _chat_of(row: Any, columns: Columns) -> tuple[str, Row]:
    """Return the name of a row's format, and the row as a chat."""
    if not isinstance(row, dict):
        raise _Unfit(f"expected an object, not {type(row).__name__}")
    if columns.prompt or columns.answer:
        return "columns", _from_columns(row, columns)
    row = {name: value for name, value in row.items() if value is not None}
    for keys, name, convert in _FORMATS:
        if row.keys() >= keys:
            return name, convert(row)
    if any(row.keys() >= keys for keys in _OURS):
        return "unchanged", row
    for prompt, answer in _PAIRS:
        if row.keys() >= {prompt, answer}:
            return f"{prompt} and {answer}", _from_columns(row, Columns(prompt, answer))
    raise _Unfit(f"unknown keys: {', '.join(map(repr, [*row][:8])) or 'none'}")


def _from_columns(row: Row, columns: Columns) -> Row:
    if columns.prompt is None or columns.answer is None:
        raise ConfigError("Both the prompt's and the answer's column are needed.")
    parts = [("system", columns.system or "system"), ("user", columns.prompt)]
    parts.append(("assistant", columns.answer))
    messages = []
    for role, name in parts:
        value = row.get(name)
        if value is None and role == "system" and columns.system is None:
            continue
        if value is None:
            known = [str(key) for key in row]
            fix = suggest(name, known, f"the row has {', '.join(map(repr, known[:8]))}")
            raise _Unfit(f"no column {name!r}: {fix}")
        if isinstance(value, list) and role == "user":
            messages += [_message(each) for each in value]
        else:
            messages.append({"role": role, "content": _text(value, name)})
    return {"messages": messages}


def _from_alpaca(row: Row) -> Row:
    """Join the instruction and its input by a blank line, as Alpaca's own prompt does."""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], "system")})
    for turn in row.get("history") or ():
        if not (isinstance(turn, list) and len(turn) == 2):
            raise _Unfit("history: expected pairs of a prompt and an answer")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _text(text, "history")})
    prompt = [_text(row[name], name) for name in ("instruction", "input") if row.get(name)]
    messages.append({"role": "user", "content": "\n\n".join(prompt)})
    messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return {"messages": messages}


def _from_sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if isinstance(turns, str):
        with suppress(ValueError, RecursionError):  # a cell of a table
            turns = json.loads(turns)
    if not isinstance(turns, list) or not turns:
        raise _Unfit("conversations: expected a list of turns")
    messages = [_message(turn) for turn in turns]
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    tools = row.get("tools")
    if isinstance(tools, str):
        with suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _from_gemini(row: Row) -> Row:
    turns = row["contents"]
    system = row.get("systemInstruction")
    if not isinstance(turns, list) or not turns:
        raise _Unfit("contents: expected a list of turns")
    given = [{"role": "system", **system}] if isinstance(system, dict) else []
    return {"messages": [_message(turn) for turn in (*given, *turns)]}


def _message(turn: Any) -> Row:
    """Return a message of ours for a turn of another tool."""
    if not isinstance(turn, dict):
        raise _Unfit(f"expected a turn as an object, not {type(turn).__name__}")
    word = turn.get("from", turn.get("role"))
    role = _ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise _Unfit(f"unknown role {word!r}")
    parts = turn.get("parts")
    if isinstance(parts, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        return {"role": role, "content": "".join(_text(text, "parts") for text in texts)}
    content = turn.get("value", turn.get("content"))
    rest = {
        key: turn[key] for key in ("tool_calls", "tool_call_id", "name", "weight") if key in turn
    }
    if content is None and "tool_calls" in rest:
        return {"role": role, **rest}
    if isinstance(content, list):
        return {"role": role, "content": content, **rest}
    return {"role": role, "content": _text(content, "value"), **rest}


def _text(value: Any, name: str) -> str:
    """Return a cell as text; numbers of tables are texts, too."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _Unfit(f"{name}: expected a text, not {type(value).__name__}")


_FORMATS: Final[tuple[tuple[set[str], str, Callable[[Row], Row]], ...]] = (
    ({"conversations"}, "ShareGPT", _from_sharegpt),
    ({"contents"}, "Gemini", _from_gemini),
    ({"instruction", "output"}, "Alpaca", _from_alpaca),
)


def _rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file or directory, each with its line or number."""
    if path.is_dir():
        yield from _rows_of_directory(path)
    elif path.suffix.lower() in {".csv", ".tsv"}:
        yield from _rows_of_table(path)
    elif path.suffix.lower() == ".arrow":
        yield from enumerate(_rows_of_arrow(path), 1)
    elif path != STDIN and _is_array(path):
        yield from enumerate(_rows_of_array(path), 1)
    else:
        with opened(path) as source:
            for number, line in enumerate(source.lines, 1):
                if text := line.removeprefix(BOM).strip():
                    yield number, _parsed(path, number, text)


def _rows_of_directory(path: Path) -> Iterator[tuple[int, Any]]:
    """Read what `Dataset.save_to_disk` wrote, or all data files."""
    if (path / "dataset_dict.json").is_file():
        raise DatasetError(
            f"{path} has several splits.",
            hint=f"Name one: {', '.join(str(each.parent) for each in _states(path))}.",
        )
    state = path / "state.json"
    if state.is_file():
        try:
            names = [each["filename"] for each in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{state} is not that of a saved dataset.") from error
        for name in names:
            yield from _rows_of(path / Path(name).name)
        return
    for each in expand([path]):
        yield from _rows_of(each)


def _states(path: Path) -> list[Path]:
    return sorted(path.glob("*/state.json"))


def _rows_of_arrow(path: Path) -> Iterator[Any]:
    """Read an Arrow stream, a batch at a time."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise DatasetError(
            f"{path} cannot be read: pyarrow is not installed.",
            hint="pip install 'training-backends[parquet]'",
        ) from error
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _rows_of_table(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                cells = {name: cell for name, cell in row.items() if name is not None}
                if None in row or None in cells.values():
                    count = len(reader.fieldnames or ())
                    raise _unusable(path, reader.line_num, f"the header has {count} columns")
                yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, OSError):
            raise DatasetError(
                f"{path} cannot be read.", issues=[unreadable(path, error)]
            ) from error
        raise _unusable(path, None, str(error)) from error


def _delimiter(file: io.TextIOWrapper) -> str:
    """Return the delimiter of the header: the most frequent of comma, semicolon and tab."""
    header = file.readline()
    file.seek(0)
    return max(",;\t", key=header.count)


def _is_array(path: Path) -> bool:
    """Return whether an uncompressed file is one JSON array."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).removeprefix(BOM).lstrip()[:1] == b"["
    except OSError:
        return False  # reported by who opens it


def _rows_of_array(path: Path) -> Iterable[Any]:
    if path.stat().st_size > _MOST_ARRAY:
        raise DatasetError(
            f"{path} is a JSON array of more than 1 GiB, which would be read as a whole.",
            hint=f"Convert it first: jq -c '.[]' {path} > rows.jsonl",
        )
    try:
        rows: list[Any] = msgspec.json.decode(path.read_bytes().removeprefix(BOM), type=list[Any])
    except (msgspec.DecodeError, RecursionError, OSError) as error:
        raise _unusable(path, None, f"not a JSON array: {error}") from error
    return rows


def _parsed(path: Path, number: int, text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unusable(path, number, f"not valid JSON: {error}") from error


def _unusable(path: Path, line: int | None, message: str) -> DatasetError:
    issue = Issue(code="unreadable_row", message=message, path=str(path), line=line)
    return DatasetError(f"{path} cannot be converted; nothing was written.", issues=[issue])
