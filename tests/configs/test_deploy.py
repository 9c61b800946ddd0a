"""The files to deploy the gateway with, as the tools of their formats judge them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training_backends.core.settings import Settings, load_settings
from training_backends.gateway.settings import GatewaySettings

DEPLOY = Path(__file__).parents[2] / "configs" / "deploy"
UNIT = DEPLOY / "training-backends.service"
CONTAINER = DEPLOY / "Containerfile"
MANIFESTS = DEPLOY / "kubernetes.yaml"


def checked(*command: str | Path) -> str:
    """Run a tool, which must find nothing; return what it says."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(command[0], path=path) is None:
        pytest.skip(f"not installed: {command[0]}")
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_unit_is_valid_and_confined(tmp_path: Path) -> None:
    """With a program that is there; its exposure is at most 2 of 10."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/training-backends/bin/", "/usr/bin/env "))
    assert checked("systemd-analyze", "verify", unit) == ""
    told = checked("systemd-analyze", "security", "--offline=true", unit)
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert float(exposure) <= 2


def test_the_container_file_is_clean() -> None:
    """No finding, and none of a kind that is ignored."""
    assert checked("hadolint", "--no-color", CONTAINER) == ""
    assert "hadolint ignore" not in CONTAINER.read_text()


def test_the_manifests_are_valid() -> None:
    """Every resource, strictly."""
    told = checked("kubernetes-validate", "--strict", MANIFESTS)
    assert told.count(" passed ") == len(list(yaml.safe_load_all(MANIFESTS.read_text())))


def test_the_container_of_the_manifests_may_do_little() -> None:
    """No root, nothing to write to but its volumes, and probes that need no key."""
    documents = {each["kind"]: each for each in yaml.safe_load_all(MANIFESTS.read_text())}
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")
    }
    assert probes == {"liveness": "/healthz", "readiness": "/readyz"}
    patience = pod["terminationGracePeriodSeconds"]
    ending = [each["value"] for each in container["env"] if "SHUTDOWN" in each["name"]]
    assert sum(map(float, ending)) < patience


@pytest.mark.parametrize("path", [UNIT, CONTAINER, MANIFESTS], ids=lambda path: path.name)
def test_every_setting_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a value that is valid; an unknown variable would stop the gateway."""
    text = path.read_text()
    found = dict(re.findall(r"(TRAINING_BACKENDS_\w+)(?:=|: |\n\s+value: )\"?([^\s\"]+)", text))
    assert len(found) >= 4
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(GatewaySettings)
    load_settings(Settings)
    assert settings.access_log or settings.metrics_token
