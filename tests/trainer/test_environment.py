"""Which GPUs are there, as the environment or the driver says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from training_backends.core.files import hold_lock
from training_backends.rundir.directory import RunDir, TrainerExitCode
from training_backends.trainer.environment import show_only, visible_devices
from training_backends.trainer.process import train
from training_backends.trainer.queue import host_key

PLAIN = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000000)
GPU 1: NVIDIA H200 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000000)
"""
AMD_SMI = """\
GPU: 0
    BDF: 0000:03:00.0
    UUID: e7a1b4f0-0000-1000-80d5-0c1f5e9a3d21
    KFD_ID: 51545
    NODE_ID: 1
    PARTITION_ID: 0

GPU: 1
    BDF: 0000:26:00.0
    UUID: 5a2b
    KFD_ID: 6413
    NODE_ID: 2
    PARTITION_ID: 0

"""
ROCM_SMI = """\

============================ ROCm System Management Interface ============================
======================================= Unique ID ========================================
GPU[0]          : Unique ID: 0xe54792172da5eeb
GPU[1]          : Unique ID: N/A
==========================================================================================
================================== End of ROCm SMI Log ===================================
"""
CUT = """\
GPU 0: NVIDIA A100 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-33333333-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  1: (UUID: MIG-44444444-aaaa-bbbb-cccc-000000000000)
GPU 1: NVIDIA A100 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000000)
"""


def pretend_all(directory: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Have programs of drivers print something; no other is found."""
    for name, text in programs.items():
        program = directory / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}END\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


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
def test_the_environment_says_which(
    said: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers and names as they stand; what comes behind one that is none is ignored."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = visible_devices({"CUDA_VISIBLE_DEVICES": said})
    assert tuple(device.name for device in found) == expected
    # Without a driver's list, numbers are those of this machine.
    keys = (name if name.startswith("GPU-") else f"{host_key()}-{name}" for name in expected)
    assert tuple(device.key for device in found) == tuple(keys)


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ("1", ("GPU-22222222-aaaa-bbbb-cccc-000000000000",)),
        ("GPU-1", ("GPU-11111111-aaaa-bbbb-cccc-000000000000",)),
        ("GPU-3", ("GPU-3",)),
        ("GPU-", ("GPU-",)),
    ],
)
def test_a_gpu_is_known_by_its_uuid(
    said: str, keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is named, so that containers with one home do not mistake each other's."""
    pretend_all(tmp_path, monkeypatch, nvidia_smi=PLAIN)
    found = visible_devices({"CUDA_VISIBLE_DEVICES": said})
    assert tuple(device.key for device in found) == keys
    assert show_only(found[0]) == {"CUDA_VISIBLE_DEVICES": said}


def test_unequal_gpus_are_numbered_by_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an order that the driver's list does not have, unless it was asked to use that."""
    pretend_all(tmp_path, monkeypatch, nvidia_smi=PLAIN.replace("H200", "A100", 1))
    keys = [device.key for device in visible_devices({})]
    assert keys == [f"{host_key()}-0", f"{host_key()}-1"]
    keys = [device.key for device in visible_devices({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})]
    assert [key[:5] for key in keys] == ["GPU-1", "GPU-2"]


@pytest.mark.parametrize(
    ("program", "text", "keys"),
    [
        (
            "amd_smi",
            AMD_SMI,
            ("e7a1b4f0-0000-1000-80d5-0c1f5e9a3d21", "5a2b"),
        ),
        ("rocm_smi", ROCM_SMI, ("0xe54792172da5eeb", None)),
    ],
)
def test_gpus_of_amd_are_found(
    program: str,
    text: str,
    keys: tuple[str | None, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By either tool; one without an id is known by its machine and number."""
    pretend_all(tmp_path, monkeypatch, **{program: text})
    found = visible_devices({})
    assert [device.name for device in found] == ["0", "1"]
    assert [device.key for device in found] == [
        key or f"{host_key()}-{number}" for number, key in enumerate(keys)
    ]
    assert show_only(found[1]) == {"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}
    chosen = {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}
    (one,) = visible_devices(chosen)
    assert (one.name, one.key) == (found[1].name, found[1].key)


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
    assert tuple(device.name for device in visible_devices({})) == expected


def test_the_driver_is_not_handed_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process gets in its environment is shown to others."""
    pretend("", 0, tmp_path, monkeypatch)
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU ${HF_TOKEN:-7}: X"\n')
    monkeypatch.setenv("HF_TOKEN", "13")
    assert [device.name for device in visible_devices({})] == ["7"]


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
    first, _ = visible_devices({})
    with hold_lock(slots / f"gpu-{first.key}.0.lock"):
        assert train(run.path) is TrainerExitCode.DONE
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "Loading tiny-mistral, on GPU 1" in [event.message for event, _ in run.read_events()]
