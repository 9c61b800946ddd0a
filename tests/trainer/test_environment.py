"""Which GPUs are there, as the environment or the driver says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from training_backends.core.files import hold_lock
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.environment import visible_devices
from training_backends.trainer.process import train

PLAIN = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000000)
GPU 1: NVIDIA H200 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000000)
"""
CUT = """\
GPU 0: NVIDIA A100 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-33333333-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  1: (UUID: MIG-44444444-aaaa-bbbb-cccc-000000000000)
GPU 1: NVIDIA A100 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000000)
"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("0", ("0",)),
        ("2, GPU-8f2c", ("2", "GPU-8f2c")),
        ("", ()),
        ("-1", ()),
        ("1,-1,0", ("1",)),
    ],
)
def test_the_environment_says_which(said: str, expected: tuple[str, ...]) -> None:
    """Numbers and names as they stand; what comes behind one that is none is ignored."""
    assert visible_devices({"CUDA_VISIBLE_DEVICES": said}) == expected


def pretend(listed: str, code: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a driver's program list GPUs."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("listed", "code", "expected"),
    [
        (PLAIN, 0, ("0", "1")),
        (
            CUT,
            0,
            (
                "MIG-33333333-aaaa-bbbb-cccc-000000000000",
                "MIG-44444444-aaaa-bbbb-cccc-000000000000",
                "1",
            ),
        ),
        ("NVIDIA-SMI has failed\n", 9, ()),
    ],
)
def test_otherwise_the_driver_is_asked(
    listed: str,
    code: int,
    expected: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that is cut into parts counts as its parts; a driver that fails as none."""
    pretend(listed, code, tmp_path, monkeypatch)
    assert visible_devices({}) == expected


def test_the_driver_is_not_handed_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process gets in its environment is shown to others."""
    pretend("", 0, tmp_path, monkeypatch)
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU ${HF_TOKEN:-7}: X"\n')
    monkeypatch.setenv("HF_TOKEN", "13")
    assert visible_devices({}) == ("7",)


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices({}) == ()


@pytest.mark.engine
def test_a_run_sees_the_gpu_of_its_place_only(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first GPU is taken, so the run is shown the second alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    pretend(PLAIN, 0, tmp_path, monkeypatch)
    slots = tmp_path / "slots"
    slots.mkdir()
    run = make_run(tmp_path / "r", slots_dir=slots, device="auto", training_steps=1)
    with hold_lock(slots / "gpu-0.0.lock"):
        assert train(run.path) is TrainerExitCode.DONE
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "Loading tiny-mistral, on GPU 1" in [event.message for event, _ in run.read_events()]
