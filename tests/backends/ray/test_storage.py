"""What the client says and does about an object store as the storage, without a cluster."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from tests.buckets import Bucket, bucket, s3_server
from training_backends.backends.ray.backend import RayBackend
from training_backends.backends.ray.objects import ObjectStorage
from training_backends.backends.ray.settings import RaySettings
from training_backends.core.config import DataSource, TrainingConfig
from training_backends.core.errors import BackendNotInstalled, ConfigError
from training_backends.core.run import TrainingRun
from training_backends.core.settings import load_settings
from training_backends.credentials.vault import CredentialVault
from training_backends.rundir.directory import RunDir, RunSpec
from training_backends.rundir.stored import StoredRun

__all__ = ["bucket", "s3_server"]

pytest.importorskip("s3fs")

CONFIG = TrainingConfig(model="tiny-mistral")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("training", "must be an absolute path or a URL"),
        ("ftp://host/training", "unknown scheme 'ftp'; use a path or s3://, gs://, az://"),
        ("hf://datasets/a/b", "unknown scheme 'hf'"),
        ("s3:///training", "the name of the bucket is missing"),
        ("s3://key@bucket/training", "must not contain credentials"),
    ],
)
def test_a_storage_that_cannot_be_one_is_rejected_with_its_setting(
    value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names what is possible."""
    monkeypatch.setenv("TRAINING_BACKENDS_RAY__STORAGE", value)
    with pytest.raises(ConfigError) as caught:
        load_settings(RaySettings)
    [issue] = caught.value.issues
    assert issue.field == "TRAINING_BACKENDS_RAY__STORAGE"
    assert reason in issue.message


def test_a_file_url_is_a_shared_directory(tmp_path: Path) -> None:
    """As its path is."""
    assert RaySettings(storage=f"file://{tmp_path}").storage == str(tmp_path)


def test_a_store_whose_package_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is uploaded."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BackendNotInstalled, match="gs://") as caught:
        ObjectStorage("gs://bucket/training", tmp_path, None).stored("r")
    assert caught.value.install == "pip install 'training-backends[gcs]'"


def storage(bucket: Bucket, home: Path, **changes: Any) -> ObjectStorage:
    """Return the storage as a client with these options sees it."""
    return ObjectStorage(f"{bucket.url}/training", home, bucket.options | changes)


def test_a_usable_storage_is_left_as_it_was(bucket: Bucket, tmp_path: Path) -> None:
    """The check removes what it has written."""
    assert storage(bucket, tmp_path).issue() is None
    assert bucket.names() == []


def test_a_bucket_that_does_not_exist_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    """The run would fail after its data has been uploaded."""
    issue = ObjectStorage("s3://nothing-here/training", tmp_path, bucket.options).issue()
    assert issue is not None
    assert (issue.severity, "bucket does not exist" in issue.message) == ("error", True)


@pytest.fixture
def reader(bucket: Bucket) -> Iterator[dict[str, str]]:
    """The keys of a user who may only read, on a server that asks for permissions."""
    iam = boto3.client("iam", endpoint_url=bucket.endpoint, region_name="us-east-1")
    iam.create_user(UserName="reader")
    statement = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    switch = f"{bucket.endpoint}/moto-api/reset-auth"
    httpx.post(switch, content=b"0")
    yield {"key": key["AccessKeyId"], "secret": key["SecretAccessKey"]}
    httpx.post(switch, content=b"inf")


def test_a_storage_without_write_permission_is_an_error_that_says_so(
    bucket: Bucket, reader: dict[str, str], tmp_path: Path
) -> None:
    """And what to set."""
    issue = storage(bucket, tmp_path, **reader).issue()
    assert issue is not None
    assert (issue.severity, "access denied" in issue.message) == ("error", True)
    assert reader["secret"] not in repr(issue)


def test_clients_on_two_machines_see_the_same_runs(bucket: Bucket, tmp_path: Path) -> None:
    """A run belongs to the storage, not to a machine."""
    settings = RaySettings(storage=f"{bucket.url}/training")
    vault = CredentialVault(environ={})
    one, other = (
        RayBackend(tmp_path / name, credentials=vault, settings=settings) for name in "ab"
    )
    elsewhere = RayBackend(
        tmp_path, credentials=vault, settings=RaySettings(storage=f"{bucket.url}/other")
    )
    place = storage(bucket, tmp_path).place
    run = TrainingRun(id="r", backend="ray", config=CONFIG, place=place)
    assert [each.sees(run) for each in (one, other, elsewhere)] == [True, True, False]


def test_a_launch_uploads_the_data_before_the_spec_that_names_it(
    bucket: Bucket, tmp_path: Path
) -> None:
    """A repeated launch uploads nothing again, and the driver finds the data on its own disk."""
    data = tmp_path / "chats.jsonl.gz"
    data.write_bytes(b"rows")
    spec = RunSpec(
        run_id="r", model="tiny-mistral", train=(DataSource(path=data),), training_steps=1
    )
    run = TrainingRun(id="r", backend="ray", config=CONFIG)
    here = storage(bucket, tmp_path)
    here.create(run, RunDir(here.home / "runs" / "r"), spec)
    data.unlink()
    here.create(run, RunDir(here.home / "runs" / "r"), spec)
    stored, driver = StoredRun.at(f"{bucket.url}/training/runs/r"), RunDir(tmp_path / "driver")
    stored.update(driver)
    stored.fetch_data(driver)
    [source] = driver.read_spec().train
    assert source.local_path == driver.path / "data/train-0.jsonl.gz"
    assert source.local_path.read_bytes() == b"rows"


def test_a_launch_without_its_data_uploads_nothing(bucket: Bucket, tmp_path: Path) -> None:
    """As when a run is resumed on another machine."""
    gone = DataSource(path=tmp_path / "gone.jsonl")
    spec = RunSpec(run_id="r", model="tiny-mistral", train=(gone,), training_steps=1)
    run = TrainingRun(id="r", backend="ray", config=CONFIG)
    here = storage(bucket, tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.jsonl: the data is not on this machine"):
        here.create(run, RunDir(here.home / "runs" / "r"), spec)
    assert not bucket.names()
