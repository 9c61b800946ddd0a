"""The page "Write a backend in 30 minutes" is followed literally, in an environment of its own."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mistralai.client import Mistral

from tests.pages import code_blocks
from tests.waiting import wait_until
from training_backends.testing.conformance import BackendConformance
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "tiny_openai"
PAGE = "write-a-backend.md"
BLOCKS = code_blocks(PAGE)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with training-backends as users install it."""

    root: Path

    @property
    def site(self) -> Path:
        """Where its packages are installed."""
        return next((self.root / "lib").glob("python*/site-packages"))

    def variables(self, home: Path, **others: str) -> dict[str, str]:
        """Return the environment variables of its processes; pip must not use the network."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "TRAINING_BACKENDS_HOME": str(home / "state"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring",
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # this is how pip spells it
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_QUIET": "1",
            "PYTEST_ADDOPTS": "-p no:cacheprovider",
            **others,
        }

    def run(self, *command: str, directory: Path, **others: str) -> str:
        """Run a command to its end, and return what it printed."""
        done = subprocess.run(
            command,
            cwd=directory,
            env=self.variables(directory.parent, **others),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=380,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install this project's wheel, and link what it depends on."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "venv", symlinks=True)
    made = Environment(root / "venv")
    links = root / "dependencies"
    links.mkdir()
    for place in (path for path in sys.path if path.endswith("site-packages")):
        for entry in Path(place).iterdir():
            # Also not the path of this checkout.
            if "training_backends" not in entry.name and entry.suffix != ".pth":
                link = links / entry.name
                if not link.exists():
                    link.symlink_to(entry)
    (made.site / "dependencies.pth").write_text(f"{links}\n")
    for program in ("pip", "pytest"):
        path = made.root / "bin" / program
        path.write_text(f'#!/bin/sh\nexec python -m {program} "$@"\n')
        path.chmod(0o755)
    made.run("pip", "install", "--no-compile", str(ROOT), directory=root)
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the empty directory with which the page begins."""
    made = tmp_path_factory.mktemp("reader") / "tiny-openai"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def output(environment: Environment, directory: Path) -> str:
    """Add each block to its file, run the commands, and return what they print."""
    with ScriptedOpenAIProvider() as other:
        port = str(other.port)  # free once this server has stopped
    lines = ["set -ex", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for block in BLOCKS:
        # The only change: tests that run at the same time cannot share a port.
        text = block.text.replace("8123", port)
        if block.title:
            text = f"cat >> {block.title} <<'END OF BLOCK'\n{text}END OF BLOCK"
        lines.append(text)
    script = directory.parent / "page.sh"
    script.write_text("\n".join(lines))
    return environment.run("bash", str(script), directory=directory)


def test_page_writes_the_example() -> None:
    """The files of the page are those of the package, in which other tests look for faults."""
    files: dict[str, str] = {}
    for block in BLOCKS:
        if block.title:
            files[block.title] = files.get(block.title, "") + block.text
    for path in PACKAGE.iterdir():
        if path.is_file():
            assert files[path.name] == path.read_text()


@pytest.mark.timeout(400)
def test_page_leads_from_an_empty_directory_to_a_run(output: str) -> None:
    """Each command of the page succeeds: the kit passes, and jobs are run and stopped."""
    assert f"= {len(BackendConformance.checks())} passed in" in output
    assert re.search(r"^tiny \(tiny-openai\)$", output, re.MULTILINE)
    assert re.search(r"^ +ok +tiny: http", output, re.MULTILINE)
    assert "run.yaml on tiny: ready to launch" in output
    assert re.search(r"^first +completed +gpt-4o-mini +tiny", output, re.MULTILINE)
    assert re.search(r"^second +cancelled +gpt-4o-mini +tiny", output, re.MULTILINE)


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("output")
def test_gateway_serves_the_installed_example(
    environment: Environment, directory: Path, tmp_path: Path
) -> None:
    """The official Mistral SDK trains through a wheel of the example, away from its source."""
    environment.run("pip", "install", ".", directory=directory)
    found = environment.run("python", "-c", FIND, directory=tmp_path)
    assert str(environment.site / "tiny_openai.py") in found
    assert str(environment.site / "training_backends") in found
    assert str(ROOT) not in found
    key = secrets.token_urlsafe()
    with ScriptedOpenAIProvider() as server, served(environment, tmp_path, server, key) as url:
        client: Any = Mistral(api_key=key, server_url=url)
        content = (directory / "train.jsonl").read_bytes()
        file = client.files.upload(file={"file_name": "train.jsonl", "content": content})
        create = partial(
            client.fine_tuning.jobs.create,
            model="gpt-4o-mini",
            training_files=[{"file_id": file.id, "weight": 1}],
            # The backend has no absolute learning rate, and the SDK would send its default.
            hyperparameters={"epochs": 2, "learning_rate": None},
            auto_start=True,
        )
        first, second = create(suffix="first"), create(suffix="second")
        look = partial(client.fine_tuning.jobs.get, job_id=first.id)
        wait_until(lambda: len(server.jobs) == 2)
        client.fine_tuning.jobs.cancel(job_id=second.id)
        server.auto = "complete"
        done = wait_until(look, lambda job: job.status in {"SUCCESS", "FAILED"})
        assert done.status == "SUCCESS"
        assert sorted(job.asked["suffix"] for job in server.jobs.values()) == ["first", "second"]
        assert done.fine_tuned_model
        look = partial(client.fine_tuning.jobs.get, job_id=second.id)
        wait_until(look, lambda job: job.status == "CANCELLED")


FIND = """
import sys
from importlib.util import find_spec
print(sys.path, find_spec("tiny_openai").origin, find_spec("training_backends").origin)
"""


@contextmanager
def served(
    environment: Environment, directory: Path, server: ScriptedOpenAIProvider, key: str
) -> Iterator[str]:
    """Run the gateway in front of the example, and return its URL."""
    server.key = "sk-example"
    catalogue = directory / "models.toml"
    catalogue.write_text('[models.gpt-4o-mini]\ntarget = "gpt-4o-mini"\n')
    variables = environment.variables(
        directory,
        TRAINING_BACKENDS_TINY__BASE_URL=server.url,
        TRAINING_BACKENDS_GATEWAY__API_KEY=key,
        TRAINING_BACKENDS_GATEWAY__CATALOGUE=str(catalogue),
        TINY_API_KEY=server.key,
    )
    command = ["training-backends", "serve", "--backend", "tiny", "--port", "0", "--json"]
    with subprocess.Popen(
        command, cwd=directory, env=variables, stdout=subprocess.PIPE, text=True
    ) as gateway:
        assert gateway.stdout is not None
        try:
            yield json.loads(gateway.stdout.readline())["url"]
        finally:
            gateway.send_signal(signal.SIGINT)
            assert gateway.wait(30) == 0
