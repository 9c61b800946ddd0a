"""The package's metadata, its source distribution, and the installation hints of its messages."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def test_the_supported_versions_of_python_are_those_that_ci_tests() -> None:
    """The classifiers, the lowest version and the matrix agree."""
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={listed[0]}"
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == listed


def test_workflows_run_targets_that_exist() -> None:
    """Also those for the lowest and the newest versions, and for the packages."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = {
        word
        for workflow in WORKFLOWS.values()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for command in re.findall(r"^make (.*)$", step.get("run", ""), re.MULTILINE)
        for word in command.split()
        if "=" not in word
    }
    assert run <= targets
    assert run >= {"check", "test", "test-lowest", "test-newest", "dist"}


def test_the_source_distribution_is_complete() -> None:
    """It has every file of the repository but the list of what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    packed = {each.distribution_path for each in SdistBuilder(str(ROOT)).recurse_included_files()}
    files = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert files - packed <= {".gitignore", "pyproject.toml"}  # which are packed in any case
    assert not [name for name in packed - files if name.startswith("training_backends/")]


def test_hints_install_extras_of_this_package() -> None:
    """Not a package that the extra would install in a version that is supported."""
    extras = set(PROJECT["optional-dependencies"])
    found = [
        (path.name, installed)
        for path in (ROOT / "training_backends").rglob("*.py")
        if path.parent.name != "integrations"  # whose tools have no extra
        for installed in re.findall(r"pip install (?!\.)'?([^'`\s\"]+)", path.read_text())
    ]
    assert len(found) > 10
    wrong = []
    for name, installed in found:
        ours = re.fullmatch(r"(?:training-backends|\{PACKAGE\})\[([^]]+)\](?:==.*)?", installed)
        if not ours or not (ours[1] in extras or ours[1].startswith("{")):
            wrong.append((name, installed))
    assert wrong == []
