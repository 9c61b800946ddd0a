"""Inspection finds what is wrong, names line and field, and never dies of bad data."""

import hashlib
import json
import os
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from training_backends import DatasetError, TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.datasets.inspect import (
    ISSUES_PER_CODE,
    check_upload,
    inspect,
    inspect_file,
    raise_for_errors,
)

MakeConfig = Callable[..., TrainingConfig]

USER: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is sunny."}
CALL: dict[str, Any] = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "sunny"}


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to read everything, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def with_call(**changes: Any) -> dict[str, Any]:
    """Make a conversation whose one tool call is changed."""
    call = {**CALL, **changes}
    caller = {"role": "assistant", "tool_calls": [call]}
    return chat(USER, caller, RESULT, ANSWER, tools=[TOOL])


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def found(path: Path, **options: Any) -> tuple[Issue, ...]:
    return inspect_file(path, **options)[1]


def only(path: Path, **options: Any) -> Issue:
    issues = found(path, **options)
    assert len(issues) == 1, issues
    return issues[0]


def test_a_file_is_measured_in_the_same_pass(tmp_path: Path) -> None:
    """Size, digest, rows, turns and kind come with the issues."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), chat(USER, ANSWER, USER, ANSWER))
    file, issues = inspect_file(path, weight=2.0)
    assert issues == ()
    assert file is not None
    content = path.read_bytes()
    assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (file.rows, file.turns, file.sample_type, file.weight) == (2, 6, "instruct", 2.0)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (chat(USER, ANSWER), "instruct"),
        (chat({"role": "system", "content": "Be brief."}, USER, ANSWER), "instruct"),
        (chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}), "instruct"),
        (chat({"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER), "instruct"),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
            "instruct",
        ),
        (with_call(), "instruct"),
        (chat(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[TOOL]), "instruct"),
        ({"text": "Once upon a time"}, "pretrain"),
        ({"text": "Good.", "labels": {"mood": "happy"}}, "classifier"),
        ({"messages": [USER], "labels": {"mood": ["happy", "calm"]}}, "classifier"),
        ({"text": "null means left out", "messages": None, "labels": None}, "pretrain"),
    ],
)
def test_every_format_is_known_by_its_keys(tmp_path: Path, row: object, kind: str) -> None:
    """A valid row of each format has no issue."""
    file, issues = inspect_file(write(tmp_path / "a.jsonl", row))
    assert issues == ()
    assert file is not None
    assert file.sample_type == kind


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"foo": 1}, "unknown_format", None),
        ([1, 2], "wrong_type", None),
        ({"messages": "hi"}, "wrong_type", "messages"),
        (chat(), "empty_content", "messages"),
        (chat(USER, {"content": "hi"}), "missing_field", "messages[1].role"),
        (chat(USER, {"role": "robot", "content": "hi"}), "unknown_role", "messages[1].role"),
        (chat(USER), "no_assistant", "messages"),
        (chat(USER, ANSWER, USER), "last_not_assistant", "messages[2].role"),
        (chat(USER, {"role": "assistant", "content": ""}), "empty_content", "messages[1].content"),
        (chat(USER, {"role": "assistant"}), "empty_content", "messages[1].content"),
        (chat({"role": "user", "content": " \n"}, ANSWER), "empty_content", "messages[0].content"),
        (chat({"role": "user", "content": []}, ANSWER), "empty_content", "messages[0].content"),
        (
            chat({"role": "user", "content": [{"type": "sound"}]}, ANSWER),
            "unknown_part",
            "messages[0].content[0].type",
        ),
        (chat({**USER, "weight": 1}, ANSWER), "misplaced_weight", "messages[0].weight"),
        (chat(USER, {**ANSWER, "weight": 2}), "bad_weight", "messages[1].weight"),
        (
            chat({**USER, "tool_calls": [CALL]}, RESULT, ANSWER, tools=[TOOL]),
            "misplaced_tool_calls",
            "messages[0].tool_calls",
        ),
        (
            with_call(function={"name": "weather", "arguments": {"city": "Paris"}}),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            with_call(function={"name": "weather", "arguments": "{city"}),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            with_call(function={"name": "weather", "arguments": "[1]"}),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            with_call(function={"name": "rain", "arguments": "{}"}),
            "undeclared_tool",
            "messages[1].tool_calls[0].function.name",
        ),
        (
            chat(USER, {"role": "assistant", "tool_calls": [CALL]}, ANSWER, tools=[TOOL]),
            "unanswered_call",
            "messages[1].tool_calls[0].id",
        ),
        (chat(USER, RESULT, ANSWER), "unmatched_answer", "messages[1].tool_call_id"),
        (
            chat(USER, {"role": "tool", "content": "x"}, ANSWER),
            "unmatched_answer",
            "messages[1].tool_call_id",
        ),
        (
            chat(
                USER,
                {"role": "assistant", "tool_calls": [CALL, CALL]},
                RESULT,
                ANSWER,
                tools=[TOOL],
            ),
            "duplicate_call_id",
            "messages[1].tool_calls[1].id",
        ),
        ({"text": " "}, "empty_content", "text"),
        ({"text": "a", "messages": [USER, ANSWER]}, "ambiguous_row", "text"),
        ({"labels": {"mood": "happy"}}, "ambiguous_row", None),
        ({"text": "a", "labels": {}}, "empty_content", "labels"),
        ({"text": "a", "labels": {"mood": []}}, "empty_content", "labels.mood"),
        ({"text": "a", "labels": {"mood": 3}}, "wrong_type", "labels[...]"),
    ],
)
def test_a_broken_rule_is_named_by_line_and_field(
    tmp_path: Path, row: object, code: str, field: str | None
) -> None:
    """Each fault of a row has its code, line, field and a way to mend it."""
    path = write(tmp_path / "a.jsonl", row)
    issue = only(path)
    assert (issue.code, issue.line, issue.field) == (code, 1, field)
    assert issue.severity == "error"
    assert issue.path == str(path)
    assert issue.fix


@pytest.mark.parametrize("call_id", ["short", "", "abcdefgh12", "abc-efgh1", "null", None])
def test_a_call_id_has_nine_letters_or_digits(tmp_path: Path, call_id: str | None) -> None:
    """Any other id is refused, in the call where it stands."""
    answer = {**RESULT, "tool_call_id": call_id}
    caller = {"role": "assistant", "tool_calls": [{**CALL, "id": call_id}]}
    issues = found(write(tmp_path / "a.jsonl", chat(USER, caller, answer, ANSWER, tools=[TOOL])))
    assert issues[0].code == "bad_call_id"
    assert issues[0].field == "messages[1].tool_calls[0].id"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (chat(USER, {**ANSWER, "weight": 0}), "nothing_trained"),
        (
            chat(USER, {**ANSWER, "tool_calls": [CALL]}, RESULT, ANSWER, tools=[TOOL]),
            "content_with_tool_calls",
        ),
        (chat(USER, {"role": "assistant", "tool_calls": [CALL]}), "undeclared_tool"),
    ],
)
def test_what_is_only_doubtful_is_a_warning(tmp_path: Path, row: object, code: str) -> None:
    """A row that can be trained on is not refused."""
    issue = only(write(tmp_path / "a.jsonl", row))
    assert (issue.code, issue.severity) == (code, "warning")


def test_classifier_labels_are_held_against_the_targets(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """A target or label that the configuration does not name is an error."""
    path = write(
        tmp_path / "a.jsonl",
        {"text": "a", "labels": {"mood": "happy"}},
        {"text": "a", "labels": {"mood": "hapy"}},
        {"text": "a", "labels": {"modo": "happy"}},
    )
    config = make_config(
        method="classifier",
        data={"train": path},
        classifier_targets=[{"name": "mood", "labels": ["happy", "sad"]}],
    )
    issues = inspect(config).issues
    assert [(one.code, one.line) for one in issues] == [("unknown_label", 2), ("unknown_target", 3)]


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b'{"text": "a"} x\n', "bad_json", "column 15"),
        (b'{"text": "\xc3\xa9", }\n', "bad_json", "column 15"),
        (b'{"text": "a"\n', "bad_json", "ends too early"),
        (b"\xff{}\n", "bad_utf8", "column 1"),
        (b'{"text": "\xc3\xa9\xff"}\n', "bad_utf8", "column 12"),
        (b'{"text": "a", "other": "\xff"}\n', "bad_utf8", "column 25"),
        (b'{"text": "a\x00b"}\n', "nul_byte", "column 12"),
        (b'{"text": "\\ud800"}\n', "bad_json", "early"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "wrong_type", ""),
        (b'{"other": ' + b"[" * 100_000 + b"\n", "bad_json", "nested"),
        (b"[" * 10, "wrong_type", ""),
    ],
)
def test_a_line_that_is_no_json_says_where(
    tmp_path: Path, content: bytes, code: str, text: str
) -> None:
    """Broken text names its line and the column, counted in characters."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + content)
    issue = only(path)
    assert (issue.code, issue.line) == (code, 2)
    assert text in issue.message


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """Blank lines stop nothing; one warning says how many there are and where."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n\n')
    file, issues = inspect_file(path)
    assert file is not None
    assert file.rows == 2
    assert [(one.code, one.line, one.severity) for one in issues] == [("blank_lines", 2, "warning")]
    assert "3 blank lines" in issues[0].message


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    """A file without a final line break has all its rows."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    file, issues = inspect_file(path)
    assert issues == ()
    assert file is not None
    assert file.rows == 2


def test_a_byte_order_mark_is_named_and_the_row_behind_it_read(tmp_path: Path) -> None:
    """One mark costs one issue, not the whole first row."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    file, issues = inspect_file(path)
    assert [(one.code, one.line) for one in issues] == [("byte_order_mark", 1)]
    assert file is not None
    assert (file.rows, file.size) == (1, 17)


@pytest.mark.parametrize("head", ['{"text": "a"}\n'.encode("utf-16"), b"\x1f\x8b\x08\x00rest"])
def test_a_file_that_is_no_text_is_not_read_on(tmp_path: Path, head: bytes) -> None:
    """UTF-16 and compressed files are named as such, once."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(head)
    file, issues = inspect_file(path)
    assert file is None
    assert [one.code for one in issues] == ["bad_utf8"]


@pytest.mark.parametrize(("content", "text"), [(b"", "is empty"), (b"\n \n", "only blank")])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes, text: str) -> None:
    """An empty file, or one of blank lines, cannot be trained on."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    issue = only(path)
    assert issue.code == "empty_file"
    assert text in issue.message


def test_a_missing_file_is_an_issue(tmp_path: Path) -> None:
    """Nothing is raised for a path that is not there."""
    file, issues = inspect_file(tmp_path / "gone.jsonl")
    assert file is None
    assert [one.code for one in issues] == ["missing_file"]


def test_a_file_in_place_of_a_directory_is_a_missing_file(tmp_path: Path) -> None:
    """A path through a file leads nowhere."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    assert only(path / "b.jsonl").code == "missing_file"


def test_a_directory_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever; it is refused before."""
    os.mkfifo(tmp_path / "pipe")
    assert only(tmp_path).code == "not_a_file"
    assert only(tmp_path / "pipe").code == "not_a_file"


def test_a_file_without_permission_is_an_issue(tmp_path: Path) -> None:
    """Permission is told apart from absence."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    path.chmod(stat.S_IWUSR)
    with as_nobody():
        assert only(path).code == "unreadable_file"


def test_a_file_that_fails_while_it_is_read_is_an_issue() -> None:
    """An I/O error in the middle of reading does not escape."""
    path = Path("/proc/self/mem")  # a regular file whose first byte cannot be read
    if not path.exists():
        pytest.skip("no /proc here")
    file, issues = inspect_file(path)
    assert file is None
    assert [one.code for one in issues] == ["unreadable_file"]


def test_mixed_formats_in_one_file_are_refused(tmp_path: Path) -> None:
    """Each row of another format than the first is named."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), {"text": "a"}, chat(USER, ANSWER))
    issue = only(path)
    assert (issue.code, issue.line) == ("mixed_formats", 2)


def test_issues_are_capped_per_code_and_the_rest_counted(tmp_path: Path) -> None:
    """A file full of one fault does not bury another."""
    path = write(tmp_path / "a.jsonl", *([chat(USER)] * 30), {"messages": [{"role": "x"}]})
    issues = found(path)
    assert [one.code for one in issues].count("no_assistant") == ISSUES_PER_CODE + 1
    assert issues[-2].code == "unknown_role"
    assert issues[-1].line is None
    assert "10 more" in issues[-1].message


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    """Memory stays small and the rows behind it are still read."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(48):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"text": "b"}\n')
    tracemalloc.start()
    read, issues = inspect_file(path, max_line=8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(one.code, one.line) for one in issues] == [("line_too_long", 2)]
    assert read is not None
    assert (read.rows, read.size) == (3, path.stat().st_size)
    assert peak < 16 << 20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A large file costs no more memory than a small one."""
    path = tmp_path / "a.jsonl"
    line = json.dumps(chat(USER, {**ANSWER, "content": "word " * 200})).encode() + b"\n"
    path.write_bytes(line * 20_000)
    tracemalloc.start()
    file, issues = inspect_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert issues == ()
    assert file is not None
    assert file.rows == 20_000
    assert file.size > 20_000_000
    assert peak < 6 << 20


def test_the_same_content_for_training_and_validation_is_an_error(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """It is told by content, whatever the names are."""
    first = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    second = write(tmp_path / "b.jsonl", chat(USER, ANSWER))
    dataset = inspect(make_config(data={"train": first, "validation": second}))
    assert [one.code for one in dataset.errors] == ["train_validation_overlap"]
    assert dataset.errors[0].path == str(second)


def test_the_same_training_file_twice_is_a_warning(tmp_path: Path, make_config: MakeConfig) -> None:
    """Training on a file twice is allowed, though weights say it better."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    dataset = inspect(make_config(data={"train": [path, path]}))
    assert dataset.errors == ()
    assert [one.code for one in dataset.issues] == ["duplicate_file"]


def test_files_of_different_formats_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    """One run trains on one format."""
    first = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    second = write(tmp_path / "b.jsonl", {"text": "a"})
    dataset = inspect(make_config(data={"train": [first, second]}))
    assert [(one.code, one.path) for one in dataset.errors] == [("mixed_formats", str(second))]


def test_the_method_goes_with_the_format(tmp_path: Path, make_config: MakeConfig) -> None:
    """Labels need a classifier, and a classifier labels."""
    labelled = write(tmp_path / "a.jsonl", {"text": "a", "labels": {"x": "y"}})
    chats = write(tmp_path / "b.jsonl", chat(USER, ANSWER))
    for method, path in (("sft", labelled), ("classifier", chats)):
        dataset = inspect(make_config(method=method, data={"train": path}))
        assert [one.code for one in dataset.errors] == ["wrong_format"]


def test_every_file_of_a_configuration_is_inspected(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """A file that is missing does not hide the issues of the next."""
    bad = write(tmp_path / "bad.jsonl", chat(USER))
    good = write(tmp_path / "good.jsonl", chat(USER, ANSWER))
    dataset = inspect(
        make_config(data={"train": [tmp_path / "gone.jsonl", bad], "validation": good})
    )
    assert [one.code for one in dataset.errors] == ["missing_file", "no_assistant"]
    assert [file.path for file in dataset.train] == [bad]
    assert [file.path for file in dataset.validation] == [good]


def test_progress_reaches_the_size_of_the_file(tmp_path: Path, make_config: MakeConfig) -> None:
    """Whoever watches sees each file end."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    seen: list[tuple[Path, int, int]] = []
    inspect(make_config(data={"train": path}), on_progress=lambda *step: seen.append(step))
    assert seen[-1] == (path, path.stat().st_size, path.stat().st_size)


def test_errors_become_one_exception_that_carries_all_issues(tmp_path: Path) -> None:
    """Only errors raise; the warnings beside them are kept."""
    path = write(tmp_path / "a.jsonl", chat(USER), chat(USER, {**ANSWER, "weight": 0}))
    dataset = Dataset(files=(), issues=found(path))
    with pytest.raises(DatasetError, match=r"1 error in 1 file") as caught:
        raise_for_errors(dataset)
    assert [one.code for one in caught.value.issues] == ["no_assistant", "nothing_trained"]
    raise_for_errors(Dataset(files=(), issues=dataset.issues[1:]))


def test_an_upload_is_judged_by_line(tmp_path: Path) -> None:
    """The gateway gets one message for each wrong line, kind and number of rows."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), chat(USER), {"foo": 1})
    check = check_upload(path)
    assert (check.sample_type, check.num_lines) == ("instruct", 3)
    assert [error.line_number for error in check.errors] == [2, 3]
    assert "no message is the assistant's" in check.errors[0].message


def test_an_upload_is_not_read_past_enough_errors(tmp_path: Path) -> None:
    """A hopeless file is given up early."""
    check = check_upload(write(tmp_path / "a.jsonl", *[{"foo": 1}] * 50), max_errors=3)
    assert [error.line_number for error in check.errors] == [1, 2, 3]
    assert check.num_lines is None


def test_an_empty_upload_has_an_error_on_its_first_line(tmp_path: Path) -> None:
    """An error of the whole file has a line number too, because the answer needs one."""
    check = check_upload(write(tmp_path / "a.jsonl"))
    assert [error.line_number for error in check.errors] == [1]
