"""Repairing files: what comes out is right, means the same, and is not repaired again."""

import copy
import gzip
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.mutations import faulty_rows
from tests.datasets.rows import Row, line, rows
from training_backends import ConfigError, DatasetError, Issue
from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets import repair as module
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.inspect import inspect_file
from training_backends.datasets.provider_formats import LOCAL, MISTRAL, OPENAI, PROVIDER_FORMATS
from training_backends.datasets.repair import REPAIRS, Repair, Repaired, SeenRows, repair
from training_backends.datasets.scan_part import MAX_LINE_BYTES

provider_formats = st.sampled_from(list(PROVIDER_FORMATS.values()))

BOM = b"\xef\xbb\xbf"
ASK: Row = {"role": "user", "content": "How much is it?"}
ANSWER: Row = {"role": "assistant", "content": "Three francs."}
TOOLS: list[Row] = [{"type": "function", "function": {"name": "price"}}]


def call(call_id: object, arguments: object = "{}") -> Row:
    made: Row = {"type": "function", "function": {"name": "price", "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def told(call_id: object) -> Row:
    made: Row = {"role": "tool", "content": "3"}
    return made if call_id is None else {"tool_call_id": call_id, **made}


def talk(*messages: Row) -> Row:
    row: Row = {"messages": list(messages)}
    return {**row, "tools": TOOLS} if any("tool_calls" in one for one in messages) else row


def calling(calls: list[Row], *answers: Row) -> Row:
    """Make a conversation in which the assistant calls tools."""
    return talk(ASK, {"role": "assistant", "tool_calls": calls}, *answers, ANSWER)


class Done:
    """A repaired file: its new content, and what was told on the way."""

    def __init__(self, content: bytes, **options: Any) -> None:
        self.repairs: list[Repair] = []
        self.issues: list[Issue] = []
        with tempfile.TemporaryDirectory() as directory:
            path, target = Path(directory) / "data.jsonl", Path(directory) / "new.jsonl"
            path.write_bytes(content)
            self.report: Repaired = repair(
                path,
                target,
                on_repair=self.repairs.append,
                on_issue=self.issues.append,
                **options,
            )
            self.content = target.read_bytes()

    @property
    def rows(self) -> list[Any]:
        return [json.loads(row) for row in self.lines]

    @property
    def lines(self) -> list[bytes]:
        # Not `splitlines`, which knows other ends than this.
        return [row for row in self.content.split(b"\n") if row]

    @property
    def codes(self) -> list[str]:
        return [one.code for one in self.repairs]


def errors(row: bytes, provider_format: ProviderFormat = MISTRAL) -> set[str]:
    """Judge one row; return the codes of its errors."""
    found = RowRules(provider_format).judge(row)[1]
    return {finding.code for finding in found if finding.severity == "error"}


def lines(*made: object) -> bytes:
    return b"".join(line(row) + b"\n" for row in made)


# Whatever comes in

spoiled_lines = st.one_of(
    st.sampled_from([b"", b"  ", b"{}", b'{"messages": []}', b'{"text": " "}', b"{", b"\xff"]),
    # What begins like a file of another kind is one.
    st.binary(max_size=20).map(lambda junk: b"x" + junk.replace(b"\n", b"")),
)


@st.composite
def contents(draw: st.DrawFn, provider_format: ProviderFormat) -> bytes:
    """Make a file of right and faulty rows, with all that can be wrong between them."""
    made = draw(
        st.lists(
            st.one_of(
                rows(provider_format, "messages").map(line),
                faulty_rows(provider_format).map(lambda fault: line(fault.row)),
                rows(provider_format, "messages").map(lambda row: line(spoiled(row))),
                spoiled_lines,
            ),
            min_size=1,
            max_size=5,
        )
    )
    again = draw(st.lists(st.sampled_from(made), max_size=2))
    ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n" + BOM])
    whole = b"".join(one + draw(ends) for one in (*made, *again))
    return draw(st.sampled_from([b"", BOM])) + whole + draw(st.sampled_from([b"", made[0]]))


def spoiled(row: Row) -> Row:
    """Do to a row all that can be undone."""
    row = copy.deepcopy(row)
    for message in row["messages"]:
        for one in message.get("tool_calls") or ():
            one["id"] = f"call-{one['id']}"
            if isinstance(one["function"]["arguments"], str):
                one["function"]["arguments"] = json.loads(one["function"]["arguments"])
        if "tool_call_id" in message:
            message["tool_call_id"] = f"call-{message['tool_call_id']}"
    row["messages"] += [ASK, {"role": "system", "content": "Be brief."}]
    return row


def meaning(row: Row) -> Row:
    """Leave out of a row what a repair may change: ids, and how arguments are written."""
    row = copy.deepcopy(row)
    numbers = itertools.count()
    names: dict[Any, int] = {}
    for message in row["messages"]:
        for one in message.get("tool_calls") or ():
            # A later turn may use an id again.
            names[one["id"]] = next(numbers)
            one["id"] = names[one["id"]]
            if isinstance(one["function"]["arguments"], str):
                one["function"]["arguments"] = json.loads(one["function"]["arguments"])
        if "tool_call_id" in message:
            message["tool_call_id"] = names[message["tool_call_id"]]
    return row


@given(st.data())
def test_a_second_repair_finds_nothing_to_do(data: st.DataObject) -> None:
    """It writes the same bytes, whatever the file was; every error that is left is told."""
    provider_format = data.draw(provider_formats)
    drop = data.draw(st.booleans())
    content = data.draw(contents(provider_format))
    try:
        first = Done(content, provider_format=provider_format, drop_invalid=drop)
    except DatasetError as error:
        # A file that begins with a line like `{` is taken for pretty-printed JSON.
        assert error.issues[0].code in {"empty_file", "not_json_lines"}  # noqa: PT017
        return
    second = Done(first.content, provider_format=provider_format, drop_invalid=drop)
    assert second.content == first.content
    assert not second.repairs
    left = [row for row in first.lines if errors(row, provider_format)]
    assert len(left) == first.report.invalid == len({issue.line for issue in first.issues})
    assert not (drop and left)


@given(st.data())
def test_a_repaired_file_is_inspected_clean(data: st.DataObject) -> None:
    """Without the rows that cannot be repaired, nothing is wrong with any line of it."""
    provider_format = data.draw(provider_formats)
    good = line({"messages": [ASK, ANSWER]}) + b"\n"
    done = Done(
        good + data.draw(contents(provider_format)),
        provider_format=provider_format,
        drop_invalid=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new.jsonl"
        path.write_bytes(done.content)
        file, issues = inspect_file(path, provider_format=provider_format, processes=1)
    assert file
    assert file.rows == done.report.written
    assert file.summary.duplicate_rows == 0
    # Whole files may have too few rows, and rows of several kinds, which is for people to mend.
    whole = {"too_few_rows", "mixed_formats", "mixed_labels"}
    kept = {"nothing_trained", "undeclared_tool", "unknown_key", "content_with_tool_calls"}
    assert {issue.code for issue in issues} <= whole | kept | provider_format.levels.keys()


@given(st.data())
def test_what_can_be_undone_is_undone(data: st.DataObject) -> None:
    """Spoiled rows come out right and mean what they meant before."""
    provider_format = data.draw(provider_formats)
    made = data.draw(st.lists(rows(provider_format, "messages"), min_size=1, max_size=4))
    done = Done(lines(*map(spoiled, made)), provider_format=provider_format)
    assert not done.issues
    assert not any(errors(row, provider_format) for row in done.lines)
    wanted = {json.dumps(meaning(row), sort_keys=True) for row in made}
    assert {json.dumps(meaning(row), sort_keys=True) for row in done.rows} == wanted


@given(st.data())
def test_right_rows_keep_their_bytes(data: st.DataObject) -> None:
    """In any format, escaped or not, with white space or without."""
    provider_format = data.draw(provider_formats)
    form = data.draw(st.sampled_from(provider_format.formats))
    made = data.draw(st.lists(rows(provider_format, form), min_size=1, max_size=4, unique_by=repr))
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]))
    content = b"".join(
        json.dumps(row, ensure_ascii=data.draw(st.booleans()), separators=separators).encode()
        + b"\n"
        for row in made
    )
    done = Done(content, provider_format=provider_format)
    assert done.content == content
    assert not done.repairs


@given(st.data())
def test_rows_that_cannot_be_repaired_keep_their_bytes(data: st.DataObject) -> None:
    """They stand as they were and are told with their line, or are dropped and listed."""
    provider_format = data.draw(provider_formats)
    good = line({"messages": [ASK, ANSWER]})
    bad = line(data.draw(faulty_rows(provider_format)).row)
    done = Done(good + b"\n" + bad + b"\n", provider_format=provider_format)
    if not errors(bad, provider_format) or not done.report.invalid:
        return
    assert done.content == good + b"\n" + bad + b"\n"
    assert {issue.line for issue in done.issues} == {2}
    dropped = Done(good + b"\n" + bad + b"\n", provider_format=provider_format, drop_invalid=True)
    assert dropped.content == good + b"\n"
    assert [(one.line, one.code) for one in dropped.repairs] == [(2, "invalid_row")]


# One thing at a time


@pytest.mark.parametrize(
    ("content", "wanted", "repairs"),
    [
        (BOM + b"A\nB\n", b"A\nB\n", [(1, "byte_order_mark")]),
        (b"A\n" + BOM + b"B\n", b"A\nB\n", [(2, "byte_order_mark")]),
        (b"A\r\nB\r\n", b"A\nB\n", [(1, "line_ends")]),
        (b"A\nB\r\n", b"A\nB\n", [(2, "line_ends")]),
        (b"\nA\n\n \t\nB", b"A\nB", [(1, "blank_line"), (3, "blank_line"), (4, "blank_line")]),
        (b"A\nB\nA\nA \nB", b"A\nB\n", [(n, "duplicate_row") for n in (3, 4, 5)]),
        (b'A\n{}\n{"messages": [], "tools": null}\n', b"A\n", [(2, "empty_row"), (3, "empty_row")]),
        (b"A", b"A", []),
    ],
)
def test_lines_are_put_right(content: bytes, wanted: bytes, repairs: list[tuple[int, str]]) -> None:
    """Each repair is told with its line; the last line need not end."""

    def filled(text: bytes) -> bytes:
        first, second = line({"text": "a"}), line({"text": "b"})
        return text.replace(b"A", first).replace(b"B", second)

    done = Done(filled(content))
    assert done.content == filled(wanted)
    assert [(one.line, one.code) for one in done.repairs] == repairs
    assert not done.issues


@pytest.mark.parametrize(
    "rest",
    [[ASK], [ASK, ASK], [{"role": "system", "content": "x"}], [{"role": "user", "content": ""}]],
)
def test_messages_behind_the_last_answer_are_cut(rest: list[Row]) -> None:
    """Nothing is learnt from them; the messages before keep their bytes."""
    row = (
        b'{"id" : 1.50, "messages":[ {"role":"user","content":"\\u00e9"}, '
        b'{"role":"assistant", "content" :"\\/"}%s]}'
    )
    more = b"".join(b"," + line(one) for one in rest)
    done = Done(row % more + b"\n")
    assert done.codes == ["trailing_turns"]
    kept = b'[{"role":"user","content":"\\u00e9"},{"role":"assistant", "content" :"\\/"}]'
    assert done.content == b'{"id":1.50,"messages":' + kept + b"}\n"


def test_a_conversation_without_an_answer_is_left_alone() -> None:
    """Cutting it would leave nothing."""
    content = lines(talk(ASK), talk(ASK, ASK))
    done = Done(content)
    assert (done.content, done.report.invalid) == (content, 2)


def test_a_result_that_nobody_has_used_is_left_alone() -> None:
    """An answer of a tool belongs to its call, so the row is not cut between them."""
    content = lines(
        talk(ASK, {"role": "assistant", "tool_calls": [call("abcdefghi")]}, told("abcdefghi"))
    )
    done = Done(content)
    assert (done.content, done.report.invalid) == (content, 1)


def test_a_classifier_may_end_with_a_question() -> None:
    """Only what is to be learnt from must end with the assistant."""
    content = lines({"messages": [ASK], "labels": {"topic": "money"}})
    assert Done(content).content == content


def test_ids_of_calls_are_made_anew_with_those_of_their_answers() -> None:
    """Malformed ones only; answers go on to name their calls, in whatever order they come."""
    row = calling(
        [call("call_1"), call("abcdefghi"), call("call_2")],
        told("call_2"),
        told("abcdefghi"),
        told("call_1"),
    )
    done = Done(lines(row))
    (new,) = done.rows
    first, second, third = (one["id"] for one in new["messages"][1]["tool_calls"])
    assert second == "abcdefghi"
    assert [one["tool_call_id"] for one in new["messages"][2:5]] == [third, second, first]
    assert len({first, second, third}) == 3
    assert done.codes == ["call_ids"]
    assert not errors(done.content.strip())


def test_one_id_in_two_turns_becomes_two() -> None:
    """Calls of later turns that begin to count anew are told apart."""
    turn = [{"role": "assistant", "tool_calls": [call("call_0")]}, told("call_0"), ANSWER]
    (new,) = Done(lines(talk(ASK, *turn, ASK, *turn))).rows
    ids = [new["messages"][place]["tool_calls"][0]["id"] for place in (1, 5)]
    assert ids[0] != ids[1]
    assert [new["messages"][place]["tool_call_id"] for place in (2, 6)] == ids


def test_new_ids_are_the_same_every_time() -> None:
    """They come from the row alone, so that equal rows stay equal."""
    row = calling([call("call_1")], told("call_1"))
    once, again = Done(lines(row)), Done(lines({"text": "a"}, row))
    assert once.rows[0] == again.rows[1]


@pytest.mark.parametrize(
    ("call_id", "answer_id"), [(None, None), ("abcdefghi", None), (None, "abcdefghi"), (None, "x")]
)
def test_a_missing_id_is_added_where_only_one_call_waits(
    call_id: object, answer_id: object
) -> None:
    """There is one call and one answer, so they belong together."""
    done = Done(lines(calling([call(call_id)], told(answer_id))))
    assert done.codes == ["call_ids"]
    assert not errors(done.content.strip())


@pytest.mark.parametrize(
    ("calls", "answers"),
    [
        ([call(None), call(None)], [told(None), told(None)]),
        ([call("call_1"), call("call_1")], [told("call_1"), told("call_1")]),
        ([call("abcdefghi")], [told("ihgfedcba")]),
        ([call("call_1")], []),
    ],
)
def test_nobody_guesses_which_answer_is_whose(calls: list[Row], answers: list[Row]) -> None:
    """The row is left alone where that cannot be told."""
    content = lines(calling(calls, *answers))
    done = Done(content)
    assert (done.content, done.report.invalid) == (content, 1)


def test_ids_stay_where_the_provider_format_takes_any() -> None:
    """What is right for one provider is not repaired for another."""
    content = lines(calling([call("call_1")], told("call_1")))
    assert Done(content, provider_format=OPENAI).content == content
    assert Done(content, provider_format=LOCAL).codes == ["call_ids"]


@pytest.mark.parametrize(
    "arguments", [b'{"a": [1.50, "\\u00e9", null]}', b"{}", b'{ "b" : "\\"" }']
)
def test_arguments_become_a_string_of_the_same_json(arguments: bytes) -> None:
    """Letter by letter, so that numbers and escapes stay what they were."""
    content = lines(calling([call("abcdefghi", "HERE")], told("abcdefghi")))
    done = Done(content.replace(b'"HERE"', arguments))
    assert done.codes == ["arguments"]
    (new,) = done.rows
    text = new["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert text == arguments.decode()


def test_both_answers_of_a_preference_pair_are_repaired() -> None:
    """Wherever a row has messages, its calls are put right."""
    answer = [{"role": "assistant", "tool_calls": [call("call_1", {"a": 1})]}]
    pair = {
        "input": {"messages": [ASK], "tools": TOOLS},
        "preferred_output": answer,
        "non_preferred_output": [ANSWER],
    }
    provider_format = replace(OPENAI, call_id="[a-z0-9A-Z]{9}")
    done = Done(lines(pair), provider_format=provider_format)
    assert set(done.codes) == {"call_ids", "arguments"}
    assert not errors(done.content.strip(), provider_format)


def test_a_key_that_stands_twice_is_not_decided_upon() -> None:
    """Readers differ on which of its values counts."""
    content = b'{"messages": [], "messages": %s}\n' % line([ASK, ANSWER, ASK])
    assert Done(content).content == content


def test_rows_equal_only_when_repaired_are_duplicates() -> None:
    """Else a second repair would find them."""
    done = Done(lines(talk(ASK, ANSWER, ASK), talk(ASK, ANSWER, ASK, ASK)))
    assert done.report.counts == {"trailing_turns": 1, "duplicate_row": 1}


# Whole files


def test_the_report_counts_everything() -> None:
    """Rows in, rows out, what was done and what is left."""
    content = BOM + lines({"text": "a"}, {"text": "a"}, {}, {"messages": [ASK]}).replace(
        b"\n", b"\r\n"
    )
    report = Done(content + b"\n").report
    assert (report.rows, report.written, report.invalid) == (4, 2, 1)
    assert report.counts == {
        "byte_order_mark": 1,
        "line_ends": 4,
        "duplicate_row": 1,
        "empty_row": 1,
        "blank_line": 1,
    }
    assert set(report.counts) <= set(REPAIRS)


def test_a_line_too_long_to_be_looked_at_is_copied(tmp_path: Path) -> None:
    """It is told like any other that cannot be repaired, and can be dropped."""
    long = b'{"text": "' + b"x" * (2 * MAX_LINE_BYTES) + b'"}\n'
    good = lines({"text": "a"}, {"text": "b"}).splitlines(keepends=True)
    content = good[0] + long + good[1] + long[:-1]
    done = Done(content)
    assert done.content == content
    assert [(issue.line, issue.code) for issue in done.issues] == [
        (2, "line_too_long"),
        (4, "line_too_long"),
    ]
    assert Done(content, drop_invalid=True).content == b"".join(good)


@pytest.mark.parametrize("content", [b"", b"\n\n", BOM, b"{}\n"])
def test_a_file_of_which_nothing_would_be_left_is_refused(tmp_path: Path, content: bytes) -> None:
    """Nothing is written."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError):
        repair(path, tmp_path / "new.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    """Not each line of it, but the file."""
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(DatasetError) as caught:
        repair(path, tmp_path / "new.jsonl")
    assert caught.value.issues[0].message == "the file is UTF-16"


def test_a_packed_file_is_unpacked(tmp_path: Path) -> None:
    """What is written is plain."""
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(lines({"text": "a"}, {"text": "a"})))
    repair(path, tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_bytes() == lines({"text": "a"})
    with pytest.raises(ConfigError, match="in place"):
        repair(path)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Neither another file, unless that is asked for, nor in any case the one that is read."""
    path, target = tmp_path / "data.jsonl", tmp_path / "new.jsonl"
    path.write_bytes(lines({"text": "a"}, {"text": "a"}))
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already exists"):
        repair(path, target)
    assert target.read_bytes() == b"mine"
    repair(path, target, force=True)
    assert target.read_bytes() == lines({"text": "a"})
    (tmp_path / "link").symlink_to(path)
    for same in (path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="both the input and the output"):
            repair(path, same, force=True)


def test_in_place_the_old_content_is_kept(tmp_path: Path) -> None:
    """Beside the file, with its rights; a second time there must be nothing to lose."""
    path, backup = tmp_path / "data.jsonl", tmp_path / "data.jsonl.orig"
    content = lines({"text": "a"}, {"text": "a"})
    path.write_bytes(content)
    path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    report = repair(link)
    assert report.backup == backup
    assert (path.read_bytes(), backup.read_bytes()) == (lines({"text": "a"}), content)
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="already exists"):
        repair(path)
    assert (path.read_bytes(), backup.read_bytes()) == (content, content)


def test_in_place_a_right_file_is_left_alone(tmp_path: Path) -> None:
    """It is not even written anew."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines({"text": "a"}))
    before = path.stat()
    assert repair(path).backup is None
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_all_as_it_was(tmp_path: Path) -> None:
    """Whoever is told may stop the work."""
    path = tmp_path / "data.jsonl"
    content = lines({"text": "a"}, {"text": "a"})
    path.write_bytes(content)

    def stop(_: Repair) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(path, on_repair=stop)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_duplicates_are_known_when_they_no_longer_fit_into_memory() -> None:
    """On the disk as in memory, each row is new once."""
    made = [b"%d" % (number % 60) for number in range(200)]
    with SeenRows() as seen, SeenRows(in_memory=10) as stored:
        assert [seen.add(row) for row in made] == [stored.add(row) for row in made]


def test_a_flood_of_blank_lines_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small compressed file can contain any number; those between rows are removed."""
    monkeypatch.setattr(module, "MOST_BLANK_LINES", 100)
    row = lines({"text": "a"})
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 100 + row + b" \n" * 100))
    assert repair(path, tmp_path / "out.jsonl").counts == {"blank_line": 200}
    path.write_bytes(gzip.compress(row + b"\n" * 101 + row))
    seen: list[int] = []
    with pytest.raises(DatasetError) as caught:
        repair(path, tmp_path / "new.jsonl", on_repair=lambda done: seen.append(done.line))
    assert [issue.code for issue in caught.value.issues] == ["only_blank_lines"]
    assert len(seen) == 100
    assert not (tmp_path / "new.jsonl").exists()
    monkeypatch.setattr(module, "MOST_BLANK_BYTES", 50)
    path.write_bytes(gzip.compress(row + (b" " * 30 + b"\n") * 2))
    with pytest.raises(DatasetError):
        repair(path, tmp_path / "new.jsonl")
