"""What the Ray backend decides without a cluster: room for workers, the package, suspension."""

from pathlib import Path

import pytest

from training_backends.backends.ray.api import Node
from training_backends.backends.ray.backend import RayBackend
from training_backends.backends.ray.package import package_zip
from training_backends.backends.ray.resources import Workers, resource_issues
from training_backends.backends.ray.settings import RaySettings
from training_backends.core.config import Resources
from training_backends.core.files import hold_lock
from training_backends.credentials.vault import CredentialVault

CPUS = Node(state="ALIVE", resources_total={"CPU": 8})
H100 = Node(state="ALIVE", resources_total={"CPU": 32, "GPU": 4, "accelerator_type:H100": 1})


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Resources(), True),
        (Resources(workers=4, gpus=1), True),
        (Resources(workers=5, gpus=1), False),
        (Resources(gpus=2, workers=2, cpus=16, accelerator="H100"), True),
        (Resources(gpus=1, accelerator="A100"), False),
        (Resources(workers=5, gpus=0, cpus=8), True),
        (Resources(gpus=0, cpus=33), False),
    ],
)
def test_a_worker_has_to_fit_on_one_node(wanted: Resources, fits: bool) -> None:
    """Resources of several nodes do not add up for one worker."""
    issues = list(resource_issues(wanted, [CPUS, H100], autoscaling=False))
    assert ([issue.severity for issue in issues] == []) is fits


def test_a_cluster_that_grows_may_have_room_later() -> None:
    """What does not fit now is only a warning then."""
    [issue] = resource_issues(Resources(workers=100), [CPUS], autoscaling=True)
    assert issue.severity == "warning"


def test_gpus_are_used_where_there_are_any() -> None:
    """Unless the configuration says how many."""
    assert Workers.of(Resources(), [CPUS, H100]).gpus == 1
    assert Workers.of(Resources(), [CPUS]).gpus == 0
    assert Workers.of(Resources(gpus=0), [H100]).gpus == 0


def test_the_same_files_make_the_same_package() -> None:
    """So that a cluster gets each version once."""
    first = package_zip()
    package_zip.cache_clear()
    assert package_zip() == first


@pytest.mark.anyio
async def test_a_server_that_ends_suspends_no_run_of_the_cluster(tmp_path: Path) -> None:
    """Not even one whose driver runs on this machine: it outlives the server."""
    run = tmp_path / "ray" / "runs" / "r"
    run.mkdir(parents=True)
    (run / "spec.json").write_text("{}")
    backend = RayBackend(tmp_path, credentials=CredentialVault(environ={}), settings=RaySettings())
    with hold_lock(run / "lock"):
        assert await backend.suspend() == 0
    assert not (run / "stop").exists()
