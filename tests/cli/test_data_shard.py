"""`data shard`: the files, what to paste into a configuration, and the exit codes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("data_file")]

Run = Any


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("data-*-of-*.jsonl"))


def test_shards_are_written(run: Run, tmp_path: Path, data_file: Path) -> None:
    """None is above the limit, and together they are the file."""
    done = run("data", "shard", "data.jsonl", "--limit", "0.9kB")
    assert done.code == 0
    assert "data.jsonl: 3 files" in done.err
    assert "data-00001-of-00003.jsonl  45 rows, 900 bytes" in done.err
    assert b"".join(path.read_bytes() for path in shards(tmp_path)) == data_file.read_bytes()


def test_what_is_shown_can_be_pasted_into_a_configuration(run: Run) -> None:
    """Each part keeps the weight of the file, for weights are those of a row."""
    done = run("data", "shard", "data.jsonl", "--limit", "1kB", "--weight", "2.5")
    shown = yaml.safe_load(done.out)
    assert shown == {
        "data": {
            "train": [
                {"path": "data-00001-of-00002.jsonl", "weight": 2.5},
                {"path": "data-00002-of-00002.jsonl", "weight": 2.5},
            ]
        }
    }


def test_json_has_sizes_and_hashes(run: Run, tmp_path: Path) -> None:
    """One document, with the same paths for the configuration."""
    document = run("data", "shard", "data.jsonl", "--limit", "1000", "--json").document
    assert document["limit"] == 1000
    (file,) = document["files"]
    assert [part["rows"] for part in file["files"]] == [50, 50]
    assert [len(part["sha256"]) for part in file["files"]] == [64, 64]
    assert document["data"]["train"] == [path.name for path in shards(tmp_path)]


def test_the_limit_is_that_of_the_provider_format(run: Run, tmp_path: Path) -> None:
    """512 MB for mistral, which is more than this file has."""
    document = run("data", "shard", "data.jsonl", "--json").document
    assert document["limit"] == 512_000_000
    assert [path.name for path in shards(tmp_path)] == ["data-00001-of-00001.jsonl"]
    assert (
        "local has no file size limit"
        in run("data", "shard", "x", "--provider-format", "local").err
    )


@pytest.mark.parametrize(
    ("limit", "size"), [("1.5k", 1500), ("2KB", 2000), ("1 KiB", 1024), ("3M", 3_000_000)]
)
def test_sizes_are_read(run: Run, limit: str, size: int) -> None:
    """Thousands, or powers of two where that is said."""
    assert run("data", "shard", "data.jsonl", "--limit", limit, "--json").document["limit"] == size


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.jsonl"], 3, "none.jsonl: no such file"),
        (["data.jsonl", "--limit", "19"], 3, "the row is longer than the limit of 19 bytes"),
        (["data.jsonl", "--limit", "large"], 2, "Invalid size 'large'"),
        (["data.jsonl", "--limit", "0"], 2, "The size must be at least 1 byte"),
        (["data.jsonl", "--weight", "0"], 2, "--weight must be greater than 0"),
        (["data.jsonl", "--provider-format", "x"], 2, "Choose from mistral, openai"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_input_is_explained(
    run: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    """With the exit code that scripts know; nothing is written."""
    done = run("data", "shard", *arguments)
    assert said in done.err
    assert done.code == code
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["data.jsonl"]


def test_nothing_is_written_over(run: Run, tmp_path: Path) -> None:
    """Unless it is asked for."""
    assert run("data", "shard", "data.jsonl", "--limit", "1kB").code == 0
    again = run("data", "shard", "data.jsonl", "--limit", "1kB")
    assert again.code == 3
    assert "data-00001-of-00002.jsonl already exists" in again.err
    assert run("data", "shard", "data.jsonl", "--limit", "1kB", "--force").code == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, data_file: Path) -> None:
    """Not even the parts that there was room for."""
    data_file.write_bytes(data_file.read_bytes() * 100)
    command = 'ulimit -f 64; exec "$0" -m training_backends data shard data.jsonl --limit 150kB'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "Could not write data-00001-of-00002.jsonl: File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["data.jsonl"]
