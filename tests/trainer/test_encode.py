"""Data files are encoded once, into arrays that every process and every resume reads."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.encoding import row_of
from training_backends.datasets.rows import parse_row
from training_backends.rundir.directory import RunDir, RunSpec, TrainerExitCode
from training_backends.tokens.encoders import ByteEncoder
from training_backends.trainer.data import EncodedRow, Examples
from training_backends.trainer.encode import (
    array_path,
    data_directories,
    encode_data,
    read_manifest,
)
from training_backends.trainer.errors import Stopped, TrainerError

MakeSpec = Callable[..., tuple[RunDir, RunSpec]]


def write_rows(path: Path, count: int) -> Path:
    """Write conversations of different lengths."""
    with path.open("w") as file:
        for n in range(count):
            turns = [("user", f"{n}? " * (1 + n % 5)), ("assistant", f"It is {n}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def make(tmp_path: Path) -> MakeSpec:
    """Return a function that makes a run directory and a spec for it."""
    write_rows(tmp_path / "rows.jsonl", 900)

    def make(name: str = "run", **changes: Any) -> tuple[RunDir, RunSpec]:
        values = {
            "run_id": name,
            "model": "tiny-mistral",
            "train": [tmp_path / "rows.jsonl"],
            "training_steps": 1,
        }
        spec = RunSpec.model_validate({**values, **changes})
        run = RunDir(tmp_path / name)
        run.write_spec(spec)
        return run, spec

    return make


def never() -> bool:
    return False


def contents(run: RunDir) -> dict[str, bytes]:
    """Return the files of all arrays."""
    files = sorted(path for path in run.tokens.rglob("*") if path.is_file())
    return {str(path.relative_to(run.tokens)): path.read_bytes() for path in files}


def stamps(run: RunDir) -> dict[str, int]:
    """Return what changes when the arrays are written again."""
    return {str(path): path.stat().st_ino for path in run.tokens.rglob("*")}


def first(sequences: tuple[EncodedRow, ...], labels: torch.Tensor) -> EncodedRow:
    del labels
    return sequences[0]


def test_the_arrays_have_every_row_in_order(make: MakeSpec, tmp_path: Path) -> None:
    """The ids and labels that the row has on its own, across files, read in any order."""
    other = write_rows(tmp_path / "other.jsonl", 7)
    run, spec = make(train=[tmp_path / "rows.jsonl", other])
    encode_data(run, spec, never)
    examples = Examples(data_directories(run, spec)[0], first)
    lines = [*(tmp_path / "rows.jsonl").open("rb"), *other.open("rb")]
    assert examples.rows == (900, 7)
    for place in (906, 0, 899, 900, -2):
        expected = row_of(ByteEncoder().encode(parse_row(lines[place]))[0])
        assert examples[place].ids.tolist() == expected.ids.tolist()
        assert examples[place].labels.tolist() == expected.labels.tolist()
        assert examples.lengths[place] == expected.length


def test_several_processes_write_the_same_arrays(
    make: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one process, in chunks of another size."""
    one, spec = make("one")
    encode_data(one, spec, never, processes=1)
    monkeypatch.setattr("training_backends.trainer.encode._CHUNK", 5000)
    two, spec = make("two")
    encode_data(two, spec, never, processes=2)
    assert contents(two) == contents(one)


def test_encoded_rows_are_used_until_something_they_depend_on_changes(
    make: MakeSpec, tmp_path: Path
) -> None:
    """The data, the method's settings, but not the settings of training."""
    run, spec = make()
    encode_data(run, spec, never)
    before = stamps(run)
    encode_data(run, spec.model_copy(update={"learning_rate": 0.5, "batch_size": 3}), never)
    assert stamps(run) == before
    for change in ({"seq_len": 20}, {}):  # back again
        before = stamps(run)
        encode_data(run, spec.model_copy(update=change), never)
        assert stamps(run) != before
    before = stamps(run)
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"text": "more"}\n')
    encode_data(run, spec, never)
    assert stamps(run) != before
    manifest = read_manifest(data_directories(run, spec)[0][0])
    assert manifest is not None
    assert manifest.counts.examples == 901


def test_a_torn_array_is_written_again(make: MakeSpec) -> None:
    """After a disk has lost a part of it; a process that trains does not read it."""
    run, spec = make()
    encode_data(run, spec, never)
    (directory,) = data_directories(run, spec)[0]
    whole = contents(run)
    array_path(directory, "ids").write_bytes(b"torn")
    with pytest.raises(TrainerError, match="train-0: the encoded rows are missing or incomplete"):
        Examples([directory], first)
    encode_data(run, spec, never)
    assert contents(run) == whole


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_leaves_nothing_behind(
    make: MakeSpec, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """It is obeyed before the next part is written."""
    monkeypatch.setattr("training_backends.trainer.encode._CHUNK", 5000)
    run, spec = make()
    asked: list[bool] = []

    def third() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Stopped):
        encode_data(run, spec, third, processes=processes)
    assert contents(run) == {}
    assert len(asked) == 3


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A system that refuses to write files beyond 20 kB, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported(make: MakeSpec, small_disk: None) -> None:
    """The failure says what to do, and what was written is removed, so that there is space."""
    run, spec = make()
    with pytest.raises(TrainerError, match=r"rows\.jsonl: the disk is full.*Free some") as caught:
        encode_data(run, spec, never)
    assert caught.value.failure.retryable
    assert contents(run) == {}


def test_the_progress_is_in_the_log(make: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few seconds, and at the end; a file that takes less has no record."""
    monkeypatch.setattr("training_backends.trainer.encode._CHUNK", 40_000)
    run, spec = make()
    encode_data(run, spec, never, report_every=0)
    *steps, end = [event.message for event, _ in run.read_events()]
    assert len(steps) > 1
    assert steps[0].startswith("Encoding rows.jsonl: ")
    assert steps[-1] == "Encoding rows.jsonl: 900 rows (100%)"
    assert end.startswith("Encoded rows.jsonl: 900 rows, ")
    quick, spec = make("quick")
    encode_data(quick, spec, never)
    assert quick.read_events() == []


def test_rows_that_cannot_be_used_are_counted(make: MakeSpec, tmp_path: Path) -> None:
    """Also when the arrays of an earlier process are used; blank lines do not count."""
    data = tmp_path / "bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    untrained = '{"messages": [{"role": "user", "content": "a"}]}'
    data.write_text(f"\ufeff{good}\n\n[]\n{untrained}\n" + "{}\n" * 4)
    run, spec = make(train=[data], max_invalid_fraction=0.8)
    for _ in range(2):
        encode_data(run, spec, never)
    messages = [event.message.partition("bad.jsonl: ")[2] for event, _ in run.read_events()]
    assert messages[:2] == messages[2:]
    assert messages[0].startswith("skipped 5 invalid rows: line 3: ")
    assert messages[0].count("line ") == 3
    assert messages[1] == "skipped 1 rows without tokens in the loss"
    with pytest.raises(TrainerError, match="5 invalid rows: line 3"):
        encode_data(run, spec.model_copy(update={"max_invalid_fraction": 0.5}), never)


@pytest.mark.engine
def test_a_resume_does_not_encode_again(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are encoded once; once the run is completed, nothing needs them."""
    from training_backends.trainer.process import train  # noqa: PLC0415  # loads torch's trainer

    run = make_run(tmp_path / "r", training_steps=2, validation=[])
    encoded: list[str] = []
    encode = encode_data

    def encode_and_stop(run: RunDir, spec: RunSpec, should_stop: Callable[[], bool]) -> None:
        encode(run, spec, should_stop)
        encoded.append(str(stamps(run)))
        if len(encoded) == 1:
            run.request_stop()

    monkeypatch.setattr("training_backends.trainer.encode.encode_data", encode_and_stop)
    assert train(run.path) is TrainerExitCode.STOPPED
    assert run.tokens.is_dir()
    assert train(run.path) is TrainerExitCode.DONE
    assert encoded[0] == encoded[1]
    assert not run.tokens.exists()
    shutil.rmtree(run.path)
