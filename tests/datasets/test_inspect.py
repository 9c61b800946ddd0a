"""Inspection finds what is wrong, names line and field, and never dies of bad data."""

import errno
import gzip
import io
import json
import os
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from training_backends import DatasetError, TrainingConfig
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.datasets import scan
from training_backends.datasets.inspect import (
    ISSUES_PER_CODE,
    check_upload,
    inspect,
    inspect_file,
    raise_for_errors,
)
from training_backends.datasets.provider_formats import LOCAL
from training_backends.datasets.worker_pool import run_parallel

MakeConfig = Callable[..., TrainingConfig]

USER: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is sunny."}


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


def talk(number: int) -> dict[str, Any]:
    """Make a right row, another for each number."""
    return chat({"role": "user", "content": f"What is {number}?"}, ANSWER)


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
    """Size, rows, turns and kind come with the issues."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), chat(USER, ANSWER, USER, ANSWER))
    file, issues = inspect_file(path, weight=2.0)
    assert issues == ()
    assert file is not None
    assert file.size == path.stat().st_size
    assert (file.rows, file.turns, file.sample_type, file.weight) == (2, 6, "instruct", 2.0)


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


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """Blank lines stop nothing; one warning says how many there are and where."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n\n')
    file, issues = inspect_file(path)
    assert file is not None
    assert file.rows == 2
    assert [(one.code, one.line, one.severity) for one in issues] == [
        ("line_ends", 1, "warning"),
        ("blank_lines", 2, "warning"),
    ]
    assert "3 blank lines" in issues[1].message


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


def test_utf_16_is_not_read_on(tmp_path: Path) -> None:
    """It is named as such, once."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    file, issues = inspect_file(path)
    assert file is None
    assert [(one.code, one.line) for one in issues] == [("bad_utf8", 1)]


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
    path = write(tmp_path / "a.jsonl", talk(1), {"text": "a"}, talk(2))
    file, issues = inspect_file(path)
    assert [(one.code, one.line) for one in issues] == [("mixed_formats", 2)]
    assert file is not None
    assert (file.rows, file.bad_rows, file.sample_type) == (3, 1, "instruct")


def test_two_files_in_one_are_told_apart_row_by_row(tmp_path: Path) -> None:
    """However many rows of the other format there are, the first are named."""
    texts = [{"text": f"Text {number}"} for number in range(100)]
    path = write(tmp_path / "a.jsonl", *map(talk, range(100)), *texts)
    file, issues = inspect_file(path)
    assert [one.line for one in issues] == [*range(101, 101 + ISSUES_PER_CODE), None]
    assert "80 more" in issues[-1].message
    assert file is not None
    assert file.bad_rows == 100


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
    assert peak < 5 * (8 << 20)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A large file costs no more memory than a small one."""
    path = tmp_path / "a.jsonl"
    answer = {**ANSWER, "content": "word " * 200}
    write(path, *({"messages": [{**USER, "content": str(n)}, answer]} for n in range(20_000)))
    tracemalloc.start()
    file, issues = inspect_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert issues == ()
    assert file is not None
    assert file.rows == 20_000
    assert file.size > 20_000_000
    assert peak < 16 << 20


def test_the_same_content_for_training_and_validation_is_an_error(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """It is told by content, whatever the names are; no row of it is told of then."""
    first = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    second = write(tmp_path / "b.jsonl", chat(USER, ANSWER))
    dataset = inspect(
        make_config(data={"train": first, "validation": second}), provider_format=LOCAL
    )
    assert [one.code for one in dataset.issues] == ["train_validation_overlap"]
    assert dataset.errors[0].path == str(second)


def test_a_row_that_stands_twice_is_a_warning(tmp_path: Path, make_config: MakeConfig) -> None:
    """Both lines are named, in one file or two; what is white at its end makes no difference."""
    first = write(tmp_path / "a.jsonl", talk(1), talk(2), talk(1))
    second = tmp_path / "b.jsonl"
    second.write_text(json.dumps(talk(3)) + "\n\n" + json.dumps(talk(2)) + " ")
    dataset = inspect(make_config(data={"train": [first, second]}))
    repeated = [one for one in dataset.issues if one.code == "duplicate_row"]
    assert [(one.path, one.line) for one in repeated] == [(str(first), 3), (str(second), 3)]
    assert "line 1" in repeated[0].message
    assert f"line 2 of {first}" in repeated[1].message
    assert dataset.errors == ()
    assert [file.summary.duplicate_rows for file in dataset.files] == [1, 1]


def test_a_row_to_validate_on_that_is_trained_on_is_a_warning(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Each is named, with the line in the training file; most of them are counted."""
    train = write(tmp_path / "a.jsonl", *map(talk, range(100)))
    validation = write(tmp_path / "b.jsonl", *map(talk, range(50, 110)))
    config = make_config(data={"train": train, "validation": validation})
    dataset = inspect(config, provider_format=LOCAL)
    assert {one.code for one in dataset.issues} == {"train_validation_overlap"}
    assert [one.line for one in dataset.issues] == [*range(1, ISSUES_PER_CODE + 1), None]
    assert f"line 51 of {train}" in dataset.issues[0].message
    assert "30 more" in dataset.issues[-1].message
    assert dataset.errors == ()
    assert dataset.validation[0].summary.overlapping_rows == 50


def test_a_refused_row_is_no_duplicate(tmp_path: Path) -> None:
    """What is wrong with it is said once for each; that it stands twice is not."""
    path = write(tmp_path / "a.jsonl", chat(USER), chat(USER))
    assert {one.code for one in found(path)} == {"no_assistant"}


def test_the_same_training_file_twice_is_a_warning(tmp_path: Path, make_config: MakeConfig) -> None:
    """Training on a file twice is allowed, though weights say it better."""
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    dataset = inspect(make_config(data={"train": [path, path]}), provider_format=LOCAL)
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
        make_config(data={"train": [tmp_path / "gone.jsonl", bad], "validation": good}),
        provider_format=LOCAL,
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
    assert "there is no assistant message" in check.errors[0].message


def test_an_upload_is_not_read_past_enough_errors(tmp_path: Path) -> None:
    """A hopeless file is given up early."""
    check = check_upload(write(tmp_path / "a.jsonl", *[{"foo": 1}] * 50), max_errors=3)
    assert [error.line_number for error in check.errors] == [1, 2, 3]
    assert check.num_lines is None


def test_an_empty_upload_has_an_error_on_its_first_line(tmp_path: Path) -> None:
    """An error of the whole file has a line number too, because the answer needs one."""
    check = check_upload(write(tmp_path / "a.jsonl"))
    assert [error.line_number for error in check.errors] == [1]


def test_a_summary_says_what_is_in_a_file(tmp_path: Path) -> None:
    """Roles, formats and lengths are counted in the same pass."""
    path = write(tmp_path / "a.jsonl", talk(1), talk(2), chat(USER, {**ANSWER, "weight": 0}))
    file, _ = inspect_file(path)
    assert file is not None
    summary = file.summary
    assert summary.roles == {"user": 3, "assistant": 3}
    assert summary.formats == {"messages": 3}
    assert summary.lines == file.size
    assert summary.weighted_rows == 1
    assert sum(rows for _, rows in summary.row_bytes) == 3
    assert summary.row_bytes[-1][0] >= summary.longest_row
    assert summary.duplicate_rows == 0


@pytest.mark.parametrize(("shards", "severity"), [(True, "warning"), (False, "error")])
def test_limits_are_those_of_the_provider_format(
    shards: bool, severity: str, *, tmp_path: Path, make_config: MakeConfig
) -> None:
    """A training file that is too large may be split at launch; validation data never is."""
    train = write(tmp_path / "a.jsonl", *map(talk, range(50)))
    validation = write(tmp_path / "b.jsonl", *map(talk, range(50, 60)))
    config = make_config(data={"train": train, "validation": validation})
    small = ProviderFormat(
        max_file_bytes=500, shards=shards, validation_max_bytes=400, min_rows=100
    )
    dataset = inspect(config, provider_format=small)
    assert [(one.code, one.severity, one.path) for one in dataset.issues] == [
        ("too_few_rows", "error", str(train)),
        ("file_too_large", severity, str(train)),
        ("file_too_large", "error", str(validation)),
        ("validation_too_large", "error", None),
    ]
    shares = inspect(config, provider_format=ProviderFormat(validation_max_share=0.05))
    assert [one.code for one in shares.issues] == ["validation_too_large"]
    assert "5% of the training data" in shares.issues[0].message
    milder = ProviderFormat(validation_max_share=0.05, levels={"validation_too_large": "warning"})
    assert inspect(config, provider_format=milder).errors == ()


def test_a_file_that_grows_while_it_is_read_is_an_error(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Its digest and its rows would be of two different contents."""
    path = write(tmp_path / "a.jsonl", *map(talk, range(5000)))

    def grow(*_: object) -> None:
        with path.open("a") as file:
            file.write(json.dumps(talk(-1)) + "\n")

    dataset = inspect(make_config(data={"train": path}), on_progress=grow)
    assert [one.code for one in dataset.errors] == ["changed_file"]
    assert dataset.files == ()


def broken(path: Path, rows: int) -> Path:
    """Write rows with many kinds of faults at many places."""
    with path.open("wb") as file:
        for number in range(rows):
            row = json.dumps(talk(number % (rows - 40))).encode()
            if number % 97 == 5:
                row = row[: number % len(row)]
            elif number % 89 == 7:
                row = json.dumps(chat(USER)).encode()
            elif number % 83 == 11:
                row = b'{"text": "Once upon a time"}'
            elif number % 79 == 13:
                row = b'{"text": "\xff"}'
            elif number % 71 == 17:
                row = b"x" * 3000
            file.write(row + (b"\r\n" if number == rows // 2 else b"\n"))
            if number % 73 == 19:
                file.write(b"  \n")
    return path


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_the_same(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
) -> None:
    """Every issue, its line, the caps and all counts are as if one had read."""
    first = broken(tmp_path / "a.jsonl", 9000)
    second = write(tmp_path / "b.jsonl", *map(talk, range(20)))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(first.read_bytes()))
    config = make_config(data={"train": [first, packed], "validation": second})
    alone = inspect(config, processes=1)
    monkeypatch.setattr(scan, "FIRST_BLOCK", 1000)
    monkeypatch.setattr(scan, "LARGEST_BLOCK", 20_000)
    told: list[Issue] = []
    together = inspect(config, processes=processes, on_issue=told.append)
    assert together == alone
    assert together.issues == tuple(told)
    assert len({one.code for one in told}) > 8


def test_issues_are_told_while_the_file_is_read(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has seen enough stops the reading by an exception."""
    path = broken(tmp_path / "a.jsonl", 9000)
    seen: list[Issue] = []

    def stop(issue: Issue) -> None:
        seen.append(issue)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        inspect(make_config(data={"train": path}), on_issue=stop, processes=2)
    assert [one.line for one in seen] == [6]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_line", [1, 10, 1000, 3000])
def test_parts_of_any_size_have_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_line: int, packed: bool
) -> None:
    """Lines longer than a part, and longer than the longest that is kept, too."""
    path = broken(tmp_path / "a.jsonl", 90)
    whole = inspect_file(path, max_line=max_line)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
        whole = inspect_file(path, max_line=max_line)
    for size in (1, 7, 64, 1000):
        for name in ("FIRST_BLOCK", "LARGEST_BLOCK"):
            monkeypatch.setattr(scan, name, size)
        found = inspect_file(path, max_line=max_line)
        assert found[1] == whole[1]
        assert found == whole


def test_few_bytes_are_read_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting another would take longer than it saves."""
    monkeypatch.setattr(scan, "cpu_count", lambda: 4)
    asked: list[int] = []

    def noted(*arguments: Any, processes: int) -> Any:
        asked.append(processes)
        return run_parallel(*arguments, processes=1)

    monkeypatch.setattr(scan, "run_parallel", noted)
    path = write(tmp_path / "a.jsonl", talk(1))
    inspect_file(path)
    monkeypatch.setattr(scan, "PARALLEL_BYTES", 10)
    inspect_file(path)
    inspect_file(path, processes=2)
    assert asked == [1, 4, 2]


def test_packed_files_are_inspected_but_not_trained_on(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Services and engines take plain JSON Lines."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(talk(1)).encode()))
    assert found(path) == ()
    assert [one.code for one in inspect(make_config(data={"train": path})).errors] == [
        "packed_file"
    ]
    (error,) = check_upload(path).errors
    assert error.message == "the file is compressed (gzip)"
    assert error.fix is not None
    assert error.fix.startswith("upload plain JSON Lines")


def test_several_threads_inspect_at_the_same_time(tmp_path: Path) -> None:
    """None counts the rows of another, as the gateway needs it."""
    paths = [write(tmp_path / f"{n}.jsonl", *map(talk, range(300 * n))) for n in range(1, 9)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(inspect_file, paths * 4))
    for (file, issues), path in zip(found, paths * 4, strict=True):
        assert issues == ()
        assert file is not None
        assert file.summary.roles == {"user": file.rows, "assistant": file.rows}
        assert file.rows == 300 * int(path.stem)


def test_without_room_for_hashes_the_rest_is_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That rows were not compared is a warning."""

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda *_, **__: Full())
    file, issues = inspect_file(write(tmp_path / "a.jsonl", talk(1), chat(USER), talk(1)))
    assert [one.code for one in issues] == ["no_assistant", "duplicates_not_searched"]
    assert issues[1].severity == "warning"
    assert file is not None
    assert file.summary.duplicate_rows is None


@pytest.mark.parametrize(
    ("content", "text", "fix"),
    [
        (json.dumps([talk(n) for n in range(20)]), "a JSON array", "jq -c '.[]' "),
        (json.dumps([talk(n) for n in range(20)], indent=2), "a JSON array", "jq -c '.[]' "),
        (json.dumps([talk(n) for n in range(3000)]) + "\n", "a JSON array", "jq -c '.[]' "),
        ("\ufeff\n [\n" + json.dumps(talk(1)) + ",\n", "a JSON array", "jq -c '.[]' "),
        (json.dumps(talk(1), indent=1) * 3, "pretty-printed JSON", "jq -c . "),
        ('{"messages": [\n' + json.dumps(talk(1))[14:], "pretty-printed JSON", "jq -c . "),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_that_is_not_json_lines_is_one_error(
    tmp_path: Path, content: str, text: str, fix: str, packed: bool
) -> None:
    """The commonest mistake is named once, with the command that mends it."""
    path = tmp_path / "data.json"
    data = content.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    file, (issue,) = inspect_file(path)
    assert file is None
    assert issue.message.startswith(f"the file is {text}")
    assert f"{fix}FILE" in str(issue.fix)


def test_rows_that_are_arrays_are_named_by_line(tmp_path: Path) -> None:
    """A list of messages on each line is no array of rows."""
    path = write(tmp_path / "a.jsonl", [ANSWER], [ANSWER])
    _, issues = inspect_file(path)
    assert [issue.line for issue in issues] == [1, 2]


def test_csv_is_one_error(tmp_path: Path) -> None:
    """By its name and its first character, not once for each line."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "a,b\n" * 30)
    _, (issue,) = inspect_file(path)
    assert issue.message == "the file is CSV, not JSON Lines"


def test_blank_lines_without_an_end_are_not_read_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes can hold thousands of millions of them."""
    monkeypatch.setattr("training_backends.datasets.file_report.MOST_BLANK_LINES", 100_000)
    for name, content in {
        "a.jsonl": b"\n" * 400_000,
        "a.jsonl.gz": gzip.compress(b"\n" * 400_000),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        file, (issue,) = inspect_file(path, processes=1)
        assert file is None
        assert issue.message == "more than 100,000 blank lines in a row; the rest was not read"


def test_a_line_without_an_end_is_not_read_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few megabytes can hold one of any length."""
    monkeypatch.setattr(scan, "MAX_SKIPPED_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "' + b"a" * (8 << 20)))
    file, issues = inspect_file(path, max_line=1 << 16)
    assert file is None
    assert [issue.code for issue in issues][-1] == "line_too_long"


def test_a_target_with_one_label_is_a_warning(tmp_path: Path, make_config: MakeConfig) -> None:
    """There is nothing to learn, unless another file has other labels."""
    one, other = (
        write(
            tmp_path / f"{label}.jsonl",
            *({"text": f"{label} {n}", "labels": {"topic": label}} for n in range(3)),
        )
        for label in ("delivery", "price")
    )
    config = make_config(data={"train": one}, method="classifier")
    (issue,) = inspect(config).issues
    assert (issue.code, issue.field, issue.severity) == ("single_label", "labels.topic", "warning")
    assert not inspect(make_config(data={"train": [one, other]}, method="classifier")).issues


def test_a_large_file_is_searched_for_doubled_keys_here_and_there(tmp_path: Path) -> None:
    """Each of the first rows, and enough of the others to find what a program did to all."""
    rows = [json.dumps(talk(n)) for n in range(16_000)]
    twice = [row[:-1] + ', "messages": ' + row[13:] for row in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(twice[:1] + rows[1:]) + "\n")
    assert [issue.line for issue in inspect_file(path)[1]] == [1]
    path.write_text("\n".join(rows[:8_000] + twice[8_000:]) + "\n")
    alone, together = (inspect_file(path, processes=count) for count in (1, 2))
    file, _ = alone
    assert file is not None
    assert file.summary.findings["duplicate_key"] > 4_000
    assert alone == together
