"""Data in object stores, on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.buckets import Bucket, bucket, s3_server

__all__ = ["bucket", "s3_server"]

pytestmark = pytest.mark.e2e

Run = Any

GOOD = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]}
ROWS = (json.dumps(GOOD) + "\n").encode()


def test_data_is_inspected_where_it_is(run: Run, bucket: Bucket) -> None:
    """An issue names the URL and the line."""
    url = bucket.put("train.jsonl", ROWS + b'{"messages": []}\n')
    done = run("data", "inspect", url)
    assert done.code == 3
    assert f"{url}:2: " in done.out


def test_a_configuration_names_data_by_url(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    """For `inspect` and `preview`."""
    url = bucket.put("train.jsonl", ROWS)
    (tmp_path / "run.yaml").write_text(f"model: tiny-mistral\ndata:\n  train: {url}\n")
    assert run("data", "inspect", "--config", "run.yaml").code == 0
    shown = run("data", "preview", "run.yaml")
    assert (shown.code, "[INST]1?[/INST]" in shown.out) == (0, True)


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("s3://no-such-bucket/train.jsonl", 3, "the bucket does not exist"),
        ("gs://bucket/train.jsonl", 8, "pip install 'training-backends[gcs]'"),
        ("ftp://host/train.jsonl", 3, "s3, gs, az, hf and https"),
    ],
)
def test_what_cannot_be_read_has_an_exit_code(
    run: Run, bucket: Bucket, url: str, code: int, said: str
) -> None:
    """And a message that says what to do."""
    done = run("data", "inspect", url)
    assert done.code == code
    assert said in done.err


@pytest.mark.parametrize(("prefix", "state"), [("tb", "ok"), ("", "failed")])
def test_doctor_checks_the_storage_of_the_gateway(
    run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, prefix: str, state: str
) -> None:
    """With the settings of the gateway; no secret of them is shown."""
    place = f"{bucket.url}/{prefix}" if prefix else "s3://no-such-bucket"
    monkeypatch.setenv("TRAINING_BACKENDS_GATEWAY__BLOBS", place)
    options = {**bucket.options, "key": "AKIAOFTHEGATEWAY", "secret": "gateway-secret-value"}
    monkeypatch.setenv("TRAINING_BACKENDS_GATEWAY__BLOB_OPTIONS", json.dumps(options))
    done = run("doctor", "--json")
    (check,) = [each for each in done.document["checks"] if each["name"] == "gateway files"]
    assert check["state"] == state
    assert options["secret"] not in done.out + done.err
