"""What holds for all rows: valid ones pass, each fault is caught, junk crashes nothing."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from training_backends.core.errors import Issue
from training_backends.datasets.inspect import ISSUES_PER_CODE, check_upload, inspect_file

Row = dict[str, Any]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
call_ids = st.text("abcdefghijKLMNOP0123456789", min_size=9, max_size=9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


def message(role: str) -> st.SearchStrategy[Row]:
    parts = st.lists(texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
    return st.fixed_dictionaries({"role": st.just(role), "content": texts | parts})


@st.composite
def calls(draw: st.DrawFn) -> list[Row]:
    """Make an assistant's tool calls with all their answers, in any order."""
    ids = draw(st.lists(call_ids, min_size=1, max_size=2, unique=True))
    arguments = json.dumps(draw(st.dictionaries(names, json_values, max_size=2)))
    made = [
        {
            "id": one,
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        }
        for one in ids
    ]
    answers = [
        {"role": "tool", "tool_call_id": one, "content": draw(st.text("ab", max_size=5))}
        for one in draw(st.permutations(ids))
    ]
    return [{"role": "assistant", "tool_calls": made}, *answers]


@st.composite
def chats(draw: st.DrawFn) -> Row:
    """Make a valid conversation that ends with the assistant."""
    messages = draw(st.lists(message("system"), max_size=1))
    uses_tools = False
    for _ in range(draw(st.integers(1, 3))):
        messages.append(draw(message("user")))
        if draw(st.booleans()):
            uses_tools = True
            messages += draw(calls())
        messages.append(draw(message("assistant")))
    row: Row = {"messages": messages}
    if uses_tools:
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    return row


labels = st.dictionaries(
    names, texts | st.lists(texts, min_size=1, max_size=2), min_size=1, max_size=2
)
rows_by_type: dict[str, st.SearchStrategy[Row]] = {
    "instruct": chats(),
    "pretrain": st.fixed_dictionaries({"text": texts}),
    "classifier": st.fixed_dictionaries({"text": texts, "labels": labels}),
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[Row]]:
    """Make the rows of one valid file."""
    kind = draw(st.sampled_from(sorted(rows_by_type)))
    return kind, draw(st.lists(rows_by_type[kind], min_size=1, max_size=4))


@contextmanager
def written(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_bytes(content)
        yield path


def lines(rows: list[Row], *, ascii_only: bool = False) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n" for row in rows)


def issues_of(content: bytes) -> tuple[Issue, ...]:
    with written(content) as path:
        return inspect_file(path)[1]


@given(files(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_valid_rows_always_pass(file: tuple[str, list[Row]], ascii_only: bool) -> None:
    """No rule refuses what is right, escaped or not."""
    kind, rows = file
    with written(lines(rows, ascii_only=ascii_only)) as path:
        read, issues = inspect_file(path)
        check = check_upload(path)
    assert issues == ()
    assert read is not None
    assert (read.rows, read.sample_type) == (len(rows), kind)
    assert (check.num_lines, check.sample_type, check.errors) == (len(rows), kind, ())


def _last(row: Row) -> Row:
    found: Row = row["messages"][-1]
    return found


def _set(row: Row, key: str, value: object) -> None:
    _last(row)[key] = value


MUTATIONS: dict[str, tuple[Callable[[Row], None], str]] = {
    "unknown role": (lambda row: _set(row, "role", "robot"), "unknown_role"),
    "no role": (lambda row: _last(row).pop("role"), "missing_field"),
    "last is the user": (
        lambda row: row["messages"].append({"role": "user", "content": "x"}),
        "last_not_assistant",
    ),
    "empty": (lambda row: _set(row, "content", ""), "empty_content"),
    "number": (lambda row: _set(row, "content", 3), "wrong_type"),
    "weight 2": (lambda row: _set(row, "weight", 2), "bad_weight"),
    "no messages": (lambda row: row["messages"].clear(), "empty_content"),
    "renamed": (lambda row: row.update(message=row.pop("messages")), "unknown_format"),
    "text beside": (lambda row: row.update(text="x"), "ambiguous_row"),
    "answer from nowhere": (
        lambda row: row["messages"].insert(
            -1, {"role": "tool", "tool_call_id": "zzzzzzzzz", "content": "x"}
        ),
        "unmatched_answer",
    ),
    "call without answer": (
        lambda row: row["messages"].insert(
            -1,
            {
                "role": "assistant",
                "tool_calls": [{"id": "zzzzzzzzz", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        "unanswered_call",
    ),
}


@given(st.lists(chats(), min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_one_fault_is_caught_on_its_line(rows: list[Row], data: st.DataObject) -> None:
    """A single change is found, and no other line is blamed."""
    place = data.draw(st.integers(0, len(rows) - 1))
    mutate, code = MUTATIONS[data.draw(st.sampled_from(sorted(MUTATIONS)))]
    rows = copy.deepcopy(rows)
    mutate(rows[place])
    issues = issues_of(lines(rows))
    assert code in {issue.code for issue in issues if issue.severity == "error"}
    assert {issue.line for issue in issues} == {place + 1}


@given(st.lists(chats(), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_cut_line_is_caught(rows: list[Row], data: st.DataObject) -> None:
    """A row whose end is missing is never taken for a shorter one."""
    whole = [lines([row])[:-1] for row in rows]
    place = data.draw(st.integers(0, len(rows) - 1))
    whole[place] = whole[place][: data.draw(st.integers(1, len(whole[place]) - 1))]
    issues = issues_of(b"\n".join(whole))
    assert {issue.line for issue in issues} == {place + 1}
    assert all(issue.severity == "error" for issue in issues)


PIECES = (
    *b'{ } [ ] " : , \\ "messages" "role" "text" "labels" null 1e999 \\ud800 user'.split(),
    *(b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf"),
)


@given(st.binary(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_junk_crashes_nothing(content: bytes) -> None:
    """Any bytes give issues, a bounded number of them, and no exception."""
    with written(content) as path:
        file, issues = inspect_file(path)
        check_upload(path)
    assert file is not None or issues
    codes = [issue.code for issue in issues]
    assert all(codes.count(code) <= ISSUES_PER_CODE + 1 for code in codes)
    assert all(issue.message and issue.path for issue in issues)
